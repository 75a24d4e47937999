// AdamW and Adam on scattered rows of a table, over a plain C interface: no Python or torch header, so that one build
// serves all their versions. Loaded by row_update.py.
//
// Each operation rounds by itself (built with -ffp-contract=off), in the order of adapter_kernels/adamw_blocks.py, the
// torch path: both give the same bits, whatever instructions the machine has.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "../kernels/adapter_kernels/helper_threads.h"

// One build for every x86-64: the loader picks the widest clone that the processor has.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define FOR_EACH_VECTOR_WIDTH __attribute__((target_clones("default", "avx2", "avx512f")))
#endif
#endif
#ifndef FOR_EACH_VECTOR_WIDTH
#define FOR_EACH_VECTOR_WIDTH
#endif

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#define RESTRICT __restrict__
#elif defined(_MSC_VER)
#define INLINE __forceinline
#define RESTRICT __restrict
#else
#define INLINE inline
#define RESTRICT
#endif

namespace {

// The scalars of one step, in the order of _COLUMNS in row_update.py.
struct Step {
    float mix;       // of (g - m): 1 - beta1 added to m, or -beta1 added to g
    float from_grad; // which of the two; the first while 1 - beta1 < 0.5, as torch.lerp
    float beta2;
    float fresh2;    // 1 - beta2
    float eps;
    float decay;     // decoupled: 1 - lr * weight_decay, else 1
    float coupled;   // coupled: weight_decay, else 0
    float step_size; // lr / (1 - beta1^n)
    float root2;     // sqrt(1 - beta2^n)
};
static_assert(sizeof(Step) == 9 * sizeof(float), "Step is handed over as nine floats");

template <bool COUPLED, bool FROM_GRAD>
INLINE void step_as(float* RESTRICT p, float* RESTRICT m, float* RESTRICT v, const float* RESTRICT grad,
                    int64_t width, const Step& s) {
    const float mix = s.mix, beta2 = s.beta2, fresh2 = s.fresh2, eps = s.eps, decay = s.decay;
    const float coupled = s.coupled, step_size = s.step_size, root2 = s.root2;
    for (int64_t i = 0; i < width; ++i) {
        float g = grad[i];
        if (COUPLED) g = g + coupled * p[i];
        const float moved = mix * (g - m[i]);
        const float m_new = (FROM_GRAD ? g : m[i]) + moved;
        const float v_new = v[i] * beta2 + (fresh2 * g) * g;
        m[i] = m_new;
        v[i] = v_new;
        p[i] = p[i] * decay - (m_new * step_size) / (std::sqrt(v_new) / root2 + eps);
    }
}

template <bool COUPLED>
INLINE void step_from(float* p, float* m, float* v, const float* grad, int64_t width, const Step& s) {
    if (s.from_grad != 0.0f)
        step_as<COUPLED, true>(p, m, v, grad, width, s);
    else
        step_as<COUPLED, false>(p, m, v, grad, width, s);
}

FOR_EACH_VECTOR_WIDTH
void step_block(float* p, float* m, float* v, const float* grad, int64_t width, const Step& s) {
    if (s.coupled != 0.0f)
        step_from<true>(p, m, v, grad, width, s);
    else
        step_from<false>(p, m, v, grad, width, s);
}

// float32 to bfloat16, to the nearest, ties to even; NaN stays NaN.
FOR_EACH_VECTOR_WIDTH
void round_block(uint16_t* RESTRICT wire, const float* RESTRICT p, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
        uint32_t bits;
        std::memcpy(&bits, p + i, sizeof bits);
        const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        wire[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest);
    }
}

struct Job {
    float *table, *exp_avg, *exp_avg_sq;
    uint16_t* wire;
    const float* grads;
    const int64_t* rows;
    const Step* steps;
    int64_t count, width;

    // The processor's own prefetch ends with the row and with each page: touch those of the next row. More costs time.
    void look_ahead(int64_t next) const {
#if defined(__GNUC__)
        constexpr int64_t PAGE = 4096 / sizeof(float);
        for (int64_t i = 0; i < width; i += PAGE)
            for (const float* values : {table, exp_avg, exp_avg_sq}) __builtin_prefetch(values + next + i);
#endif
    }

    void row(int64_t i) const {
        const int64_t at = rows[i] * width;
        if (i + 1 < count) look_ahead(rows[i + 1] * width);
        step_block(table + at, exp_avg + at, exp_avg_sq + at, grads + i * width, width, steps[i]);
        if (wire) round_block(wire + at, table + at, width);
    }
};

} // namespace

// Changes with the arguments below or with Step, so that a stale build is not called.
EXPORT int meft_row_adamw_version() { return 3; }

// Whether rows ascend, each once, from 0 to limit - 1.
EXPORT int meft_rows_ascend(const int64_t* rows, int64_t count, int64_t limit) {
    int64_t before = -1;
    for (int64_t i = 0; i < count; before = rows[i++])
        if (rows[i] <= before || rows[i] >= limit) return 0;
    return 1;
}

// Row rows[i] takes steps[i] with grads[i]. Rows must be distinct and in range. `wire` (bfloat16) may be null.
EXPORT void meft_row_adamw(float* table, float* exp_avg, float* exp_avg_sq, uint16_t* wire, const float* grads,
                           const int64_t* rows, int64_t count, int64_t width, const float* steps, int threads) {
    static_assert(alignof(Step) == alignof(float), "steps are read in place");
    const Job job{table, exp_avg, exp_avg_sq, wire, grads, rows, reinterpret_cast<const Step*>(steps), count, width};

    const int64_t share = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, width)); // rows taken at a time
    in_pieces(count, share, threads, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) job.row(i);
    });
}

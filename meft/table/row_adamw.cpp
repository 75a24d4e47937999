// AdamW and Adam on scattered rows of a table, and the drain of their gradients, over a plain C interface: no Python or
// torch header, so that one build serves all their versions. Loaded by row_step.py.
//
// Each operation rounds by itself (built with -ffp-contract=off), in the order of adapter_kernels' row_adamw_torch.py:
// both give the same bits, whatever instructions the machine has.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "../../kernels/adapter_kernels/runtime/helper_threads.h"

// One build for every x86-64: the loader picks the widest clone that the processor has.
#if defined(COUNT_BYTES)
#elif defined(__x86_64__) && defined(__gnu_linux__) && defined(__has_attribute)
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

// Values in memory as the loops see them. A build with -DCOUNT_BYTES adds up what each load and store moves, which
// tests/meft/test_host_bytes.py compares with step_time.py.
#ifdef COUNT_BYTES
std::atomic<int64_t> counted{0};

template <class T>
struct Counted {
    struct Element {
        T* address;
        operator std::remove_const_t<T>() const { counted += sizeof(T); return *address; }
        void operator=(T value) const { counted += sizeof(T); *address = value; }
    };
    T* first;
    Counted(T* pointer) : first(pointer) {}
    Element operator[](int64_t i) const { return {first + i}; }
};
#define MEMORY(T) Counted<T>
#else
#define MEMORY(T) T* RESTRICT
#endif

// The scalars of one step, in the order of `_scalars` in row_step.py.
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
static_assert(sizeof(Step) == 9 * sizeof(float), "Step is passed as nine floats");

// float32 to bfloat16, to the nearest, ties to even; NaN stays NaN.
INLINE uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest);
}

// What gradients are multiplied by as they are read, one after the other; 1 changes no bit.
struct Factors {
    float first, second;
};

// A row of the table, of both moments and of the compute copy (null: there is none), and its gradient.
struct Row {
    float *p, *m, *v;
    uint16_t* copy;
    const float* grad;
};

template <bool COPY, bool COUPLED, bool FROM_GRAD>
INLINE void step_values(MEMORY(float) p, MEMORY(float) m, MEMORY(float) v, MEMORY(uint16_t) copy,
                        MEMORY(const float) grad, int64_t width, const Step& s, const Factors& f) {
    const float mix = s.mix, beta2 = s.beta2, fresh2 = s.fresh2, eps = s.eps, decay = s.decay;
    const float coupled = s.coupled, step_size = s.step_size, root2 = s.root2;
    const float first = f.first, second = f.second;
    for (int64_t i = 0; i < width; ++i) {
        const float p_old = p[i], m_old = m[i];
        float g = (grad[i] * first) * second;
        if (COUPLED) g = g + coupled * p_old;
        const float moved = mix * (g - m_old);
        const float m_new = (FROM_GRAD ? g : m_old) + moved;
        const float v_new = v[i] * beta2 + (fresh2 * g) * g;
        const float p_new = p_old * decay - (m_new * step_size) / (std::sqrt(v_new) / root2 + eps);
        m[i] = m_new;
        v[i] = v_new;
        p[i] = p_new;
        if (COPY) copy[i] = narrow(p_new);
    }
}

// Compilers take the pointers to be distinct as parameters, not as fields of a struct.
template <bool COPY, bool COUPLED, bool FROM_GRAD>
INLINE void step_as(const Row& row, int64_t width, const Step& s, const Factors& f) {
    step_values<COPY, COUPLED, FROM_GRAD>(row.p, row.m, row.v, row.copy, row.grad, width, s, f);
}

template <bool COPY>
INLINE void step_from(const Row& row, int64_t width, const Step& s, const Factors& f) {
    const bool coupled = s.coupled != 0.0f, from_grad = s.from_grad != 0.0f;
    if (coupled && from_grad) return step_as<COPY, true, true>(row, width, s, f);
    if (coupled) return step_as<COPY, true, false>(row, width, s, f);
    if (from_grad) return step_as<COPY, false, true>(row, width, s, f);
    step_as<COPY, false, false>(row, width, s, f);
}

FOR_EACH_VECTOR_WIDTH
void step_row(const Row& row, int64_t width, const Step& s, const Factors& f) {
    if (row.copy)
        step_from<true>(row, width, s, f);
    else
        step_from<false>(row, width, s, f);
}

struct Job {
    Row first; // row 0 of the table, and the gradient of the first touched row
    const int64_t* rows;
    const Step* steps;
    Factors factors;
    int64_t count, width;

    // The processor's own prefetch ends with the row and with each page: touch those of the next row. More costs time.
    void look_ahead(int64_t next) const {
#if defined(__GNUC__)
        constexpr int64_t PAGE = 4096 / sizeof(float);
        for (int64_t i = 0; i < width; i += PAGE)
            for (const float* values : {first.p, first.m, first.v}) __builtin_prefetch(values + next + i);
#endif
    }

    void row(int64_t i) const {
        const int64_t offset = rows[i] * width;
        if (i + 1 < count) look_ahead(rows[i + 1] * width);
        const Row row{first.p + offset, first.m + offset, first.v + offset, first.copy ? first.copy + offset : nullptr,
                      first.grad + i * width};
        step_row(row, width, steps[i], factors);
    }
};

INLINE float widen(float value) { return value; }

INLINE float widen(uint16_t bfloat16) {
    const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The sum of the squares of a row, by LANES sums whatever the vector width, so that all machines give the same bits. A
// square of float32 is exact in double and no sum of them overflows: it is finite if and only if all values are.
template <bool KEEP, class From>
INLINE double squares_as(MEMORY(const From) from, MEMORY(float) to, int64_t width) {
    constexpr int64_t LANES = 16;
    double sums[LANES] = {};
    int64_t begin = 0;
    for (; begin + LANES <= width; begin += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const float value = widen(static_cast<From>(from[begin + lane]));
            if (KEEP) to[begin + lane] = value;
            sums[lane] += static_cast<double>(value) * static_cast<double>(value);
        }
    for (int64_t lane = 0; begin + lane < width; ++lane) {
        const float value = widen(static_cast<From>(from[begin + lane]));
        if (KEEP) to[begin + lane] = value;
        sums[lane] += static_cast<double>(value) * static_cast<double>(value);
    }
    double sum = 0.0;
    for (const double one : sums) sum += one;
    return sum;
}

FOR_EACH_VECTOR_WIDTH
double drain_bfloat16(const uint16_t* from, float* to, int64_t width) {
    return squares_as<true, uint16_t>(from, to, width);
}

FOR_EACH_VECTOR_WIDTH
double drain_float(const float* from, float* to, int64_t width) { return squares_as<true, float>(from, to, width); }

FOR_EACH_VECTOR_WIDTH
double squares_float(const float* from, float*, int64_t width) {
    return squares_as<false, float>(from, nullptr, width);
}

// Rows taken at a time.
int64_t piece(int64_t width) { return std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, width)); }

// The sum over rows, added up in their order whatever the number of threads.
template <class From>
double over_rows(double (*row)(const From*, float*, int64_t), const From* from, float* to, int64_t count, int64_t width,
                 int threads) {
    std::vector<double> sums(static_cast<size_t>(count));
    in_pieces(count, piece(width), threads, [&](int64_t first, int64_t end) {
        for (int64_t i = first; i < end; ++i) sums[i] = row(from + i * width, to ? to + i * width : nullptr, width);
    });
    double sum = 0.0;
    for (const double one : sums) sum += one;
    return sum;
}

#include "row_mean.h"

} // namespace

// Changes with the arguments below or with Step, so that a stale build is not called.
EXPORT int meft_row_adamw_version() { return 6; }

// Whether rows ascend, each once, from 0 to limit - 1.
EXPORT int meft_rows_ascend(const int64_t* rows, int64_t count, int64_t limit) {
    int64_t before = -1;
    for (int64_t i = 0; i < count; before = rows[i++])
        if (rows[i] <= before || rows[i] >= limit) return 0;
    return 1;
}

// Row rows[i] takes steps[i] with grads[i] times both factors. Rows must be distinct and in range.
// `compute_copy` (bfloat16) may be null.
EXPORT void meft_row_adamw(float* table, float* exp_avg, float* exp_avg_sq, uint16_t* compute_copy, const float* grads,
                           const int64_t* rows, int64_t count, int64_t width, const float* steps, float first,
                           float second, int threads) {
    static_assert(alignof(Step) == alignof(float), "steps are read in place");
    const Job job{{table, exp_avg, exp_avg_sq, compute_copy, grads}, rows, reinterpret_cast<const Step*>(steps),
                  {first, second}, count, width};
    in_pieces(count, piece(width), threads, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) job.row(i);
    });
}

// Copy rows [count, width] of bfloat16 into float32; returns the sum of the squares.
EXPORT double meft_drain_bfloat16(const uint16_t* from, float* to, int64_t count, int64_t width, int threads) {
    return over_rows(drain_bfloat16, from, to, count, width, threads);
}

// As above, of float32.
EXPORT double meft_drain_float(const float* from, float* to, int64_t count, int64_t width, int threads) {
    return over_rows(drain_float, from, to, count, width, threads);
}

// The sum of the squares of rows [count, width].
EXPORT double meft_squares(const float* from, int64_t count, int64_t width, int threads) {
    return over_rows<float>(squares_float, from, nullptr, count, width, threads);
}

// Of rows [count] those from `from` to `to` - 1: the sum over ranks, in their order, over `divisor`, into out
// [to - from, width]; returns the sum of the squares. masks: [ranks, limit], 1 where a rank has a row; values: of rank k
// those of its rows of `rows`, from values + k stride on.
EXPORT double meft_mean_rows(const uint8_t* masks, int64_t limit, const float* values, int64_t stride, int64_t ranks,
                             const int64_t* rows, int64_t from, int64_t to, int64_t width, float divisor, float* out,
                             int threads) {
    return Mean{masks, values, rows, ranks, limit, stride, from, to, width, divisor}.write(out, threads);
}

#ifdef COUNT_BYTES
// Bytes since the last call.
EXPORT int64_t meft_bytes_counted() { return counted.exchange(0); }
#endif

// AdamW and Adam on scattered rows of a table, and the drain of their gradients, over a plain C interface: no Python or
// torch header, so that one build serves all their versions. Loaded by row_step.py.
//
// Each operation rounds by itself (built with -ffp-contract=off), in the order of adapter_kernels' row_adamw_torch.py:
// both give the same bits, whatever instructions the machine has.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../kernels/adapter_kernels/runtime/helper_threads.h"
#include "narrow_moments.h"
#include "step_values.h"

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

namespace {

// How moments are kept, numbered as in row_step.py.
enum Mode { FLOAT32, BFLOAT16, ROWWISE, FLOAT8 };

// A table and what is kept beside it, from its first row on: null what there is not. P is float or uint16_t (bfloat16).
struct Tensors {
    void *p, *m, *v;
    float *m_scale, *v_scale;
    uint16_t* copy;
};

// Compilers take the pointers to be distinct as parameters, not as fields of a struct.
template <class P, bool COPY>
INLINE void step_float32(P* p, const Tensors& t, int64_t at, uint16_t* copy, const float* grad, int64_t width,
                         const Step& s, const Factors& f, const Key& key) {
    float *m = static_cast<float*>(t.m) + at, *v = static_cast<float*>(t.v) + at;
    const bool coupled = s.coupled != 0.0f, from_grad = s.from_grad != 0.0f;
    if (coupled && from_grad) return step_values<P, COPY, true, true>(p, m, v, copy, grad, width, s, f, key);
    if (coupled) return step_values<P, COPY, true, false>(p, m, v, copy, grad, width, s, f, key);
    if (from_grad) return step_values<P, COPY, false, true>(p, m, v, copy, grad, width, s, f, key);
    step_values<P, COPY, false, false>(p, m, v, copy, grad, width, s, f, key);
}

template <class P, bool COPY>
INLINE void step_as(Mode mode, const Tensors& t, int64_t row, const float* grad, int64_t width, const Step& s,
                    const Factors& f, const Key& key) {
    const int64_t at = row * width, block = row * ((width + BLOCK - 1) / BLOCK);
    P* p = static_cast<P*>(t.p) + at;
    uint16_t *m = static_cast<uint16_t*>(t.m) + at, *copy = COPY ? t.copy + at : nullptr;
    switch (mode) {
    case FLOAT32:
        return step_float32<P, COPY>(p, t, at, copy, grad, width, s, f, key);
    case BFLOAT16:
        return step_bfloat16<P, COPY>(p, m, static_cast<uint16_t*>(t.v) + at, copy, grad, width, s, f, key);
    case ROWWISE:
        return step_rowwise<P, COPY>(p, m, static_cast<float*>(t.v) + row, copy, grad,
                                     mean_square<P>(p, grad, width, s, f), width, s, f, key);
    case FLOAT8:
        return step_float8<P, COPY>(p, static_cast<uint8_t*>(t.m) + at, static_cast<uint8_t*>(t.v) + at,
                                    t.m_scale + block, t.v_scale + block, copy, grad, width, s, f, key);
    }
}

INLINE void step_any(bool half, Mode mode, const Tensors& t, int64_t row, const float* grad, int64_t width,
                     const Step& s, const Factors& f, const Key& key) {
    if (half) return step_as<uint16_t, false>(mode, t, row, grad, width, s, f, key);
    if (t.copy) return step_as<float, true>(mode, t, row, grad, width, s, f, key);
    step_as<float, false>(mode, t, row, grad, width, s, f, key);
}

#define STEP_ROW(name)                                                                                              \
    void name(bool half, Mode mode, const Tensors& t, int64_t row, const float* grad, int64_t width, const Step& s, \
              const Factors& f, const Key& key) {                                                                   \
        step_any(half, mode, t, row, grad, width, s, f, key);                                                       \
    }

STEP_ROW(step_row)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(COUNT_BYTES)
// By hand: a clone has one extension, and loops over values of 16 bits need several.
__attribute__((target("avx2"))) STEP_ROW(step_row_avx2)
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) STEP_ROW(step_row_avx512)
const auto widest_step = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return step_row_avx512;
    return __builtin_cpu_supports("avx2") ? step_row_avx2 : step_row;
}();
#else
const auto widest_step = step_row;
#endif
#undef STEP_ROW

struct Job {
    bool half; // whether the table is bfloat16
    Mode mode;
    Tensors tensors;
    const float* grads;
    const int64_t* rows;
    const Key* keys; // null where nothing is rounded stochastically
    const Step* steps;
    Factors factors;
    int64_t count, width;

    // The processor's own prefetch ends with the row and with each page: touch those of the next row. More costs time.
    void look_ahead(int64_t row) const {
#if defined(__GNUC__)
        constexpr int64_t PAGE = 4096;
        const int64_t own = half ? 2 : 4, first = mode == FLOAT32 ? 4 : mode == FLOAT8 ? 1 : 2;
        const int64_t second = mode == ROWWISE ? 0 : first;
        const struct { const void* start; int64_t size; } all[] = {
            {tensors.p, own * width}, {tensors.m, first * width}, {tensors.v, second * width}};
        for (const auto& one : all)
            for (int64_t i = 0; i < one.size; i += PAGE)
                __builtin_prefetch(static_cast<const char*>(one.start) + row * one.size + i);
#endif
    }

    void row(int64_t i) const {
        if (i + 1 < count) look_ahead(rows[i + 1]);
        widest_step(half, mode, tensors, rows[i], grads + i * width, width, steps[i], factors, keys ? keys[i] : Key{});
    }
};

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

// The sum of each row, which does not depend on the rows beside it.
template <class From>
void over_rows(double (*row)(const From*, float*, int64_t), const From* from, float* to, double* sums, int64_t count,
               int64_t width, int threads) {
    in_pieces(count, piece(width), threads, [&](int64_t first, int64_t end) {
        for (int64_t i = first; i < end; ++i) sums[i] = row(from + i * width, to ? to + i * width : nullptr, width);
    });
}

#include "row_mean.h"

} // namespace

// Changes with the arguments below or with Step, so that a stale build is not called.
EXPORT int meft_row_adamw_version() { return 7; }

// Whether rows ascend, each once, from 0 to limit - 1.
EXPORT int meft_rows_ascend(const int64_t* rows, int64_t count, int64_t limit) {
    int64_t before = -1;
    for (int64_t i = 0; i < count; before = rows[i++])
        if (rows[i] <= before || rows[i] >= limit) return 0;
    return 1;
}

// Row rows[i] takes steps[i] with grads[i] times both factors. Rows must be distinct and in range.
// `half`: whether the table is bfloat16. `keys` may be null with float32 moments of a float32 table, `scales` where the
// mode has none, `compute_copy` (bfloat16) always.
EXPORT void meft_row_adamw(int half, int mode, void* table, void* exp_avg, void* exp_avg_sq, float* exp_avg_scale,
                           float* exp_avg_sq_scale, uint16_t* compute_copy, const float* grads, const int64_t* rows,
                           const void* keys, int64_t count, int64_t width, const float* steps, float first,
                           float second, int threads) {
    static_assert(alignof(Step) == alignof(float), "steps are read in place");
    static_assert(sizeof(Key) == sizeof(int64_t), "keys are read in place");
    const Tensors tensors{table, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, compute_copy};
    const Job job{half != 0, static_cast<Mode>(mode), tensors, grads, rows, static_cast<const Key*>(keys),
                  reinterpret_cast<const Step*>(steps), {first, second}, count, width};
    in_pieces(count, piece(width), threads, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) job.row(i);
    });
}

// Copy rows [count, width] of bfloat16 into float32; `sums` [count] gets the sum of the squares of each row.
EXPORT void meft_drain_bfloat16(const uint16_t* from, float* to, double* sums, int64_t count, int64_t width,
                                int threads) {
    over_rows(drain_bfloat16, from, to, sums, count, width, threads);
}

// As above, of float32.
EXPORT void meft_drain_float(const float* from, float* to, double* sums, int64_t count, int64_t width, int threads) {
    over_rows(drain_float, from, to, sums, count, width, threads);
}

// The sum of the squares of each of the rows [count, width].
EXPORT void meft_squares(const float* from, double* sums, int64_t count, int64_t width, int threads) {
    over_rows<float>(squares_float, from, nullptr, sums, count, width, threads);
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

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
template <class P, bool COPY, class G>
INLINE void step_float32(P* p, const Tensors& t, int64_t at, uint16_t* copy, const G* grad, int64_t width,
                         const Step& s, const Factors& f, const Key& key) {
    float *m = static_cast<float*>(t.m) + at, *v = static_cast<float*>(t.v) + at;
    const bool coupled = s.coupled != 0.0f, from_grad = s.from_grad != 0.0f;
    if (coupled && from_grad) return step_values<P, COPY, true, true, G>(p, m, v, copy, grad, width, s, f, key);
    if (coupled) return step_values<P, COPY, true, false, G>(p, m, v, copy, grad, width, s, f, key);
    if (from_grad) return step_values<P, COPY, false, true, G>(p, m, v, copy, grad, width, s, f, key);
    step_values<P, COPY, false, false, G>(p, m, v, copy, grad, width, s, f, key);
}

template <class P, bool COPY, class G>
INLINE void step_as(Mode mode, const Tensors& t, int64_t row, const G* grad, int64_t width, const Step& s,
                    const Factors& f, const Key& key) {
    const int64_t at = row * width, block = row * ((width + BLOCK - 1) / BLOCK);
    P* p = static_cast<P*>(t.p) + at;
    uint16_t *m = static_cast<uint16_t*>(t.m) + at, *copy = COPY ? t.copy + at : nullptr;
    switch (mode) {
    case FLOAT32:
        return step_float32<P, COPY, G>(p, t, at, copy, grad, width, s, f, key);
    case BFLOAT16:
        return step_bfloat16<P, COPY, G>(p, m, static_cast<uint16_t*>(t.v) + at, copy, grad, width, s, f, key);
    case ROWWISE:
        return step_rowwise<P, COPY, G>(p, m, static_cast<float*>(t.v) + row, copy, grad,
                                     mean_square<P, G>(p, grad, width, s, f), width, s, f, key);
    case FLOAT8:
        return step_float8<P, COPY, G>(p, static_cast<uint8_t*>(t.m) + at, static_cast<uint8_t*>(t.v) + at,
                                    t.m_scale + block, t.v_scale + block, copy, grad, width, s, f, key);
    }
}

template <class G>
INLINE void step_by(bool half, Mode mode, const Tensors& t, int64_t row, const G* grad, int64_t width, const Step& s,
                    const Factors& f, const Key& key) {
    if (half) return step_as<uint16_t, false>(mode, t, row, grad, width, s, f, key);
    if (t.copy) return step_as<float, true>(mode, t, row, grad, width, s, f, key);
    step_as<float, false>(mode, t, row, grad, width, s, f, key);
}

// Whether the table, and whether the gradients, are bfloat16.
struct Halves {
    bool table, grads;
};

#define STEP_ROW(name)                                                                                                \
    void name(Halves half, Mode mode, const Tensors& t, int64_t row, const void* grad, int64_t width, const Step& s,  \
              const Factors& f, const Key& key) {                                                                     \
        if (half.grads)                                                                                               \
            step_by(half.table, mode, t, row, static_cast<const uint16_t*>(grad), width, s, f, key);                  \
        else                                                                                                          \
            step_by(half.table, mode, t, row, static_cast<const float*>(grad), width, s, f, key);                     \
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
    Halves half;
    Mode mode;
    Tensors tensors;
    const void* grads;
    const int64_t* rows;
    const Key* keys; // null where nothing is rounded stochastically
    const Step* steps;
    Factors factors;
    int64_t count, width;

    // The processor's own prefetch ends with the row and with each page: touch those of the next row. More costs time.
    void look_ahead(int64_t row) const {
#if defined(__GNUC__)
        constexpr int64_t PAGE = 4096;
        const int64_t own = half.table ? 2 : 4, first = mode == FLOAT32 ? 4 : mode == FLOAT8 ? 1 : 2;
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
        const void* grad = static_cast<const char*>(grads) + i * width * (half.grads ? 2 : 4);
        widest_step(half, mode, tensors, rows[i], grad, width, steps[i], factors, keys ? keys[i] : Key{});
    }
};

template <class To, class From>
INLINE To as(From value) {
    if constexpr (std::is_same_v<To, From>)
        return value;
    else
        return widen(value);
}

// The sum of the squares of a row, by LANES sums whatever the vector width, so that all machines give the same bits. A
// square of float32 is exact in double and no sum of them overflows: it is finite if and only if all values are. The
// row is copied to `to`, which is wider or as wide, unless that is null.
template <bool KEEP, class From, class To>
INLINE double squares_as(MEMORY(const From) from, MEMORY(To) to, int64_t width) {
    constexpr int64_t LANES = 16;
    double sums[LANES] = {};
    int64_t begin = 0;
    for (; begin + LANES <= width; begin += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const From own = static_cast<From>(from[begin + lane]);
            const float value = widen(own);
            if constexpr (KEEP) to[begin + lane] = as<To>(own);
            sums[lane] += static_cast<double>(value) * static_cast<double>(value);
        }
    for (int64_t lane = 0; begin + lane < width; ++lane) {
        const From own = static_cast<From>(from[begin + lane]);
        const float value = widen(own);
        if constexpr (KEEP) to[begin + lane] = as<To>(own);
        sums[lane] += static_cast<double>(value) * static_cast<double>(value);
    }
    double sum = 0.0;
    for (const double one : sums) sum += one;
    return sum;
}

#define SQUARES(name, KEEP, From, To)                            \
    FOR_EACH_VECTOR_WIDTH                                        \
    double name(const From* from, To* to, int64_t width) {       \
        return squares_as<KEEP, From, To>(from, to, width);      \
    }
SQUARES(widened, true, uint16_t, float)
SQUARES(copied_half, true, uint16_t, uint16_t)
SQUARES(copied, true, float, float)
SQUARES(read_half, false, uint16_t, uint16_t)
SQUARES(read, false, float, float)
#undef SQUARES

// Rows taken at a time.
int64_t piece(int64_t width) { return std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, width)); }

// The sum of each row, which does not depend on the rows beside it.
template <class From, class To>
void over_rows(double (*row)(const From*, To*, int64_t), const void* from, void* to, double* sums, int64_t count,
               int64_t width, int threads) {
    const From* source = static_cast<const From*>(from);
    To* target = static_cast<To*>(to);
    in_pieces(count, piece(width), threads, [&](int64_t first, int64_t end) {
        for (int64_t i = first; i < end; ++i)
            sums[i] = row(source + i * width, target ? target + i * width : nullptr, width);
    });
}

#include "row_mean.h"

} // namespace

// Changes with the arguments below or with Step, so that a stale build is not called.
EXPORT int meft_row_adamw_version() { return 9; }

// Whether rows ascend, each once, from 0 to limit - 1.
EXPORT int meft_rows_ascend(const int64_t* rows, int64_t count, int64_t limit) {
    int64_t before = -1;
    for (int64_t i = 0; i < count; before = rows[i++])
        if (rows[i] <= before || rows[i] >= limit) return 0;
    return 1;
}

// Let updates give way to the work of another library of the same `helper_threads.h` too; `urgent`: its `Urgent`.
EXPORT void meft_give_way_to(void* urgent) { Urgent::used() = static_cast<Urgent*>(urgent); }

// Row rows[i] takes steps[i] with grads[i] times both factors. Rows must be distinct and in range.
// `half`, `half_grads`: whether the table, and the gradients, are bfloat16. `keys` may be null with float32 moments of a
// float32 table, `scales` where the mode has none, `compute_copy` (bfloat16) always.
EXPORT void meft_row_adamw(int half, int half_grads, int mode, void* table, void* exp_avg, void* exp_avg_sq,
                           float* exp_avg_scale, float* exp_avg_sq_scale, uint16_t* compute_copy, const void* grads,
                           const int64_t* rows, const void* keys, int64_t count, int64_t width, const float* steps,
                           float first, float second, int threads) {
    static_assert(alignof(Step) == alignof(float), "steps are read in place");
    static_assert(sizeof(Key) == sizeof(int64_t), "keys are read in place");
    const Tensors tensors{table, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, compute_copy};
    const Halves halves{half != 0, half_grads != 0};
    const Job job{halves, static_cast<Mode>(mode), tensors, grads, rows, static_cast<const Key*>(keys),
                  reinterpret_cast<const Step*>(steps), {first, second}, count, width};
    in_pieces_later(count, piece(width), threads, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) job.row(i);
    });
}

// Copy rows [count, width]; `sums` [count] gets the sum of the squares of each. `half`, `half_to`: whether `from` and
// `to` are bfloat16, else float32; the second only if the first. `to` may be null.
EXPORT void meft_drain(int half, int half_to, const void* from, void* to, double* sums, int64_t count, int64_t width,
                       int threads) {
    if (!to) {
        if (half) return over_rows(read_half, from, to, sums, count, width, threads);
        return over_rows(read, from, to, sums, count, width, threads);
    }
    if (half && half_to) return over_rows(copied_half, from, to, sums, count, width, threads);
    if (half) return over_rows(widened, from, to, sums, count, width, threads);
    over_rows(copied, from, to, sums, count, width, threads);
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

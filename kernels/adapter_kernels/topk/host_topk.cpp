// router_topk, expert_topk, row_union_window, and the three in one call, in host memory, over a plain C interface: no
// Python or torch header, so that one build serves all their versions. Loaded by host_topk.py.
//
// expert_topk is one pass. Pairs of a token and an expert that it probes are grouped by expert. A unit of work is some
// pairs of one expert: its keys are read once, widened piece by piece, and multiplied with all the unit's tokens while
// the piece is in the first cache; what comes next is asked for meanwhile. Then each token's candidates are ranked.
// Nothing depends on the number of threads or on the processor: see host_topk_tiles.h (built with -ffp-contract=off).

#if !defined(__GNUC__)
#error "GCC or Clang is needed, for their vector types; without this library torch operations do its work"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "../runtime/helper_threads.h"

#define RESTRICT __restrict__

namespace {

constexpr int64_t CHUNK = 256;      // values of a row at a time: some keys' are in the first cache, widened
constexpr int64_t UNIT = 32;        // pairs of a unit at most: their tokens' values are in the second cache
constexpr int64_t ALONE = 1 << 18;  // products below which waking another thread takes longer

// A thread's own memory, kept for its next call.
struct Scratch {
    alignas(64) float keys[4 * CHUNK], x[UNIT * 16], sums[UNIT * 4 * 16];

    static Scratch& mine() {
        thread_local Scratch scratch;
        return scratch;
    }
};

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

inline __attribute__((always_inline)) float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline __attribute__((always_inline)) float wide(float value) { return value; }
inline __attribute__((always_inline)) float wide(BFloat16 value) { return as_float(uint32_t{value.bits} << 16); }
inline __attribute__((always_inline)) float wide(Half value) {
    const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, rest = value.bits & 0x7fffu;
    float size = as_float(rest << 13) * 0x1p112f; // exact; subnormals become normal
    uint32_t bits;
    std::memcpy(&bits, &size, sizeof bits);
    return as_float(sign | (rest >= 0x7c00u ? 0x7f800000u | rest << 13 : bits));
}

// Rows that are needed next: one after the other is asked for, while others are multiplied.
struct Ahead {
    const char* at;
    int64_t bytes, apart, rows;

    inline __attribute__((always_inline)) void next() {
        if (!rows) return;
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
        at += apart, --rows;
    }
};

// The 16 sums of a dot, in halves: one order on every machine.
inline __attribute__((always_inline)) float total(const float* sums) {
    float s[8];
    for (int i = 0; i < 8; ++i) s[i] = sums[i] + sums[i + 8];
    for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
}

#define LEVEL plain
#define TARGET
#define LANES 4
#define KEYS 2
#include "host_topk_tiles.h"

#if defined(__x86_64__)
#define LEVEL avx2
#define TARGET __attribute__((target("avx2")))
#define LANES 8
#define KEYS 2
#include "host_topk_tiles.h"

#define LEVEL avx512
#define TARGET __attribute__((target("avx512f")))
#define LANES 16
#define KEYS 4
#include "host_topk_tiles.h"
#endif

enum { PLAIN, AVX2, AVX512 };

int best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return AVX512;
    if (__builtin_cpu_supports("avx2")) return AVX2;
#endif
    return PLAIN;
}

template <class Narrow>
void block_at(int level, const float* const* x, int64_t count, const Narrow* keys, int64_t n, int64_t d,
              Scratch& scratch, float** products) {
#if defined(__x86_64__)
    if (level == AVX512) return avx512::block(x, count, keys, n, d, scratch, products);
    if (level == AVX2) return avx2::block(x, count, keys, n, d, scratch, products);
#endif
    plain::block(x, count, keys, n, d, scratch, products);
}

#include "host_topk_job.h"

// Floats in their order, NaN above all, -0.0 as 0.0; of equal ones the lower index comes first in descending order.
uint64_t descending(float value, int64_t index) {
    value += 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t order = value != value ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t{order} << 32 | static_cast<uint32_t>(~index);
}

void router_topk(const float* logits, int64_t T, int64_t E, int64_t P, int32_t* experts, int threads) {
    in_pieces(T, 64, T * E < ALONE ? 1 : threads, [&](int64_t from, int64_t to) {
        std::vector<uint64_t> order(E);
        for (; from < to; ++from) {
            for (int64_t e = 0; e < E; ++e) order[e] = descending(logits[from * E + e], e);
            std::partial_sort(order.begin(), order.begin() + P, order.end(), std::greater<>());
            for (int64_t p = 0; p < P; ++p) experts[from * P + p] = static_cast<int32_t>(~order[p]);
        }
    });
}

void run(Job& job, int key_type, int threads) {
    if (key_type == 0)
        job.run<float>(threads);
    else if (key_type == 1)
        job.run<BFloat16>(threads);
    else
        job.run<Half>(threads);
}

} // namespace

// Changes with the arguments below, so that a stale build is not called.
EXPORT int host_topk_version() { return 4; }

// Where it is counted that this library is at work, for another one that gives way to it.
EXPORT void* host_topk_urgent() { return Urgent::used(); }

// The highest `level` of instructions that this machine has: 0, 1 (AVX2) or 2 (AVX-512).
EXPORT int host_topk_levels() { return best_level(); }

// The columns of the P largest of each row of `logits`, [T, E].
EXPORT void host_router_topk(const float* logits, int64_t T, int64_t E, int64_t P, int32_t* experts, int threads) {
    router_topk(logits, T, E, P, experts, threads);
}

// `keys`: float32, bfloat16 or float16 for key_type 0, 1, 2. `products`: room for [T, P, each]. `level`: at most the
// highest; -1: that.
EXPORT void host_expert_topk(const float* x, const void* keys, int key_type, const int32_t* experts,
                            const float* factors, int64_t T, int64_t d, int64_t E, int64_t each, int64_t P, int64_t K,
                            int by_neuron, float* products, int32_t* ids, float* scores, float* dots, int level,
                            int threads) {
    const Urgent::Scope scope; // of what is between the loops too
    static const int best = best_level();
    Job job{x, keys, experts, factors, T, d, E, each, P, K, by_neuron != 0, products, ids, scores, dots,
            level < 0 ? best : std::min(level, best), {}, {}, {}, {}};
    run(job, key_type, threads);
}

// row_union_window of `ids`, [n]: `rows` has room for `capacity`, `places` for r. `load` ([r / each], or null) gets the
// picks of each group of `each` rows added. Returns the size of the whole union.
EXPORT int64_t host_row_union(const int32_t* ids, int64_t n, int64_t r, int64_t each, int64_t start, int64_t capacity,
                              int64_t* load, int32_t* places, int32_t* rows, int32_t* position) {
    std::fill_n(places, r, -1);
    for (int64_t i = 0; i < n; ++i) {
        if (ids[i] < 0 || ids[i] >= r) continue;
        places[ids[i]] = 0;
        if (load) ++load[ids[i] / each];
    }
    int64_t count = 0;
    for (int64_t row = 0; row < r; ++row) {
        if (places[row] < 0) continue;
        const int64_t place = count++ - start;
        const bool inside = place >= 0 && place < capacity;
        places[row] = inside ? static_cast<int32_t>(place) : -1;
        if (inside) rows[place] = static_cast<int32_t>(row);
    }
    for (int64_t i = std::max<int64_t>(0, count - start); i < capacity; ++i) rows[i] = -1;
    for (int64_t i = 0; i < n; ++i) position[i] = ids[i] >= 0 && ids[i] < r ? places[ids[i]] : -1;
    return count;
}

// The three in one call. `logits`: [T, E]; `factor`: whether scores carry them. `rows`: room for the smaller of E each
// and T K; the part past the union is filled with -1. `load`, `load_each`: as `load`
// and `each` above.
EXPORT int64_t host_select_rows(const float* x, const float* logits, const void* keys, int key_type, int64_t T,
                                int64_t d, int64_t E, int64_t each, int64_t P, int64_t K, int factor, int64_t* load,
                                int64_t load_each, int32_t* ids, float* scores, float* dots, int32_t* rows, int32_t* position,
                                int threads) {
    const Urgent::Scope scope;
    const auto memory = [](auto one, int64_t n) { return std::unique_ptr<decltype(one)[]>(new decltype(one)[n]); };
    const auto probed = memory(int32_t{}, T * P), places = memory(int32_t{}, E * each);
    const auto factors = memory(float{}, factor ? T * P : 0), products = memory(float{}, T * P * each);
    router_topk(logits, T, E, P, probed.get(), threads);
    for (int64_t i = 0; factor && i < T * P; ++i) factors[i] = logits[i / P * E + probed[i]];
    host_expert_topk(x, keys, key_type, probed.get(), factor ? factors.get() : nullptr, T, d, E, each, P, K, 0,
                     products.get(), ids, scores, dots, -1, threads);
    return host_row_union(ids, T * K, E * each, load_each, 0, std::min(E * each, T * K), load, places.get(), rows,
                          position);
}

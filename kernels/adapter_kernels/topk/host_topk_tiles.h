// Dot products of tokens and keys for one level of instructions; host_topk.cpp includes this once a level, with
//   LEVEL    a namespace
//   TARGET   the attribute that lets a function use the level's instructions
//   LANES    floats of a register, a divisor of 16
//   KEYS     of a tile, 2 or 4, beside 4 tokens: as many as keep its sums in registers
//
// Each level gives the same bits. A dot has 16 sums, the i-th of the products i, i + 16, i + 32, ..., added in that
// order, and each multiplication and addition rounds by itself; how many of the sums are in one register is all that
// differs.

namespace LEVEL {

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

TARGET inline __attribute__((always_inline)) Vector load(const float* from) {
    return *reinterpret_cast<const Unaligned*>(from);
}

// sums[m][n][0 to 15] += the products of x[m] and keys[n] from `from` on; `width` values, a multiple of 16.
template <int M, int N>
TARGET void tile(const float* const* x, int64_t from, const float* keys, int64_t apart, int64_t width, float* sums) {
    const float* token[M];
    for (int m = 0; m < M; ++m) token[m] = x[m] + from;
    for (int lane = 0; lane < 16; lane += LANES) {
        Vector sum[M][N];
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) sum[m][n] = load(sums + (m * N + n) * 16 + lane);
        for (int64_t i = lane; i < width; i += 16) {
            Vector key[N];
            for (int n = 0; n < N; ++n) key[n] = load(keys + n * apart + i);
            for (int m = 0; m < M; ++m) {
                const Vector value = load(token[m] + i);
                for (int n = 0; n < N; ++n) sum[m][n] += value * key[n];
            }
        }
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) *reinterpret_cast<Unaligned*>(sums + (m * N + n) * 16 + lane) = sum[m][n];
    }
}

// The same for any number of tokens. Meanwhile `ahead` comes into the cache.
template <int N>
TARGET void tiles(const float* const* x, int64_t count, int64_t from, const float* keys, int64_t apart, int64_t width,
                  float* sums, Ahead ahead) {
    for (; count >= 4; count -= 4, x += 4, sums += 4 * N * 16) {
        ahead.next();
        tile<4, N>(x, from, keys, apart, width, sums);
    }
    while (ahead.rows) ahead.next();
    if (count >= 2) {
        tile<2, N>(x, from, keys, apart, width, sums);
        count -= 2, x += 2, sums += 2 * N * 16;
    }
    if (count) tile<1, N>(x, from, keys, apart, width, sums);
}

// To float, exactly.
template <class Narrow>
TARGET void widen(const Narrow* RESTRICT from, int64_t count, float* RESTRICT to) {
    for (int64_t i = 0; i < count; ++i) to[i] = wide(from[i]);
}

// products[i][n] of all tokens and N keys.
template <int N, class Narrow>
TARGET void some_keys(const float* const* x, int64_t count, const Narrow* keys, int64_t d, Scratch& scratch,
                      float* const* products) {
    std::memset(scratch.sums, 0, sizeof(float) * 16 * N * count);
    constexpr int64_t SIZE = sizeof(Narrow);
    const int64_t whole = d / 16 * 16;
    for (int64_t from = 0; from < whole; from += CHUNK) {
        const int64_t width = std::min<int64_t>(CHUNK, whole - from);
        const int64_t next = from + width < whole ? from + width : N * d; // of these rows, or those that follow
        const Ahead ahead{reinterpret_cast<const char*>(keys + next), CHUNK * SIZE, d * SIZE, N};
        if constexpr (std::is_same_v<Narrow, float>) {
            tiles<N>(x, count, from, keys + from, d, width, scratch.sums, ahead);
        } else {
            for (int n = 0; n < N; ++n) widen(keys + n * d + from, width, scratch.keys + n * CHUNK);
            tiles<N>(x, count, from, scratch.keys, CHUNK, width, scratch.sums, ahead);
        }
    }
    if (whole < d) { // the rest, with zeros up to 16
        const float* rest[UNIT];
        std::memset(scratch.keys, 0, sizeof(float) * 16 * N);
        std::memset(scratch.x, 0, sizeof(float) * 16 * count);
        for (int n = 0; n < N; ++n) widen(keys + n * d + whole, d - whole, scratch.keys + n * 16);
        for (int64_t i = 0; i < count; ++i) {
            rest[i] = scratch.x + i * 16;
            widen(x[i] + whole, d - whole, scratch.x + i * 16);
        }
        tiles<N>(rest, count, 0, scratch.keys, 16, 16, scratch.sums, Ahead{nullptr, 0, 0, 0});
    }
    for (int64_t i = 0; i < count; ++i)
        for (int n = 0; n < N; ++n) products[i][n] = total(scratch.sums + (i * N + n) * 16);
}

// products[i][k] = x[i] . keys[k] for up to UNIT tokens and `n` keys.
template <class Narrow>
TARGET void block(const float* const* x, int64_t count, const Narrow* keys, int64_t n, int64_t d, Scratch& scratch,
                  float** products) {
    const auto on = [&](int64_t done) {
        keys += done * d, n -= done;
        for (int64_t i = 0; i < count; ++i) products[i] += done;
    };
    for (; n >= KEYS; on(KEYS)) some_keys<KEYS>(x, count, keys, d, scratch, products);
    for (; n; on(1)) some_keys<1>(x, count, keys, d, scratch, products);
}

} // namespace LEVEL

#undef LEVEL
#undef TARGET
#undef LANES
#undef KEYS

// One call of expert_topk: its pairs by expert, their products, and each token's picks. Included by host_topk.cpp, inside
// of its namespace.

struct Job {
    const float* x;         // [T, d]
    const void* keys;       // [E each, d]
    const int32_t* experts; // [T, P]
    const float* factors;   // [T, P] or null
    int64_t T, d, E, each, P, K;
    bool by_neuron;
    float* products; // [T, P, each], in the ascending order of a token's experts
    int32_t* ids;    // [T, K]
    float *scores, *dots;
    int level;

    std::vector<int32_t> expert, slot; // [T, P]: a token's experts in ascending order, none as E; and their columns
    std::vector<int64_t> pairs;        // t P + p of the above, by expert
    struct Unit {
        int64_t expert, from, to; // of `pairs`
    };
    std::vector<Unit> units;

    void group() {
        expert.resize(T * P), slot.resize(T * P), pairs.resize(T * P);
        std::vector<int64_t> start(E + 2, 0);
        for (int64_t t = 0; t < T; ++t) {
            const int32_t* const given = experts + t * P;
            const auto of = [&](int32_t p) { return static_cast<int32_t>(given[p] >= 0 && given[p] < E ? given[p] : E); };
            int32_t* const mine = slot.data() + t * P;
            for (int32_t p = 0; p < P; ++p) mine[p] = p;
            std::stable_sort(mine, mine + P, [&](int32_t a, int32_t b) { return of(a) < of(b); });
            for (int64_t p = 0; p < P; ++p) ++start[(expert[t * P + p] = of(mine[p])) + 1];
        }
        for (int64_t e = 0; e <= E; ++e) start[e + 1] += start[e];
        for (int64_t e = 0; e < E; ++e)
            for (int64_t from = start[e]; from < start[e + 1]; from += UNIT)
                units.push_back({e, from, std::min(from + UNIT, start[e + 1])});
        for (int64_t i = 0; i < T * P; ++i) pairs[start[expert[i]]++] = i;
    }

    template <class Narrow>
    void multiply(const Unit& unit, Scratch& scratch) const {
        const int64_t count = unit.to - unit.from;
        const float* token[UNIT];
        float* product[UNIT];
        for (int64_t i = 0; i < count; ++i) {
            const int64_t pair = pairs[unit.from + i];
            token[i] = x + pair / P * d;
            product[i] = products + pair * each;
        }
        const Narrow* const own = static_cast<const Narrow*>(keys) + unit.expert * each * d;
        block_at(level, token, count, own, each, d, scratch, product);
    }

    // `ranked` has room for P each.
    void pick(int64_t t, uint64_t* ranked) const {
        const int64_t candidates = P * each, n = std::min(K, candidates);
        const float* const product = products + t * candidates;
        int64_t at = 0;
        for (int64_t p = 0; p < P; ++p) {
            const bool there = expert[t * P + p] < E;
            const float factor = factors ? factors[t * P + slot[t * P + p]] : 1.0f;
            for (int64_t j = 0; j < each; ++j, ++at) {
                const float score = there ? (factors ? factor * product[at] : product[at]) : 0.0f;
                // Positive floats are ordered as their bits; what is not positive, NaN too, counts as zero.
                uint32_t bits;
                std::memcpy(&bits, &score, sizeof bits);
                ranked[at] = uint64_t{score > 0.0f ? bits : 0u} << 32 | static_cast<uint32_t>(~at);
            }
        }
        const auto write = [&](int64_t i, uint64_t one) {
            const int64_t candidate = static_cast<uint32_t>(~one);
            const float score = as_float(static_cast<uint32_t>(one >> 32));
            const bool used = score > 0.0f;
            ids[t * K + i] = used ? expert[t * P + candidate / each] * each + candidate % each : -1;
            scores[t * K + i] = score;
            dots[t * K + i] = used ? product[candidate] : 0.0f;
        };
        if (by_neuron) {
            uint64_t least = 0;
            if (n < candidates) {
                std::vector<uint64_t> order(ranked, ranked + candidates);
                std::nth_element(order.begin(), order.begin() + n - 1, order.end(), std::greater<>());
                least = order[n - 1];
            }
            for (int64_t c = 0, i = 0; c < candidates; ++c)
                if (ranked[c] >= least) write(i++, ranked[c]);
        } else {
            if (n < candidates) std::nth_element(ranked, ranked + n - 1, ranked + candidates, std::greater<>());
            std::sort(ranked, ranked + n, std::greater<>());
            for (int64_t i = 0; i < n; ++i) write(i, ranked[i]);
        }
        for (int64_t i = n; i < K; ++i) ids[t * K + i] = -1, scores[t * K + i] = dots[t * K + i] = 0.0f;
    }

    template <class Narrow>
    void run(int64_t threads) {
        group();
        if (T * P * each * d < ALONE) threads = 1;
        in_pieces(static_cast<int64_t>(units.size()), 1, threads, [&](int64_t from, int64_t to) {
            for (; from < to; ++from) multiply<Narrow>(units[from], Scratch::mine());
        });
        in_pieces(T, 16, threads, [&](int64_t from, int64_t to) {
            std::vector<uint64_t> ranked(P * each);
            for (; from < to; ++from) pick(from, ranked.data());
        });
    }
};

// The mean over ranks of gradients of which each rank has some rows. Included by row_adamw.cpp, inside of its namespace.

// The sum of `count` rows, in their order, over `divisor`; returns the sum of the squares, as `squares_as` adds them up.
FOR_EACH_VECTOR_WIDTH
double mean_row(const float* const* from, int64_t count, float divisor, float* RESTRICT to, int64_t width) {
    constexpr int64_t LANES = 16;
    double sums[LANES] = {};
    const auto lanes = [&](int64_t begin, int64_t n) {
        float total[LANES];
        for (int64_t lane = 0; lane < n; ++lane) total[lane] = from[0][begin + lane];
        for (int64_t i = 1; i < count; ++i)
            for (int64_t lane = 0; lane < n; ++lane) total[lane] += from[i][begin + lane];
        for (int64_t lane = 0; lane < n; ++lane) {
            const float value = total[lane] / divisor;
            to[begin + lane] = value;
            sums[lane] += static_cast<double>(value) * static_cast<double>(value);
        }
    };
    int64_t begin = 0;
    for (; begin + LANES <= width; begin += LANES) lanes(begin, LANES);
    lanes(begin, width - begin);
    double sum = 0.0;
    for (const double one : sums) sum += one;
    return sum;
}

struct Mean {
    const uint8_t* masks; // [ranks, limit]: whether a rank has a row
    const float* values;  // of rank k those of its rows, ascending, from values + k stride on
    const int64_t* rows;  // [count], of which those from `from` to `to` - 1 are taken
    int64_t ranks, limit, stride, from, to, width;
    float divisor;

    // Of each row that is taken the places of its values, those of the first rank first; where each row's begin.
    void find(std::vector<const float*>& places, std::vector<int64_t>& starts) const {
        std::vector<const float*> next(static_cast<size_t>(ranks));
        for (int64_t k = 0; k < ranks; ++k) {
            int64_t before = 0;
            for (int64_t i = 0; i < from; ++i) before += masks[k * limit + rows[i]];
            next[k] = values + k * stride + before * width;
        }
        for (int64_t i = from; i < to; ++i) {
            starts.push_back(static_cast<int64_t>(places.size()));
            for (int64_t k = 0; k < ranks; ++k)
                if (masks[k * limit + rows[i]]) {
                    places.push_back(next[k]);
                    next[k] += width;
                }
        }
        starts.push_back(static_cast<int64_t>(places.size()));
    }

    double write(float* out, int threads) const {
        std::vector<const float*> places;
        std::vector<int64_t> starts;
        find(places, starts);
        std::vector<double> sums(static_cast<size_t>(to - from));
        in_pieces(to - from, piece(width), threads, [&](int64_t first, int64_t end) {
            for (int64_t i = first; i < end; ++i) {
                const int64_t found = starts[i + 1] - starts[i];
                if (found)
                    sums[i] = mean_row(places.data() + starts[i], found, divisor, out + i * width, width);
                else // another node's
                    std::fill(out + i * width, out + (i + 1) * width, 0.0f);
            }
        });
        double sum = 0.0;
        for (const double one : sums) sum += one;
        return sum;
    }
};

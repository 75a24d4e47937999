// Steps of a row's values whose moments are narrower than float32. Included by row_adamw.cpp.
//
// A step is computed in float32 from the moments that are read, and limited to what exact moments allow. New moments are
// rounded stochastically: to the nearest, a second moment of a long memory would never move from one code to the next.

#ifndef MEFT_NARROW_MOMENTS_H
#define MEFT_NARROW_MOMENTS_H

#include <algorithm>

#include "step_values.h"

namespace {

// Noise for a second and a third value of a column, 16 bits each, from that of the master, which takes the low half.
INLINE uint32_t second_noise(uint32_t noise) { return noise >> 16; }
INLINE uint32_t third_noise(uint32_t noise) { return (noise * 0x2C1B3C6Du) >> 16; }

// A change of a master, no larger than the limit; NaN stays NaN.
INLINE float limited(float step, float limit) {
    step = step > limit ? limit : step;
    return step < -limit ? -limit : step;
}

// The gradient of a value and its first moment, as all narrow modes make them; the scalars stay in registers.
struct Rule {
    float mix, coupled, first, second;
    bool couples, from_grad;

    INLINE Rule(const Step& s, const Factors& f)
        : mix(s.mix), coupled(s.coupled), first(f.first), second(f.second), couples(s.coupled != 0.0f),
          from_grad(s.from_grad != 0.0f) {}

    INLINE float gradient(float grad, float p_old) const {
        const float own = (grad * first) * second, both = own + coupled * p_old;
        return couples ? both : own;
    }

    INLINE float first_moment(float m_old, float g) const { return (from_grad ? g : m_old) + mix * (g - m_old); }
};

template <class P, bool COPY, class G>
INLINE void step_bfloat16(MEMORY(P) p, MEMORY(uint16_t) m, MEMORY(uint16_t) v, MEMORY(uint16_t) copy,
                          MEMORY(const G) grad, int64_t width, const Step& s, const Factors& f, const Key& k) {
    const float beta2 = s.beta2, fresh2 = s.fresh2, eps = s.eps, decay = s.decay, limit = s.limit;
    const float step_size = s.step_size, inverse2 = s.inverse2;
    const Rule rule(s, f);
    const Key key = k;
    for (int64_t i = 0; i < width; ++i) {
        const float p_old = widen(static_cast<P>(p[i])), m_old = widen(static_cast<uint16_t>(m[i]));
        const float g = rule.gradient(widen(static_cast<G>(grad[i])), p_old), m_new = rule.first_moment(m_old, g);
        const float v_new = widen(static_cast<uint16_t>(v[i])) * beta2 + (fresh2 * g) * g;
        const float step = limited((m_new * step_size) / (std::sqrt(v_new) * inverse2 + eps), limit);
        const float p_new = p_old * decay - step;
        const uint32_t noise = noise_of(key, static_cast<uint32_t>(i));
        m[i] = narrow_stochastically(m_new, second_noise(noise));
        v[i] = narrow_stochastically(v_new, third_noise(noise));
        p[i] = master_of<P>(p_new, key, i);
        if (COPY) copy[i] = narrow(p_new);
    }
}

// The mean of the squares of a row's gradients, by LANES sums whatever the vector width.
template <class P, class G>
INLINE float mean_square(MEMORY(const P) p, MEMORY(const G) grad, int64_t width, const Step& s, const Factors& f) {
    constexpr int64_t LANES = 64;
    const float coupled = s.coupled, first = f.first, second = f.second;
    float sums[LANES] = {};
    for (int64_t begin = 0; begin < width; begin += LANES) {
        const int64_t count = std::min(LANES, width - begin);
        const auto add = [&](int64_t lanes) {
            for (int64_t lane = 0; lane < lanes; ++lane) {
                float g = (widen(static_cast<G>(grad[begin + lane])) * first) * second;
                if (coupled != 0.0f) g = g + coupled * widen(static_cast<P>(p[begin + lane]));
                sums[lane] += g * g;
            }
        };
        if (count == LANES)
            add(LANES);
        else
            add(count);
    }
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0] / static_cast<float>(width);
}

// One second moment a row, of the mean square of its gradients. They are read twice, the second time from the cache.
template <class P, bool COPY, class G>
INLINE void step_rowwise(MEMORY(P) p, MEMORY(uint16_t) m, MEMORY(float) v, MEMORY(uint16_t) copy,
                         const G* RESTRICT grad, float squares, int64_t width, const Step& s, const Factors& f,
                         const Key& k) {
    const float v_new = v[0] * s.beta2 + s.fresh2 * squares;
    v[0] = v_new;
    const float rate = s.step_size / (std::sqrt(v_new) * s.inverse2 + s.eps);
    const float decay = s.decay, limit = s.limit;
    const Rule rule(s, f);
    const Key key = k;
    for (int64_t i = 0; i < width; ++i) {
        const float p_old = widen(static_cast<P>(p[i])), m_old = widen(static_cast<uint16_t>(m[i]));
        const float g = rule.gradient(widen(static_cast<G>(grad[i])), p_old), m_new = rule.first_moment(m_old, g);
        const float p_new = p_old * decay - limited(m_new * rate, limit);
        const uint32_t noise = noise_of(key, static_cast<uint32_t>(i));
        m[i] = narrow_stochastically(m_new, second_noise(noise));
        p[i] = master_of<P>(p_new, key, i);
        if (COPY) copy[i] = narrow(p_new);
    }
}

// Codes of 8 bits are floating-point numbers with subnormals, here in units of the smallest one. Below 2^(1 + mantissa)
// units they are whole numbers; `FIRST`, 2^mantissa, is the first normal one. Adding it to a smaller value gives a float
// whose leading mantissa bits count units, as those of a normal one do.
template <uint32_t MANTISSA>
struct Code {
    static constexpr uint32_t NORMAL = 1u << MANTISSA, SHIFT = 23u - MANTISSA;
    static constexpr uint32_t OFFSET = (127u + MANTISSA) << 23; // bits of the float FIRST
    static constexpr float FIRST = static_cast<float>(NORMAL);

    // Of a value from 0 to the largest; `noise` has 16 bits.
    static INLINE uint32_t encode(float units, uint32_t noise) {
        const bool small = units < FIRST;
        const uint32_t bits = bits_of(small ? units + FIRST : units) + (noise << (SHIFT - 16u));
        return ((bits - OFFSET) >> SHIFT) + (small ? 0u : NORMAL);
    }

    static INLINE float decode(uint32_t code) {
        const bool small = code < NORMAL;
        const float value = float_of(((small ? code : code - NORMAL) << SHIFT) + OFFSET);
        return small ? value - FIRST : value;
    }
};
using First = Code<3>;                    // with a sign bit: e4m3, the largest is 448
using Root = Code<4>;                     // without a sign, and a bit more of mantissa
constexpr float MOST_FIRST = 229376.0f;   // 448 in units of 2^-9
constexpr float MOST_ROOT = 507904.0f;    // 31 * 2^14
constexpr float UNIT_FIRST = 0.001953125f; // 2^-9
constexpr int32_t LEAST = (127 - 100) << 23; // bits of 2^-100: blocks without larger values are zero
constexpr int64_t BLOCK = 256;

// Of a block whose largest value has these bits: its scale, the factor from values to units, and what its codes keep. A
// block with a value that is not finite has no codes, and NaN as its scale.
struct Scale {
    float kept = 0.0f, factor = 0.0f;
    uint32_t mask = 0xffu;
    Scale(int32_t largest, float most, float most_units) {
        if (largest >= 0x7f800000) {
            kept = float_of(0x7fc00000u);
            mask = 0u;
        } else if (largest >= LEAST) {
            kept = float_of(largest) / most;
            factor = most_units / float_of(largest);
        }
    }
};

// Both moments of a row in codes of 8 bits, the second by its root, in blocks of 256 values with a scale each.
template <class P, bool COPY, class G>
INLINE void step_float8(MEMORY(P) p, MEMORY(uint8_t) m, MEMORY(uint8_t) v, MEMORY(float) m_scale, MEMORY(float) v_scale,
                        MEMORY(uint16_t) copy, MEMORY(const G) grad, int64_t width, const Step& s, const Factors& f,
                        const Key& k) {
    const float beta2 = s.beta2, fresh2 = s.fresh2, eps = s.eps, decay = s.decay, limit = s.limit;
    const float step_size = s.step_size, inverse2 = s.inverse2;
    const Rule rule(s, f);
    const Key key = k;
    // Loops over values of 32 bits alone, between those that widen and narrow them, keep a vector of each in a register.
    float masters[BLOCK], grads[BLOCK], moments[BLOCK], roots[BLOCK];
    uint32_t m_codes[BLOCK], v_codes[BLOCK], noises[BLOCK];
    for (int64_t begin = 0, block = 0; begin < width; begin += BLOCK, ++block) {
        const int64_t count = std::min(BLOCK, width - begin);
        for (int64_t j = 0; j < count; ++j) masters[j] = widen(static_cast<P>(p[begin + j]));
        for (int64_t j = 0; j < count; ++j) grads[j] = widen(static_cast<G>(grad[begin + j]));
        for (int64_t j = 0; j < count; ++j) m_codes[j] = static_cast<uint8_t>(m[begin + j]);
        for (int64_t j = 0; j < count; ++j) v_codes[j] = static_cast<uint8_t>(v[begin + j]);
        const float m_unit = m_scale[block] * UNIT_FIRST, v_unit = v_scale[block];
        int32_t m_largest = 0, v_largest = 0;
        for (int64_t j = 0; j < count; ++j) {
            const float size = First::decode(m_codes[j] & 0x7fu), root_old = Root::decode(v_codes[j]) * v_unit;
            const float m_old = float_of(bits_of(size) | (m_codes[j] & 0x80u) << 24) * m_unit;
            const float g = rule.gradient(grads[j], masters[j]), m_new = rule.first_moment(m_old, g);
            const float root = std::sqrt((root_old * root_old) * beta2 + (fresh2 * g) * g);
            masters[j] = masters[j] * decay - limited((m_new * step_size) / (root * inverse2 + eps), limit);
            moments[j] = m_new;
            roots[j] = root;
            noises[j] = noise_of(key, static_cast<uint32_t>(begin + j));
            m_largest = std::max(m_largest, static_cast<int32_t>(bits_of(m_new) & 0x7fffffffu));
            v_largest = std::max(v_largest, static_cast<int32_t>(bits_of(root) & 0x7fffffffu));
        }
        for (int64_t j = 0; j < count; ++j) {
            if constexpr (std::is_same_v<P, float>)
                p[begin + j] = masters[j];
            else
                p[begin + j] = narrow_stochastically(masters[j], noises[j] & 0xffffu);
            if (COPY) copy[begin + j] = narrow(masters[j]);
        }
        const Scale m_new(m_largest, 448.0f, MOST_FIRST), v_new(v_largest, MOST_ROOT, MOST_ROOT);
        m_scale[block] = m_new.kept;
        v_scale[block] = v_new.kept;
        for (int64_t j = 0; j < count; ++j) {
            const uint32_t bits = bits_of(moments[j]);
            const float units = std::min(float_of(bits & 0x7fffffffu) * m_new.factor, MOST_FIRST);
            m_codes[j] = (First::encode(units, second_noise(noises[j])) | ((bits >> 24) & 0x80u)) & m_new.mask;
        }
        for (int64_t j = 0; j < count; ++j) {
            const float units = std::min(roots[j] * v_new.factor, MOST_ROOT);
            // What is not zero has no code of zero, by which a first moment would be divided.
            const uint32_t least = roots[j] > 0.0f ? 1u : 0u;
            v_codes[j] = std::max(Root::encode(units, third_noise(noises[j])), least) & v_new.mask;
        }
        for (int64_t j = 0; j < count; ++j) m[begin + j] = static_cast<uint8_t>(m_codes[j]);
        for (int64_t j = 0; j < count; ++j) v[begin + j] = static_cast<uint8_t>(v_codes[j]);
    }
}

} // namespace

#endif

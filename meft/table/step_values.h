// One AdamW or Adam step of a row's values with float32 moments, and what the steps of all modes share. Included by
// row_adamw.cpp.

#ifndef MEFT_STEP_VALUES_H
#define MEFT_STEP_VALUES_H

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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
    float inverse2;  // 1 / sqrt(1 - beta2^n), of the narrow modes, as the next
    float limit;     // the largest step that exact moments allow
};
static_assert(sizeof(Step) == 11 * sizeof(float), "Step is passed as eleven floats");

// What gradients are multiplied by as they are read, one after the other; 1 changes no bit.
struct Factors {
    float first, second;
};

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float widen(float value) { return value; }

INLINE float widen(uint16_t bfloat16) { return float_of(static_cast<uint32_t>(bfloat16) << 16); }

// float32 to bfloat16, to the nearest, ties to even; NaN stays NaN.
INLINE uint16_t narrow(float value) {
    const uint32_t bits = bits_of(value), nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest);
}

// The key of a row's noise, of which stochastic_rounding.py makes both halves, and the noise of one of its columns.
struct Key {
    uint32_t low, high;
};

INLINE uint32_t noise_of(const Key& key, uint32_t column) {
    uint32_t x = key.low + column * 0x9E3779B1u;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15) ^ key.high) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

// float32 to bfloat16, up or down with the probabilities that keep the mean; `noise` has 16 bits. What is not finite is
// cut off: the NaN of an operation has its first bit set.
INLINE uint16_t narrow_stochastically(float value, uint32_t noise) {
    const uint32_t bits = bits_of(value);
    return static_cast<uint16_t>((bits + ((bits & 0x7fffffffu) < 0x7f800000u ? noise : 0u)) >> 16);
}

// A master as it is written: as it is, or rounded by the low half of the noise.
template <class P>
INLINE P master_of(float value, const Key& key, int64_t column) {
    if constexpr (std::is_same_v<P, float>)
        return value;
    else
        return narrow_stochastically(value, noise_of(key, static_cast<uint32_t>(column)) & 0xffffu);
}

template <class P, bool COPY, bool COUPLED, bool FROM_GRAD, class G>
INLINE void step_values(MEMORY(P) p, MEMORY(float) m, MEMORY(float) v, MEMORY(uint16_t) copy, MEMORY(const G) grad,
                        int64_t width, const Step& s, const Factors& f, const Key& k) {
    const float mix = s.mix, beta2 = s.beta2, fresh2 = s.fresh2, eps = s.eps, decay = s.decay;
    const float coupled = s.coupled, step_size = s.step_size, root2 = s.root2;
    const float first = f.first, second = f.second;
    const Key key = k;
    for (int64_t i = 0; i < width; ++i) {
        const float p_old = widen(static_cast<P>(p[i])), m_old = m[i];
        float g = (widen(static_cast<G>(grad[i])) * first) * second;
        if (COUPLED) g = g + coupled * p_old;
        const float moved = mix * (g - m_old);
        const float m_new = (FROM_GRAD ? g : m_old) + moved;
        const float v_new = v[i] * beta2 + (fresh2 * g) * g;
        const float p_new = p_old * decay - (m_new * step_size) / (std::sqrt(v_new) / root2 + eps);
        m[i] = m_new;
        v[i] = v_new;
        p[i] = master_of<P>(p_new, key, i);
        if (COPY) copy[i] = narrow(p_new);
    }
}

} // namespace

#endif

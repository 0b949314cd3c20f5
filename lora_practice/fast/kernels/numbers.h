// Number formats shared by the kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

// bfloat16: the upper half of a float.
struct Half {
    uint16_t bits;
};

constexpr int LANES = 16;
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));  // compilers cut it to what the machine has

// Vectors as wide as the machine's registers, for loops that keep many: wider ones would pass through memory.
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * WIDTH), aligned(4)));

// One LoRA site: its rank rows in the stacked A and the two key words of its dropout mask.
struct Site {
    int64_t rank_begin, rank_end;
    uint32_t key0, key1;
};

inline float wide(float x) { return x; }
inline float wide(Half x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// float -> T, rounded to nearest, ties to even.
struct Narrow {
    float value;
    operator float() const { return value; }
    operator Half() const {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        return Half{uint16_t((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16)};
    }
};
inline Narrow narrow(float x) { return Narrow{x}; }

// exp for float, within 2 ulp, written so that compilers vectorise it: 2^k * polynomial (Cephes expf).
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float k = __builtin_rintf(x * 1.44269504f);
    const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const uint32_t bits = uint32_t(int32_t(k) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

// Number formats, vector types and exp shared by the kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

// bfloat16: the upper 16 bits of a float32.
struct BFloat16 {
    uint16_t bits;
};

constexpr int LANES = 16;
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));  // compilers split it to the register size

// Vec: as wide as one vector register, for loops that keep many of them (wider vectors would spill to memory).
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * WIDTH), aligned(4)));

// One LoRA module of a group: its rows in the stacked A and the key of its dropout mask (dropout.MaskKey).
struct LoraModule {
    int64_t rank_begin, rank_end;
    uint32_t key0, key1;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// float32 -> float32 or bfloat16, rounded to nearest, ties to even.
struct FromFloat {
    float value;
    operator float() const { return value; }
    operator BFloat16() const {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        return BFloat16{uint16_t((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16)};
    }
};
inline FromFloat from_float(float x) { return FromFloat{x}; }

// exp(x) within 2 ulp: 2^k * polynomial (Cephes expf), written so that compilers vectorise it. x is clamped to
// [-87, 88].
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

// y = x W^T for a few float32 rows x and a weight W in float32, float16 or bfloat16: weights are upcast in registers,
// sums are float32.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "numbers.h"

struct Float16 {  // IEEE binary16
    uint16_t bits;
};

inline float to_float(Float16 x) {
    const uint32_t bits = uint32_t(x.bits & 0x7fffU) << 13, sign = uint32_t(x.bits & 0x8000U) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;  // exponent bias 127 - 15; exact for subnormals too
    return sign ? -value : value;
}

constexpr int TILE = WIDTH == 16 ? 5 : 3;  // TILE x TILE sums are kept in registers

typedef uint32_t Bits32 __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint16_t Bits16 __attribute__((vector_size(2 * WIDTH), aligned(2)));

// WIDTH weights as float32.
inline Vec load_as_float(const float* w) { return *(const Vec*)w; }
inline Vec load_as_float(const BFloat16* w) { return (Vec)(__builtin_convertvector(*(const Bits16*)w, Bits32) << 16); }
inline Vec load_as_float(const Float16* w) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)w));
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)w));
#else
    const Bits32 bits = __builtin_convertvector(*(const Bits16*)w, Bits32);
    const Vec value = (Vec)((bits & 0x7fff) << 13) * 0x1p112f;
    return (Vec)((Bits32)value | ((bits & 0x8000) << 16));
#endif
}

// y[t, i] = sum_j w[i, j] x[t, j] for R rows of w (row pitch `pitch`) and N contiguous rows of x.
template <int R, int N, typename W>
void tile(const W* w, int64_t pitch, const float* x, int64_t K, float* y, int64_t ldy) {
    Vec sum[R][N] = {};
    int64_t j = 0;
    for (; j + WIDTH <= K; j += WIDTH) {
        Vec weights[R];
        for (int r = 0; r < R; ++r) weights[r] = load_as_float(w + r * pitch + j);
        for (int t = 0; t < N; ++t) {
            const Vec input = *(const Vec*)(x + t * K + j);
            for (int r = 0; r < R; ++r) sum[r][t] += weights[r] * input;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < N; ++t) {
            float total = 0;
            for (int lane = 0; lane < WIDTH; ++lane) total += sum[r][t][lane];
            for (int64_t rest = j; rest < K; ++rest) total += to_float(w[r * pitch + rest]) * x[t * K + rest];
            y[t * ldy + r] = total;
        }
}

// y (n, rows) = x (n, K) times w (rows, K) transposed; row pitch of y is ldy. With n < TILE weight rows are read one
// after the other: a single stream from memory is faster than several in parallel.
template <typename W>
void matmul_transposed(const W* w, int64_t pitch, const float* x, int64_t n, int64_t K, int64_t rows, float* y,
                       int64_t ldy) {
    int64_t t = 0;
    for (; t + TILE <= n; t += TILE) {
        int64_t i = 0;
        for (; i + TILE <= rows; i += TILE)
            tile<TILE, TILE>(w + i * pitch, pitch, x + t * K, K, y + t * ldy + i, ldy);
        for (; i < rows; ++i) tile<1, TILE>(w + i * pitch, pitch, x + t * K, K, y + t * ldy + i, ldy);
    }
    for (; t < n; ++t)
        for (int64_t i = 0; i < rows; ++i) tile<1, 1>(w + i * pitch, pitch, x + t * K, K, y + t * ldy + i, ldy);
}

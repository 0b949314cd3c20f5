// Small float32 matmuls with register-resident sums: a block of ROWS rows of A and COLUMNS columns of B at a time.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace {

constexpr int ROWS = 8, VECTORS = WIDTH == 16 ? 2 : 1, COLUMNS = VECTORS * WIDTH;  // block of sums in registers

// count rounded up to a multiple of COLUMNS.

int64_t padded_to_columns(int64_t count) { return (count + COLUMNS - 1) / COLUMNS * COLUMNS; }

// C (ROWS x V * WIDTH) = A (ROWS x depth) B (depth x V * WIDTH).
template <int V>
void block(const float* A, int64_t lda, const float* B, int64_t ldb, int64_t depth, float* C, int64_t ldc) {
    Vec sums[ROWS][V] = {};
    for (int64_t d = 0; d < depth; ++d) {
        Vec b[V];
        for (int v = 0; v < V; ++v) b[v] = *(const Vec*)(B + d * ldb + v * WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i)
            for (int v = 0; v < V; ++v) sums[i][v] += A[i * lda + d] * b[v];
    }
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < V; ++v) *(Vec*)(C + i * ldc + v * WIDTH) = sums[i][v];
}

// C (ROWS x D) = A (ROWS x depth) B (depth x D).
void matmul(const float* A, int64_t lda, const float* B, int64_t depth, float* C, int64_t D) {
    for (int64_t j = 0; j < D; j += COLUMNS) block<VECTORS>(A, lda, B + j, D, depth, C + j, D);
}

// C (count x D) += A^T (count x ROWS) B (ROWS x D).
void add_outer(const float* A, int64_t lda, const float* B, int64_t count, float* C, int64_t D) {
    for (int64_t j = 0; j < D; j += COLUMNS) {
        Vec b[ROWS][VECTORS];
        for (int i = 0; i < ROWS; ++i)
            for (int v = 0; v < VECTORS; ++v) b[i][v] = *(const Vec*)(B + i * D + j + v * WIDTH);
        for (int64_t r = 0; r < count; ++r) {
            Vec c[VECTORS];
            for (int v = 0; v < VECTORS; ++v) c[v] = *(const Vec*)(C + r * D + j + v * WIDTH);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i)
                for (int v = 0; v < VECTORS; ++v) c[v] += A[i * lda + r] * b[i][v];
            for (int v = 0; v < VECTORS; ++v) *(Vec*)(C + r * D + j + v * WIDTH) = c[v];
        }
    }
}

}  // namespace

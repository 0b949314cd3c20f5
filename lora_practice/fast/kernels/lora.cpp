// LoRA's small matmuls with dropout masks, and scaled copies of its matrices. Kernels have the names and formulas of
// the methods of TorchOps in ../ops.py; ../dropout.py defines the masks.
// Compiled once per compute dtype T (-DT=float or -DT=BFloat16); arithmetic is float32.
// n: rows; K: input width; ld*: row pitches in elements; threads: OpenMP threads.

#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.h"

namespace {

// dropout.keep_mask of one row as floats 0 or 1: columns j (low) and j + half (high) for `count` values of j; `counter`
// is row * half plus the first j.
void keep_row(float* low, float* high, uint32_t counter, const LoraModule& s, uint32_t threshold, int64_t count) {
    #pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
        uint32_t bits = counter + uint32_t(j) + s.key0;
        bits ^= bits >> 16;
        bits *= 0x7feb352dU;
        bits ^= bits >> 15;
        bits += s.key1;
        bits *= 0x846ca68bU;
        bits ^= bits >> 16;
        low[j] = (bits & 0xffffU) >= threshold ? 1.0f : 0.0f;
        high[j] = (bits >> 16) >= threshold ? 1.0f : 0.0f;
    }
}

constexpr int BACK_ROWS = 4;
constexpr int64_t BACK_COLUMNS = 192;  // columns of each half per block: its sums stay in the nearest cache

// LoRA backward for columns [begin, begin + count) and the same shifted by K / 2:
// d_down = d_u^T (x * keep), d_x += (d_u A) * keep.
// One pass over A and the sums serves BACK_ROWS rows. d_down is summed in thread-local memory and copied out at the
// end: with neighbouring columns in shared memory the cores' prefetchers take cache lines from each other at every row
// (measured: two cores were 8 times slower than one).
struct LoraColumns {
    const int64_t K, half, begin, count, width, ranks;  // width: both halves, each padded to whole vectors
    std::vector<float> x, keep, total, a, sums, g;

    LoraColumns(int64_t K, int64_t begin, int64_t count, int64_t ranks, const float* down)
        : K(K), half(K / 2), begin(begin), count(count), width(2 * side()), ranks(ranks), x(BACK_ROWS * width),
          keep(BACK_ROWS * width, 1.0f), total(BACK_ROWS * width), a(ranks * width), sums(ranks * width),
          g(ranks * BACK_ROWS) {
        for (int64_t k = 0; k < ranks; ++k)
            for (int64_t high = 0; high < 2; ++high)
                std::copy_n(down + k * K + begin + high * half, count, &a[k * width + high * side()]);
    }
    int64_t side() const { return (count + WIDTH - 1) / WIDTH * WIDTH; }

    void add_module(int64_t rank, int64_t end) {
        for (int64_t j = 0; j < width; j += WIDTH) {
            Vec input[BACK_ROWS], back[BACK_ROWS] = {};
            for (int r = 0; r < BACK_ROWS; ++r)
                input[r] = *(const Vec*)&x[r * width + j] * *(const Vec*)&keep[r * width + j];
            for (int64_t k = rank; k < end; ++k) {
                const Vec factor = *(const Vec*)&a[k * width + j];
                Vec sum = *(const Vec*)&sums[k * width + j];
                for (int r = 0; r < BACK_ROWS; ++r) {
                    sum += g[k * BACK_ROWS + r] * input[r];
                    back[r] += g[k * BACK_ROWS + r] * factor;
                }
                *(Vec*)&sums[k * width + j] = sum;
            }
            for (int r = 0; r < BACK_ROWS; ++r)
                *(Vec*)&total[r * width + j] += back[r] * *(const Vec*)&keep[r * width + j];
        }
    }

    void run(const T* rows, int64_t ldx, const T* d_u, int64_t ldu, int64_t n, const LoraModule* modules,
             int64_t module_count, uint32_t threshold, int64_t row0, T* d_x, int64_t lddx, float* d_down) {
        for (int64_t i = 0; i < n; i += BACK_ROWS) {
            const int64_t there = std::min<int64_t>(BACK_ROWS, n - i);
            for (int64_t r = 0; r < BACK_ROWS; ++r)
                for (int64_t k = 0; k < ranks; ++k)
                    g[k * BACK_ROWS + r] = r < there ? to_float(d_u[(i + r) * ldu + k]) : 0.0f;
            for (int64_t r = 0; r < there; ++r)
                for (int64_t high = 0; high < 2; ++high) {
                    const T* from = rows + (i + r) * ldx + begin + high * half;
                    float* to = &x[r * width + high * side()];
#pragma omp simd
                    for (int64_t j = 0; j < count; ++j) to[j] = to_float(from[j]);
                }
            std::fill(total.begin(), total.end(), 0.0f);
            for (int64_t s = 0; s < module_count; ++s) {
                for (int64_t r = 0; r < there && threshold; ++r) {
                    float* low = &keep[r * width];
                    keep_row(low, low + side(), uint32_t((row0 + i + r) * half + begin), modules[s], threshold, count);
                }
                add_module(modules[s].rank_begin, modules[s].rank_end);
            }
            for (int64_t r = 0; r < there && d_x; ++r)
                for (int64_t high = 0; high < 2; ++high) {
                    T* to = d_x + (i + r) * lddx + begin + high * half;
                    const float* sum = &total[r * width + high * side()];
#pragma omp simd
                    for (int64_t j = 0; j < count; ++j) to[j] = from_float(to_float(to[j]) + sum[j]);
                }
        }
        for (int64_t k = 0; k < ranks; ++k)
            for (int64_t high = 0; high < 2; ++high)
                std::copy_n(&sums[k * width + high * side()], count, d_down + k * K + begin + high * half);
    }
};

constexpr int UP_ROWS = 8;
constexpr int64_t UP_COLUMNS = 8 * LANES;

// d_up (ranks x count, pitch N) = u^T d_y with count <= UP_COLUMNS; one pass over the sums serves UP_ROWS rows of d_y.
void lora_up_columns(const T* u, int64_t ldu, const T* d_y, int64_t ldy, int64_t n, int64_t ranks, int64_t count,
                     float* d_up, int64_t N) {
    std::vector<float> sums(ranks * UP_COLUMNS), factors(ranks * UP_ROWS), rows(UP_ROWS * UP_COLUMNS);
    for (int64_t i = 0; i < n; i += UP_ROWS) {
        for (int64_t r = 0; r < UP_ROWS; ++r) {
            const bool there = i + r < n;
            for (int64_t k = 0; k < ranks; ++k)
                factors[k * UP_ROWS + r] = there ? to_float(u[(i + r) * ldu + k]) : 0.0f;
            const T* from = d_y + (there ? i + r : i) * ldy;
            float* to = &rows[r * UP_COLUMNS];
            #pragma omp simd
            for (int64_t j = 0; j < count; ++j) to[j] = to_float(from[j]);
        }
        for (int64_t j = 0; j < count; j += LANES) {
            Lanes d[UP_ROWS];
            for (int r = 0; r < UP_ROWS; ++r) d[r] = *(const Lanes*)&rows[r * UP_COLUMNS + j];
            for (int64_t k = 0; k < ranks; ++k) {
                const float* factor = &factors[k * UP_ROWS];
                Lanes sum = *(const Lanes*)&sums[k * UP_COLUMNS + j];
#pragma GCC unroll 8
                for (int r = 0; r < UP_ROWS; ++r) sum += factor[r] * d[r];
                *(Lanes*)&sums[k * UP_COLUMNS + j] = sum;
            }
        }
    }
    for (int64_t k = 0; k < ranks; ++k) std::copy_n(&sums[k * UP_COLUMNS], count, d_up + k * N);
}

// u[r, k] = (x_r * keep_r) . A_k for MANY rows of A and DOWN_ROWS rows of x in one pass: several independent sums hide
// the latency of an addition.
constexpr int DOWN_ROWS = 2;

template <int MANY>
void dots(const float* x, const float* keep, int64_t K, const float* a, float* u, int64_t ldu) {
    Vec sums[DOWN_ROWS][MANY] = {};
    int64_t j = 0;
    for (; j + WIDTH <= K; j += WIDTH) {
        Vec input[DOWN_ROWS];
        for (int r = 0; r < DOWN_ROWS; ++r) input[r] = *(const Vec*)(x + r * K + j) * *(const Vec*)(keep + r * K + j);
        for (int k = 0; k < MANY; ++k) {
            const Vec factor = *(const Vec*)(a + k * K + j);
            for (int r = 0; r < DOWN_ROWS; ++r) sums[r][k] += input[r] * factor;
        }
    }
    for (int r = 0; r < DOWN_ROWS; ++r)
        for (int k = 0; k < MANY; ++k) {
            float sum = 0;
            for (int lane = 0; lane < WIDTH; ++lane) sum += sums[r][k][lane];
            for (int64_t rest = j; rest < K; ++rest) sum += x[r * K + rest] * keep[r * K + rest] * a[k * K + rest];
            u[r * ldu + k] = sum;
        }
}

}  // namespace

extern "C" {

// u (n, R) = (x * keep) A^T for each LoRA module; down (R, K) = stacked A. threshold 0: no dropout.
void lora_down(const T* x, int64_t ldx, int64_t n, int64_t K, const float* down,
               const LoraModule* modules, int64_t count, uint32_t threshold, int64_t row0, T* u, int64_t ldu,
               int threads) {
    const int64_t half = K / 2, ranks = modules[count - 1].rank_end;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> rows(DOWN_ROWS * K), keep(DOWN_ROWS * K, 1.0f), sums(DOWN_ROWS * ranks);
#pragma omp for
        for (int64_t i = 0; i < n; i += DOWN_ROWS) {
            const int64_t there = std::min<int64_t>(DOWN_ROWS, n - i);
            for (int64_t r = 0; r < there; ++r)
#pragma omp simd
                for (int64_t j = 0; j < K; ++j) rows[r * K + j] = to_float(x[(i + r) * ldx + j]);
            for (int64_t s = 0; s < count; ++s) {
                for (int64_t r = 0; r < there && threshold; ++r)
                    keep_row(&keep[r * K], &keep[r * K + half], uint32_t((row0 + i + r) * half), modules[s], threshold,
                             half);
                const int64_t last = modules[s].rank_end;
                int64_t k = modules[s].rank_begin;
                for (; k + 6 <= last; k += 6) dots<6>(rows.data(), keep.data(), K, down + k * K, &sums[k], ranks);
                for (; k + 2 <= last; k += 2) dots<2>(rows.data(), keep.data(), K, down + k * K, &sums[k], ranks);
                if (k < last) dots<1>(rows.data(), keep.data(), K, down + k * K, &sums[k], ranks);
            }
            for (int64_t r = 0; r < there; ++r)
                for (int64_t k = 0; k < ranks; ++k) u[(i + r) * ldu + k] = from_float(sums[r * ranks + k]);
        }
    }
}

// d_down (R, K) = d_u^T (x * keep), every element written; d_x += (d_u A) * keep unless d_x is null.
void lora_down_backward(const T* x, int64_t ldx, const T* d_u, int64_t ldu, int64_t n, int64_t K, const float* down,
                        const LoraModule* modules, int64_t count, uint32_t threshold, int64_t row0, T* d_x,
                        int64_t lddx, float* d_down, int threads) {
    const int64_t half = K / 2;
    const int64_t share = (half + threads - 1) / threads, cuts = (share + BACK_COLUMNS - 1) / BACK_COLUMNS;
    const int64_t width = ((share + cuts - 1) / cuts + WIDTH - 1) / WIDTH * WIDTH;
    const int64_t parts = (half + width - 1) / width;
#pragma omp parallel for num_threads(threads)
    for (int64_t p = 0; p < parts; ++p)
        LoraColumns(K, p * width, std::min(width, half - p * width), modules[count - 1].rank_end, down)
            .run(x, ldx, d_u, ldu, n, modules, count, threshold, row0, d_x, lddx, d_down);
}

// d_up (R, N) = u^T d_y in the block of each LoRA module; the rest is not written. blocks (count, 4): first and last
// rank, first and last output of each module.
void lora_up_backward(const T* u, int64_t ldu, const T* d_y, int64_t ldy, int64_t n, int64_t N, const int64_t* blocks,
                      int64_t count, float* d_up, int threads) {
    for (int64_t s = 0; s < count; ++s) {
        const int64_t rank = blocks[4 * s], ranks = blocks[4 * s + 1] - rank;
        const int64_t first = blocks[4 * s + 2], last = blocks[4 * s + 3];
#pragma omp parallel for num_threads(threads)
        for (int64_t begin = first; begin < last; begin += UP_COLUMNS)
            lora_up_columns(u + rank, ldu, d_y + begin, ldy, n, ranks, std::min(UP_COLUMNS, last - begin),
                            d_up + rank * N + begin, N);
    }
}

// targets[i] = factors[i] * sources[i], or += with `accumulate`. table (count, 8), for each pair: address of the source
// (float), address of the target, rows, columns, row and column pitch of the source, row pitch of the target, and 1 if
// the target is float, 0 if it is T.
void copy_matrices(const int64_t* table, const float* factors, int64_t count, int accumulate, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 8)
    for (int64_t p = 0; p < count; ++p) {
        const int64_t* entry = table + 8 * p;
        const float* from = (const float*)entry[0];
        const int64_t columns = entry[3], across = entry[5];
        for (int64_t i = 0; i < entry[2]; ++i, from += entry[4]) {
            if (entry[7]) {
                float* to = (float*)entry[1] + i * entry[6];
                for (int64_t j = 0; j < columns; ++j)
                    to[j] = factors[p] * from[j * across] + (accumulate ? to[j] : 0.0f);
            } else {
                T* to = (T*)entry[1] + i * entry[6];
                for (int64_t j = 0; j < columns; ++j)
                    to[j] = from_float(factors[p] * from[j * across] + (accumulate ? to_float(to[j]) : 0.0f));
            }
        }
    }
}

}  // extern "C"

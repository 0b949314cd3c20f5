// Causal attention of packed rows, forward and backward; attention.py states the formulas.
// One item of work = one run x one key/value head: its keys are packed, then blocks of ROWS queries pass over them.

#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.h"

namespace {

constexpr int ROWS = 8, COLUMNS = 2 * LANES;

int64_t padded(int64_t count) { return (count + COLUMNS - 1) / COLUMNS * COLUMNS; }

// C (ROWS x width) = A (ROWS x depth) B (depth x width); width is a multiple of COLUMNS.
void product(const float* A, int64_t lda, const float* B, int64_t ldb, int64_t depth, float* C, int64_t ldc,
             int64_t width) {
    for (int64_t j = 0; j < width; j += COLUMNS) {
        Lanes sums[ROWS][2] = {};
        for (int64_t d = 0; d < depth; ++d) {
            const Lanes b0 = *(const Lanes*)(B + d * ldb + j), b1 = *(const Lanes*)(B + d * ldb + j + LANES);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
                sums[i][0] += A[i * lda + d] * b0;
                sums[i][1] += A[i * lda + d] * b1;
            }
        }
        for (int i = 0; i < ROWS; ++i) {
            *(Lanes*)(C + i * ldc + j) = sums[i][0];
            *(Lanes*)(C + i * ldc + j + LANES) = sums[i][1];
        }
    }
}

// C (count x width) += A^T (count x ROWS) B (ROWS x width).
void add_outer(const float* A, int64_t lda, const float* B, int64_t ldb, int64_t count, float* C, int64_t ldc,
               int64_t width) {
    for (int64_t j = 0; j < width; j += COLUMNS) {
        Lanes b[ROWS][2];
        for (int i = 0; i < ROWS; ++i) {
            b[i][0] = *(const Lanes*)(B + i * ldb + j);
            b[i][1] = *(const Lanes*)(B + i * ldb + j + LANES);
        }
        for (int64_t r = 0; r < count; ++r) {
            Lanes c0 = *(Lanes*)(C + r * ldc + j), c1 = *(Lanes*)(C + r * ldc + j + LANES);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
                c0 += A[i * lda + r] * b[i][0];
                c1 += A[i * lda + r] * b[i][1];
            }
            *(Lanes*)(C + r * ldc + j) = c0;
            *(Lanes*)(C + r * ldc + j + LANES) = c1;
        }
    }
}

struct Shape {
    int64_t query, shared, size;
    float scale;
    int64_t window;  // 0: none
};

struct Run {
    int64_t path, rows;       // keys before the first query; queries
    const int64_t* keys;      // path + rows row numbers; the last `rows` are the queries
    int64_t count() const { return path + rows; }
};

// Keys and values of one head: as they are (count x D) and transposed (D x padded count), zero beyond the end.
struct Packed {
    std::vector<float> plain, across;
    int64_t pitch;
    void take(const float* x, int64_t ld, const Run& run, int64_t size) {
        pitch = padded(run.count());
        plain.assign(pitch * size, 0.0f);
        across.assign(pitch * size, 0.0f);
        for (int64_t r = 0; r < run.count(); ++r) {
            const float* row = x + run.keys[r] * ld;
            std::memcpy(&plain[r * size], row, size * sizeof(float));
            for (int64_t d = 0; d < size; ++d) across[d * pitch + r] = row[d];
        }
    }
};

// Probabilities of queries [first, first + ROWS) of a run, in place over scores (ROWS x width); hidden keys get 0.
void softmax(float* scores, int64_t ld, const Run& run, int64_t first, int64_t width, int64_t window) {
    for (int i = 0; i < ROWS; ++i) {
        float* s = scores + i * ld;
        const int64_t position = run.path + first + i;
        const int64_t end = std::min(position + 1, run.count());
        const int64_t begin = window ? std::max<int64_t>(0, position + 1 - window) : 0;
        float top = -3e38f, sum = 0;
#pragma omp simd reduction(max : top)
        for (int64_t j = begin; j < end; ++j) top = s[j] > top ? s[j] : top;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = begin; j < end; ++j) sum += s[j] = exponential(s[j] - top);
        const float inverse = end > begin ? 1.0f / sum : 0.0f;
        for (int64_t j = begin; j < end; ++j) s[j] *= inverse;
        std::fill(s, s + begin, 0.0f);
        std::fill(s + end, s + width, 0.0f);
    }
}

// block (ROWS x D) = factor * rows of x at queries [first, first + ROWS) of the run, zero beyond its end.
template <typename U>
void take_queries(const U* x, int64_t ld, const Run& run, int64_t first, int64_t size, float factor, float* block) {
    for (int i = 0; i < ROWS; ++i)
        for (int64_t d = 0; d < size; ++d)
            block[i * size + d] =
                first + i < run.rows ? factor * wide(x[run.keys[run.path + first + i] * ld + d]) : 0.0f;
}

Run run_of(int64_t r, const int64_t* starts, const int64_t* paths, const int64_t* keys) {
    return Run{paths[r], starts[r + 1] - starts[r] - paths[r], keys + starts[r]};
}

// Backward of one run and one shared head; d_q goes to its rows, d_k and d_v (count x D) to the run's own buffers.
void backward_item(const T* d_out, int64_t ldd, const T* out, int64_t ldo, const float* qkv, int64_t ld,
                   const Run& run, const Shape& s, int64_t head, float* d_qkv, int64_t ldg, float* d_k, float* d_v) {
    const int64_t D = s.size, group = s.query / s.shared, q_width = s.query * D;
    Packed k, v;
    k.take(qkv + q_width + head * D, ld, run, D);
    v.take(qkv + q_width + (s.shared + head) * D, ld, run, D);
    std::vector<float> P(ROWS * k.pitch), dS(ROWS * k.pitch), q(ROWS * D), g(ROWS * D), o(ROWS * D), dq(ROWS * D);
    for (int64_t h = head * group; h < (head + 1) * group; ++h)
        for (int64_t first = 0; first < run.rows; first += ROWS) {
            const int64_t seen = std::min(run.path + first + ROWS, run.count()), width = padded(seen);
            take_queries(qkv + h * D, ld, run, first, D, s.scale, q.data());
            take_queries(d_out + h * D, ldd, run, first, D, 1.0f, g.data());
            take_queries(out + h * D, ldo, run, first, D, 1.0f, o.data());
            product(q.data(), D, k.across.data(), k.pitch, D, P.data(), k.pitch, width);
            softmax(P.data(), k.pitch, run, first, width, s.window);
            product(g.data(), D, v.across.data(), k.pitch, D, dS.data(), k.pitch, width);
            for (int i = 0; i < ROWS; ++i) {
                float row = 0;
                for (int64_t d = 0; d < D; ++d) row += g[i * D + d] * o[i * D + d];
                float *ds = &dS[i * k.pitch], *p = &P[i * k.pitch];
                for (int64_t j = 0; j < width; ++j) ds[j] = p[j] * (ds[j] - row);
            }
            product(dS.data(), k.pitch, k.plain.data(), D, seen, dq.data(), D, D);
            add_outer(P.data(), k.pitch, g.data(), D, seen, d_v, D, D);
            add_outer(dS.data(), k.pitch, q.data(), D, seen, d_k, D, D);
            for (int64_t i = 0; i < std::min<int64_t>(ROWS, run.rows - first); ++i) {
                float* row = d_qkv + run.keys[run.path + first + i] * ldg + h * D;
                for (int64_t d = 0; d < D; ++d) row[d] = s.scale * dq[i * D + d];
            }
        }
}

}  // namespace

extern "C" {

// keys[starts[r], starts[r + 1]) are the key rows of run r; the first paths[r] of them are its path. D % 32 == 0.
void attend(const float* qkv, int64_t ld, int64_t runs, const int64_t* starts, const int64_t* paths,
            const int64_t* keys, int64_t query, int64_t shared, int64_t D, float scale, int64_t window, T* out,
            int64_t ldo, int threads) {
    const int64_t group = query / shared, q_width = query * D;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t item = 0; item < runs * shared; ++item) {
        const Run run = run_of(item / shared, starts, paths, keys);
        const int64_t head = item % shared;
        Packed k, v;
        k.take(qkv + q_width + head * D, ld, run, D);
        v.take(qkv + q_width + (shared + head) * D, ld, run, D);
        std::vector<float> P(ROWS * k.pitch), q(ROWS * D), o(ROWS * D);
        for (int64_t h = head * group; h < (head + 1) * group; ++h)
            for (int64_t first = 0; first < run.rows; first += ROWS) {
                const int64_t seen = std::min(run.path + first + ROWS, run.count()), width = padded(seen);
                take_queries(qkv + h * D, ld, run, first, D, scale, q.data());
                product(q.data(), D, k.across.data(), k.pitch, D, P.data(), k.pitch, width);
                softmax(P.data(), k.pitch, run, first, width, window);
                product(P.data(), k.pitch, v.plain.data(), D, seen, o.data(), D, D);
                for (int64_t i = 0; i < std::min<int64_t>(ROWS, run.rows - first); ++i) {
                    T* row = out + run.keys[run.path + first + i] * ldo + h * D;
                    for (int64_t d = 0; d < D; ++d) row[d] = narrow(o[i * D + d]);
                }
            }
    }
}

// d_qkv (n, ...) is zero on entry. Key and value gradients of shared rows are added up run by run, in order.
void attend_backward(const T* d_out, int64_t ldd, const T* out, int64_t ldo, const float* qkv, int64_t ld,
                     int64_t runs, const int64_t* starts, const int64_t* paths, const int64_t* keys, int64_t query,
                     int64_t shared, int64_t D, float scale, int64_t window, float* d_qkv, int64_t ldg,
                     int threads) {
    const Shape shape{query, shared, D, scale, window};
    const int64_t total = starts[runs], q_width = query * D;
    std::vector<float> d_kv(2 * total * shared * D, 0.0f);  // run, head, (k | v), row
    const auto part = [&](int64_t r, int64_t head, int64_t side) {
        const int64_t count = starts[r + 1] - starts[r];
        return &d_kv[(2 * starts[r] * shared + (2 * head + side) * count) * D];
    };
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t item = 0; item < runs * shared; ++item) {
        const int64_t r = item / shared, head = item % shared;
        backward_item(d_out, ldd, out, ldo, qkv, ld, run_of(r, starts, paths, keys), shape, head, d_qkv, ldg,
                      part(r, head, 0), part(r, head, 1));
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t column = 0; column < 2 * shared; ++column) {
        const int64_t head = column / 2, side = column % 2;
        for (int64_t r = 0; r < runs; ++r) {
            const float* from = part(r, head, side);
            for (int64_t at = starts[r]; at < starts[r + 1]; ++at, from += D) {
                float* row = d_qkv + keys[at] * ldg + q_width + (side * shared + head) * D;
                for (int64_t d = 0; d < D; ++d) row[d] += from[d];
            }
        }
    }
}

}  // extern "C"

// Causal attention of packed rows, forward and backward (kernels `attend` and `attend_backward`).
// ../attention.py states the formulas; step_plan.MicroBatchPlan.flat_runs describes runs and paths.
// One work item = one run x one kv head. The query heads of that kv head are stacked position by position (stacked
// query t: position t / group, head t % group); blocks of ROWS stacked queries pass over the keys they can see.

#include <cstdint>
#include <cstring>
#include <vector>

#include "blocks.h"
#include "numbers.h"

namespace {

struct Shape {
    int64_t query_heads, kv_heads, size;  // size: columns of one head, D
    float scale;
    int64_t window;                  // sliding window in keys; 0: full attention
    int64_t group() const { return query_heads / kv_heads; }
};

struct Run {
    int64_t path, rows;   // number of keys before the first query; number of queries per head
    const int64_t* keys;  // path + rows row indices; the last `rows` of them are the queries
    int64_t count() const { return path + rows; }
    // Stacked query t sees keys [0, end) (without a window).
    int64_t end(int64_t t, int64_t group) const { return std::min(path + t / group + 1, count()); }
};

Run run_of(int64_t r, const int64_t* starts, const int64_t* paths, const int64_t* keys) {
    return Run{paths[r], starts[r + 1] - starts[r] - paths[r], keys + starts[r]};
}

// Keys or values of one kv head gathered from the rows of a run.
struct PackedHead {
    std::vector<float> matrix, panels;  // (count x D); its transpose in panels of COLUMNS keys, (D x COLUMNS) each
    void gather(const float* x, int64_t ld, const Run& run, int64_t D, bool transpose) {
        const int64_t count = run.count();
        matrix.resize(count * D);
        for (int64_t r = 0; r < count; ++r) std::memcpy(&matrix[r * D], x + run.keys[r] * ld, D * sizeof(float));
        if (!transpose) return;
        panels.resize(padded_to_columns(count) * D);
        for (int64_t first = 0; first < count; first += COLUMNS) {
            float* panel = &panels[first * D];
            const int64_t there = std::min<int64_t>(COLUMNS, count - first);
            for (int64_t d = 0; d < D; ++d) {
                for (int64_t r = 0; r < there; ++r) panel[d * COLUMNS + r] = matrix[(first + r) * D + d];
                for (int64_t r = there; r < COLUMNS; ++r) panel[d * COLUMNS + r] = 0.0f;
            }
        }
    }
    // C (ROWS x width, pitch ldc) = A (ROWS x D) times the first `width` rows transposed; width % WIDTH == 0.
    void scores(const float* A, int64_t D, int64_t width, float* C, int64_t ldc) const {
        int64_t j = 0;
        for (; j + COLUMNS <= width; j += COLUMNS) block<VECTORS>(A, D, &panels[j * D], COLUMNS, D, C + j, ldc);
        if (j < width) block<1>(A, D, &panels[j * D], COLUMNS, D, C + j, ldc);
    }
};

// Per-thread buffers for one block of ROWS stacked queries; `longest` is the key count of the longest run.
struct Scratch {
    std::vector<float> P, dS, q, g, o, dq;
    int64_t pitch;
    Scratch(int64_t longest, int64_t D)
        : P(ROWS * padded_to_columns(longest)), dS(P.size()), q(ROWS * D), g(ROWS * D), o(ROWS * D), dq(ROWS * D),
          pitch(padded_to_columns(longest)) {}
};

// Softmax of queries [first, first + ROWS), in place over scores (ROWS x width); masked keys get probability 0.
void softmax(float* scores, int64_t ld, const Run& run, int64_t group, int64_t first, int64_t width, int64_t window) {
    for (int i = 0; i < ROWS; ++i) {
        float* s = scores + i * ld;
        const int64_t end = run.end(first + i, group);
        const int64_t begin = window ? std::max<int64_t>(0, end - window) : 0;
        std::fill(s, s + begin, -3e38f);
        std::fill(s + end, s + width, -3e38f);
        float tops[WIDTH], sums[WIDTH] = {};
        std::fill(tops, tops + WIDTH, -3e38f);
        for (int64_t j = 0; j < width; j += WIDTH)
            for (int v = 0; v < WIDTH; ++v) tops[v] = std::max(tops[v], s[j + v]);
        const float top = *std::max_element(tops, tops + WIDTH);
        for (int64_t j = 0; j < width; j += WIDTH)
            for (int v = 0; v < WIDTH; ++v) sums[v] += s[j + v] = exponential(s[j + v] - top);
        float sum = 0;
        for (int v = 0; v < WIDTH; ++v) sum += sums[v];
        const float inverse = 1.0f / sum;
        for (int64_t j = 0; j < width; ++j) s[j] *= inverse;
        std::fill(s, s + begin, 0.0f);  // masked entries hold exp(-87) at this point
        std::fill(s + end, s + width, 0.0f);
    }
}

// block (ROWS x D) = factor * rows of x at the stacked queries [first, first + ROWS); zero rows beyond the last query.
template <typename U>
void gather_queries(const U* x, int64_t ld, const Run& run, int64_t group, int64_t first, int64_t D, float factor,
                  float* block) {
    for (int i = 0; i < ROWS; ++i, block += D) {
        const int64_t position = (first + i) / group, head = (first + i) % group;
        if (position >= run.rows) {
            std::fill(block, block + D, 0.0f);
            continue;
        }
        const U* row = x + run.keys[run.path + position] * ld + head * D;
        for (int64_t d = 0; d < D; ++d) block[d] = factor * to_float(row[d]);
    }
}

// Inverse of gather_queries: rows of x at the stacked queries = factor * block.
template <typename U>
void scatter_queries(const float* block, const Run& run, int64_t group, int64_t first, int64_t D, float factor, U* x,
                  int64_t ld) {
    for (int64_t i = 0; i < std::min<int64_t>(ROWS, run.rows * group - first); ++i, block += D) {
        U* row = x + run.keys[run.path + (first + i) / group] * ld + (first + i) % group * D;
        for (int64_t d = 0; d < D; ++d) row[d] = from_float(factor * block[d]);
    }
}

int64_t keys_seen(const Run& run, int64_t group, int64_t first) { return run.end(first + ROWS - 1, group); }

int64_t padded_to_vectors(int64_t seen) { return (seen + WIDTH - 1) / WIDTH * WIDTH; }

int64_t longest_run(const int64_t* starts, int64_t runs) {
    int64_t longest = 0;
    for (int64_t r = 0; r < runs; ++r) longest = std::max(longest, starts[r + 1] - starts[r]);
    return longest;
}

// Backward of one run and one kv head: writes rows of d_q, adds to d_k and d_v (count x D), which belong to this run.
// d_out, out, queries and d_q point at the first query head of the group.
void head_backward(const T* d_out, int64_t ldd, const T* out, int64_t ldo, const float* queries, int64_t ld,
                   const PackedHead& k, const PackedHead& v, const Run& run, const Shape& shape, Scratch& s, float* d_q,
                   int64_t ldg, float* d_k, float* d_v) {
    const int64_t D = shape.size, group = shape.group();
    for (int64_t first = 0; first < run.rows * group; first += ROWS) {
        const int64_t seen = keys_seen(run, group, first), width = padded_to_vectors(seen);
        gather_queries(queries, ld, run, group, first, D, shape.scale, s.q.data());
        gather_queries(d_out, ldd, run, group, first, D, 1.0f, s.g.data());
        gather_queries(out, ldo, run, group, first, D, 1.0f, s.o.data());
        k.scores(s.q.data(), D, width, s.P.data(), s.pitch);
        softmax(s.P.data(), s.pitch, run, group, first, width, shape.window);
        v.scores(s.g.data(), D, width, s.dS.data(), s.pitch);
        for (int i = 0; i < ROWS; ++i) {
            float row = 0;
            for (int64_t d = 0; d < D; ++d) row += s.g[i * D + d] * s.o[i * D + d];
            float *ds = &s.dS[i * s.pitch], *p = &s.P[i * s.pitch];
            for (int64_t j = 0; j < width; ++j) ds[j] = p[j] * (ds[j] - row);
        }
        matmul(s.dS.data(), s.pitch, k.matrix.data(), seen, s.dq.data(), D);
        add_outer(s.P.data(), s.pitch, s.g.data(), seen, d_v, D);
        add_outer(s.dS.data(), s.pitch, s.q.data(), seen, d_k, D);
        scatter_queries(s.dq.data(), run, group, first, D, shape.scale, d_q, ldg);
    }
}

}  // namespace

extern "C" {

// out (n, query_heads * D) = attention of qkv (n, (query_heads + 2 kv_heads) * D), after RoPE. D % 32 == 0.
// keys[starts[r], starts[r + 1]) are the key rows of run r; the first paths[r] of them are its path.
void attend(const float* qkv, int64_t ld, int64_t runs, const int64_t* starts, const int64_t* paths,
            const int64_t* keys, int64_t query_heads, int64_t kv_heads, int64_t D, float scale, int64_t window, T* out,
            int64_t ldo, int threads) {
    const int64_t group = query_heads / kv_heads, q_width = query_heads * D, longest = longest_run(starts, runs);
#pragma omp parallel num_threads(threads)
    {
        Scratch s(longest, D);
        PackedHead k, v;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < runs * kv_heads; ++item) {
            const Run run = run_of(item / kv_heads, starts, paths, keys);
            const int64_t head = item % kv_heads;
            k.gather(qkv + q_width + head * D, ld, run, D, true);
            v.gather(qkv + q_width + (kv_heads + head) * D, ld, run, D, false);
            for (int64_t first = 0; first < run.rows * group; first += ROWS) {
                const int64_t seen = keys_seen(run, group, first), width = padded_to_vectors(seen);
                gather_queries(qkv + head * group * D, ld, run, group, first, D, scale, s.q.data());
                k.scores(s.q.data(), D, width, s.P.data(), s.pitch);
                softmax(s.P.data(), s.pitch, run, group, first, width, window);
                matmul(s.P.data(), s.pitch, v.matrix.data(), seen, s.o.data(), D);
                scatter_queries(s.o.data(), run, group, first, D, 1.0f, out + head * group * D, ldo);
            }
        }
    }
}

// d_qkv (n, ...) must be zero on entry. Each run sums its key and value gradients separately; they are added to the
// rows run by run in a fixed order, so that the result does not depend on the threads.
void attend_backward(const T* d_out, int64_t ldd, const T* out, int64_t ldo, const float* qkv, int64_t ld,
                     int64_t runs, const int64_t* starts, const int64_t* paths, const int64_t* keys,
                     int64_t query_heads, int64_t kv_heads, int64_t D, float scale, int64_t window, float* d_qkv,
                     int64_t ldg, int threads) {
    const Shape shape{query_heads, kv_heads, D, scale, window};
    const int64_t total = starts[runs], q_width = query_heads * D, longest = longest_run(starts, runs);
    std::vector<float> d_kv(2 * total * kv_heads * D, 0.0f);  // run, head, (k | v), row
    const auto d_kv_of = [&](int64_t r, int64_t head, int64_t side) {
        const int64_t count = starts[r + 1] - starts[r];
        return &d_kv[(2 * starts[r] * kv_heads + (2 * head + side) * count) * D];
    };
#pragma omp parallel num_threads(threads)
    {
        Scratch s(longest, D);
        PackedHead k, v;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < runs * kv_heads; ++item) {
            const int64_t r = item / kv_heads, head = item % kv_heads, query0 = head * shape.group() * D;
            const Run run = run_of(r, starts, paths, keys);
            k.gather(qkv + q_width + head * D, ld, run, D, true);
            v.gather(qkv + q_width + (kv_heads + head) * D, ld, run, D, true);
            head_backward(d_out + query0, ldd, out + query0, ldo, qkv + query0, ld, k, v, run, shape, s,
                          d_qkv + query0, ldg, d_kv_of(r, head, 0), d_kv_of(r, head, 1));
        }
#pragma omp for
        for (int64_t column = 0; column < 2 * kv_heads; ++column) {
            const int64_t head = column / 2, side = column % 2;
            for (int64_t r = 0; r < runs; ++r) {
                const float* from = d_kv_of(r, head, side);
                for (int64_t at = starts[r]; at < starts[r + 1]; ++at, from += D) {
                    float* row = d_qkv + keys[at] * ldg + q_width + (side * kv_heads + head) * D;
                    for (int64_t d = 0; d < D; ++d) row[d] += from[d];
                }
            }
        }
    }
}

}  // extern "C"

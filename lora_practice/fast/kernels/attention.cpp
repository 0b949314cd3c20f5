// Causal attention of packed rows, forward and backward; attention.py states the formulas.
// One item of work = one run x one key/value head. The query heads that share it are stacked, position by position
// (query t: position t / group, head t % group), and blocks of ROWS queries pass over the keys that they see.

#include <cstdint>
#include <cstring>
#include <vector>

#include "blocks.h"
#include "numbers.h"

namespace {

struct Shape {
    int64_t query, shared, size;
    float scale;
    int64_t window;  // 0: none
    int64_t group() const { return query / shared; }
};

struct Run {
    int64_t path, rows;   // keys before the first query; queries of one head
    const int64_t* keys;  // path + rows row numbers; the last `rows` are the queries
    int64_t count() const { return path + rows; }
    // Keys that the stacked query t sees: [0, end) without a window.
    int64_t end(int64_t t, int64_t group) const { return std::min(path + t / group + 1, count()); }
};

Run run_of(int64_t r, const int64_t* starts, const int64_t* paths, const int64_t* keys) {
    return Run{paths[r], starts[r + 1] - starts[r] - paths[r], keys + starts[r]};
}

// Keys or values of one head, (count x D); `across` is their transpose in panels of COLUMNS keys, (D x COLUMNS) each.
struct Packed {
    std::vector<float> plain, across;
    void take(const float* x, int64_t ld, const Run& run, int64_t D, bool transpose) {
        const int64_t count = run.count();
        plain.resize(count * D);
        for (int64_t r = 0; r < count; ++r) std::memcpy(&plain[r * D], x + run.keys[r] * ld, D * sizeof(float));
        if (!transpose) return;
        across.resize(padded(count) * D);
        for (int64_t first = 0; first < count; first += COLUMNS) {
            float* panel = &across[first * D];
            const int64_t there = std::min<int64_t>(COLUMNS, count - first);
            for (int64_t d = 0; d < D; ++d) {
                for (int64_t r = 0; r < there; ++r) panel[d * COLUMNS + r] = plain[(first + r) * D + d];
                for (int64_t r = there; r < COLUMNS; ++r) panel[d * COLUMNS + r] = 0.0f;
            }
        }
    }
    // C (ROWS x width, pitch ldc) = A (ROWS x D) times the first `width` of them, a multiple of WIDTH.
    void scores(const float* A, int64_t D, int64_t width, float* C, int64_t ldc) const {
        int64_t j = 0;
        for (; j + COLUMNS <= width; j += COLUMNS) block<VECTORS>(A, D, &across[j * D], COLUMNS, D, C + j, ldc);
        if (j < width) block<1>(A, D, &across[j * D], COLUMNS, D, C + j, ldc);
    }
};

// What a thread needs for a block of ROWS stacked queries.
struct Scratch {
    std::vector<float> P, dS, q, g, o, dq;
    int64_t pitch;
    Scratch(int64_t longest, int64_t D)
        : P(ROWS * padded(longest)), dS(P.size()), q(ROWS * D), g(ROWS * D), o(ROWS * D), dq(ROWS * D),
          pitch(padded(longest)) {}
};

// Probabilities of queries [first, first + ROWS), in place over scores (ROWS x width); hidden keys get 0.
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
        std::fill(s, s + begin, 0.0f);  // what was hidden is exp(-87) here
        std::fill(s + end, s + width, 0.0f);
    }
}

// block (ROWS x D) = factor * x at the stacked queries [first, first + ROWS), zero beyond the last.
template <typename U>
void take_queries(const U* x, int64_t ld, const Run& run, int64_t group, int64_t first, int64_t D, float factor,
                  float* block) {
    for (int i = 0; i < ROWS; ++i, block += D) {
        const int64_t position = (first + i) / group, head = (first + i) % group;
        if (position >= run.rows) {
            std::fill(block, block + D, 0.0f);
            continue;
        }
        const U* row = x + run.keys[run.path + position] * ld + head * D;
        for (int64_t d = 0; d < D; ++d) block[d] = factor * wide(row[d]);
    }
}

// The inverse for results: x at the stacked queries = factor * block.
template <typename U>
void give_queries(const float* block, const Run& run, int64_t group, int64_t first, int64_t D, float factor, U* x,
                  int64_t ld) {
    for (int64_t i = 0; i < std::min<int64_t>(ROWS, run.rows * group - first); ++i, block += D) {
        U* row = x + run.keys[run.path + (first + i) / group] * ld + (first + i) % group * D;
        for (int64_t d = 0; d < D; ++d) row[d] = narrow(factor * block[d]);
    }
}

int64_t keys_seen(const Run& run, int64_t group, int64_t first) { return run.end(first + ROWS - 1, group); }

int64_t filled(int64_t seen) { return (seen + WIDTH - 1) / WIDTH * WIDTH; }

int64_t longest_run(const int64_t* starts, int64_t runs) {
    int64_t longest = 0;
    for (int64_t r = 0; r < runs; ++r) longest = std::max(longest, starts[r + 1] - starts[r]);
    return longest;
}

// Backward of one run and one shared head; d_q goes to its rows, d_k and d_v (count x D) to the run's own buffers.
// d_out, out, queries and d_q start at the first of the group's query heads.
void backward_item(const T* d_out, int64_t ldd, const T* out, int64_t ldo, const float* queries, int64_t ld,
                   const Packed& k, const Packed& v, const Run& run, const Shape& shape, Scratch& s, float* d_q,
                   int64_t ldg, float* d_k, float* d_v) {
    const int64_t D = shape.size, group = shape.group();
    for (int64_t first = 0; first < run.rows * group; first += ROWS) {
        const int64_t seen = keys_seen(run, group, first), width = filled(seen);
        take_queries(queries, ld, run, group, first, D, shape.scale, s.q.data());
        take_queries(d_out, ldd, run, group, first, D, 1.0f, s.g.data());
        take_queries(out, ldo, run, group, first, D, 1.0f, s.o.data());
        k.scores(s.q.data(), D, width, s.P.data(), s.pitch);
        softmax(s.P.data(), s.pitch, run, group, first, width, shape.window);
        v.scores(s.g.data(), D, width, s.dS.data(), s.pitch);
        for (int i = 0; i < ROWS; ++i) {
            float row = 0;
            for (int64_t d = 0; d < D; ++d) row += s.g[i * D + d] * s.o[i * D + d];
            float *ds = &s.dS[i * s.pitch], *p = &s.P[i * s.pitch];
            for (int64_t j = 0; j < width; ++j) ds[j] = p[j] * (ds[j] - row);
        }
        product(s.dS.data(), s.pitch, k.plain.data(), seen, s.dq.data(), D);
        add_outer(s.P.data(), s.pitch, s.g.data(), seen, d_v, D);
        add_outer(s.dS.data(), s.pitch, s.q.data(), seen, d_k, D);
        give_queries(s.dq.data(), run, group, first, D, shape.scale, d_q, ldg);
    }
}

}  // namespace

extern "C" {

// keys[starts[r], starts[r + 1]) are the key rows of run r; the first paths[r] of them are its path. D % 32 == 0.
void attend(const float* qkv, int64_t ld, int64_t runs, const int64_t* starts, const int64_t* paths,
            const int64_t* keys, int64_t query, int64_t shared, int64_t D, float scale, int64_t window, T* out,
            int64_t ldo, int threads) {
    const int64_t group = query / shared, q_width = query * D, longest = longest_run(starts, runs);
#pragma omp parallel num_threads(threads)
    {
        Scratch s(longest, D);
        Packed k, v;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < runs * shared; ++item) {
            const Run run = run_of(item / shared, starts, paths, keys);
            const int64_t head = item % shared;
            k.take(qkv + q_width + head * D, ld, run, D, true);
            v.take(qkv + q_width + (shared + head) * D, ld, run, D, false);
            for (int64_t first = 0; first < run.rows * group; first += ROWS) {
                const int64_t seen = keys_seen(run, group, first), width = filled(seen);
                take_queries(qkv + head * group * D, ld, run, group, first, D, scale, s.q.data());
                k.scores(s.q.data(), D, width, s.P.data(), s.pitch);
                softmax(s.P.data(), s.pitch, run, group, first, width, window);
                product(s.P.data(), s.pitch, v.plain.data(), seen, s.o.data(), D);
                give_queries(s.o.data(), run, group, first, D, 1.0f, out + head * group * D, ldo);
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
    const int64_t total = starts[runs], q_width = query * D, longest = longest_run(starts, runs);
    std::vector<float> d_kv(2 * total * shared * D, 0.0f);  // run, head, (k | v), row
    const auto part = [&](int64_t r, int64_t head, int64_t side) {
        const int64_t count = starts[r + 1] - starts[r];
        return &d_kv[(2 * starts[r] * shared + (2 * head + side) * count) * D];
    };
#pragma omp parallel num_threads(threads)
    {
        Scratch s(longest, D);
        Packed k, v;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < runs * shared; ++item) {
            const int64_t r = item / shared, head = item % shared, query0 = head * shape.group() * D;
            const Run run = run_of(r, starts, paths, keys);
            k.take(qkv + q_width + head * D, ld, run, D, true);
            v.take(qkv + q_width + (shared + head) * D, ld, run, D, true);
            backward_item(d_out + query0, ldd, out + query0, ldo, qkv + query0, ld, k, v, run, shape, s,
                          d_qkv + query0, ldg, part(r, head, 0), part(r, head, 1));
        }
#pragma omp for
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
}

}  // extern "C"

// Forward pass of a few tokens through the whole model with a KV cache, for generation. The same in torch:
// Decoder._rows in ../decode/decoder.py.
// Weights stay in 16 bits in memory, because reading them takes most of the time of a token; arithmetic is float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "dots.h"

namespace {

constexpr int64_t BLOCK = 8 * TILE;  // outputs per work item; small, so that a slow core gets fewer of them

// ../decode/native.py mirrors the layouts of the next four structs.
struct Linear {  // y = W x + bias + up (down x)
    const void* weight;
    const float *bias, *down, *up;              // down: A (rank, columns); up: c B^T (rank, rows)
    int64_t dtype, rows, columns, pitch, rank;  // dtype 0: float32, 1: float16, 2: bfloat16
};

struct Layer {
    Linear qkv[3], o, gate, up, down;
    const float *norm1, *norm2, *q_norm, *k_norm;
    int64_t window;  // sliding window in keys; 0: full attention
};

struct Rope {
    const float *cosines, *sines;  // (n, size / 2) for the n tokens
    int64_t position, capacity;    // position of the first token; number of positions in the KV cache
};

struct Model {
    const Layer* layers;
    const Linear* head;
    const float* norm;
    int64_t hidden, inner, heads, kv_heads, size, tanh_gelu;  // size: columns of one head; tanh_gelu 0: SiLU
    float scale, eps;
};

float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
    return sum;
}

using Floats = std::vector<float>;

// y (n, BLOCK) = outputs [begin, end) of a linear for n rows x; u (n, rank) = down x is computed beforehand.
void linear_outputs(const Linear& l, const float* x, const Floats& u, int64_t n, int64_t begin, int64_t end, float* y) {
    const int64_t at = begin * l.pitch, rows = end - begin;
    if (l.dtype == 0) matmul_transposed((const float*)l.weight + at, l.pitch, x, n, l.columns, rows, y, BLOCK);
    if (l.dtype == 1) matmul_transposed((const Float16*)l.weight + at, l.pitch, x, n, l.columns, rows, y, BLOCK);
    if (l.dtype == 2) matmul_transposed((const BFloat16*)l.weight + at, l.pitch, x, n, l.columns, rows, y, BLOCK);
    for (int64_t t = 0; t < n; ++t, y += BLOCK) {
        for (int64_t i = 0; l.bias && i < rows; ++i) y[i] += l.bias[begin + i];
        for (int64_t k = 0; k < l.rank; ++k) {
            const float *up = l.up + k * l.rows + begin, factor = u[size_t(t * l.rank + k)];
            #pragma omp simd
            for (int64_t i = 0; i < rows; ++i) y[i] += factor * up[i];
        }
    }
}

void lora_down(const Linear& l, const float* x, int64_t n, Floats& u) {
    u.resize(size_t(n * l.rank));
    matmul_transposed(l.down, l.columns, x, n, l.columns, l.rank, u.data(), l.rank);
}

void normalise(const float* x, const float* weight, int64_t K, float eps, float* y) {
    const float r = 1.0f / std::sqrt(dot(x, x, K) / float(K) + eps);
    #pragma omp simd
    for (int64_t j = 0; j < K; ++j) y[j] = x[j] * r * weight[j];
}

// y (n, ldy) = [l1 x | l2 x | ...], or y += with `accumulate` (residual stream).
void apply_linears(const Linear* list, int64_t count, const float* x, int64_t n, Floats* u, float* y, int64_t ldy,
                   bool accumulate) {
    int64_t blocks = 0;
    for (int64_t s = 0; s < count; ++s) {
        lora_down(list[s], x, n, u[s]);
        blocks += (list[s].rows + BLOCK - 1) / BLOCK;
    }
    Floats part(size_t(n * BLOCK));
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b) {
        int64_t s = 0, begin = b * BLOCK, offset = 0;
        for (; begin >= (list[s].rows + BLOCK - 1) / BLOCK * BLOCK; offset += list[s++].rows)
            begin -= (list[s].rows + BLOCK - 1) / BLOCK * BLOCK;
        const int64_t end = std::min(begin + BLOCK, list[s].rows);
        linear_outputs(list[s], x, u[s], n, begin, end, part.data());
        for (int64_t t = 0; t < n; ++t)
            for (int64_t i = 0; i < end - begin; ++i) {
                float& target = y[t * ldy + offset + begin + i];
                target = part[t * BLOCK + i] + (accumulate ? target : 0.0f);
            }
    }
}

// y (n, inner) = act(gate x) * (up x).
void gated_mlp(const Layer& l, const Model& m, const float* x, int64_t n, Floats* u, float* y) {
    lora_down(l.gate, x, n, u[0]);
    lora_down(l.up, x, n, u[1]);
    Floats gate(size_t(n * BLOCK)), up(size_t(n * BLOCK));
#pragma omp for schedule(dynamic)
    for (int64_t begin = 0; begin < m.inner; begin += BLOCK) {
        const int64_t end = std::min(begin + BLOCK, m.inner);
        linear_outputs(l.gate, x, u[0], n, begin, end, gate.data());
        linear_outputs(l.up, x, u[1], n, begin, end, up.data());
        for (int64_t t = 0; t < n; ++t)
            for (int64_t i = 0; i < end - begin; ++i) {
                const float z = gate[t * BLOCK + i];
                const float act = m.tanh_gelu ? 0.5f * z * (1 + std::tanh(0.7978845608f * (z + 0.044715f * z * z * z)))
                                              : z / (1.0f + exponential(-z));
                y[t * m.inner + begin + i] = act * up[t * BLOCK + i];
            }
    }
}

// QK norm (if any) and RoPE of every q and k head, in place; k and v are copied into the KV cache.
void qk_norm_rope_cache(const Layer& l, const Model& m, float* qkv, int64_t n, const Rope& r, float* keys,
                        float* values) {
    const int64_t D = m.size, half = D / 2, heads = m.heads + m.kv_heads;
#pragma omp for
    for (int64_t item = 0; item < n * heads; ++item) {
        const int64_t t = item / heads, head = item % heads, group = head - m.heads;
        float *a = qkv + (t * (heads + m.kv_heads) + head) * D, *b = a + half;
        const float *c = r.cosines + t * half, *s = r.sines + t * half, *weight = group < 0 ? l.q_norm : l.k_norm;
        if (weight) normalise(a, weight, D, m.eps, a);
        for (int64_t j = 0; j < half; ++j) {
            const float first = a[j], second = b[j];
            a[j] = first * c[j] - second * s[j];
            b[j] = second * c[j] + first * s[j];
        }
        if (group < 0) continue;
        const int64_t at = (group * r.capacity + r.position + t) * D;
        std::copy(a, a + D, keys + at);
        std::copy(a + m.kv_heads * D, a + (m.kv_heads + 1) * D, values + at);
    }
}

// out (n, heads * size) = attention of n queries over the cached keys and values, their own included.
void attend(const Layer& l, const Model& m, const float* qkv, int64_t n, const Rope& r, const float* keys,
            const float* values, Floats& p, float* out) {
    const int64_t D = m.size;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < n * m.heads; ++item) {
        const int64_t t = item / m.heads, head = item % m.heads, stop = r.position + t + 1;
        const int64_t begin = l.window ? std::max(int64_t(0), stop - l.window) : 0, count = stop - begin;
        const int64_t at = (head / (m.heads / m.kv_heads) * r.capacity + begin) * D;
        p.resize(size_t(count));
        matmul_transposed(keys + at, D, qkv + (t * (m.heads + 2 * m.kv_heads) + head) * D, 1, D, count, p.data(), 0);
        const float top = *std::max_element(p.begin(), p.end());
        float sum = 0, *y = out + item * D;
        #pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; ++i) sum += p[i] = exponential((p[i] - top) * m.scale);
        std::fill(y, y + D, 0.0f);
        for (int64_t i = 0; i < count; ++i) {
            const float *v = values + at + i * D, weight = p[i] / sum;
            #pragma omp simd
            for (int64_t j = 0; j < D; ++j) y[j] += weight * v[j];
        }
    }
}

}  // namespace

extern "C" {

// All layers and the head for n consecutive tokens. h (n, hidden): their embeddings, overwritten. cache (layers, 2,
// kv_heads, capacity, size): keys and values; those of these tokens are written. logits (V): written for the last
// token, or null if not wanted.
void decode(const Model* model, int64_t layers, float* h, int64_t n, const Rope* rope, float* cache, float* logits,
            int threads) {
    const Model& m = *model;
    const int64_t side = m.kv_heads * rope->capacity * m.size, width = (m.heads + 2 * m.kv_heads) * m.size;
    Floats qkv(size_t(n * width)), o(size_t(n * m.heads * m.size)), a(size_t(n * m.inner));
#pragma omp parallel num_threads(threads)
    {
        Floats x(size_t(n * m.hidden)), u[3], p;
        const auto normalised = [&](const float* weight) {
            for (int64_t t = 0; t < n; ++t) normalise(h + t * m.hidden, weight, m.hidden, m.eps, &x[t * m.hidden]);
            return x.data();
        };
        for (int64_t i = 0; i < layers; ++i) {
            const Layer& l = m.layers[i];
            float *keys = cache + 2 * i * side, *values = keys + side;
            apply_linears(l.qkv, 3, normalised(l.norm1), n, u, qkv.data(), width, false);
            qk_norm_rope_cache(l, m, qkv.data(), n, *rope, keys, values);
            attend(l, m, qkv.data(), n, *rope, keys, values, p, o.data());
            apply_linears(&l.o, 1, o.data(), n, u, h, m.hidden, true);
            gated_mlp(l, m, normalised(l.norm2), n, u, a.data());
            apply_linears(&l.down, 1, a.data(), n, u, h, m.hidden, true);
        }
        if (logits) apply_linears(m.head, 1, normalised(m.norm) + (n - 1) * m.hidden, 1, u, logits, 0, false);
    }
}

}  // extern "C"

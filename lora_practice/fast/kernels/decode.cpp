// A few tokens through the whole model, for generation; decode.py holds the torch spelling (`_rows`) of the same.
// Weights stay in 16 bits in memory: reading them is where the time of a token goes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "dots.h"

namespace {

constexpr int64_t BLOCK = 8 * TILE;  // outputs handed to a thread at once; few, so that a slow core takes fewer

// The layouts of these four are spelt again in decode_native.py.
struct Linear {  // y = W x + bias + up (down x)
    const void* weight;
    const float *bias, *down, *up;               // down (rank, columns), up (rank, rows), scale inside
    int64_t kind, rows, columns, pitch, rank;    // kind 0: float, 1: binary16, 2: bfloat16
};

struct Layer {
    Linear qkv[3], o, gate, up, down;
    const float *norm1, *norm2, *q_norm, *k_norm;
    int64_t window;  // 0: sees everything
};

struct Rope {
    const float *cosines, *sines;  // (n, size / 2) of the n tokens
    int64_t position, capacity;    // of the first token; positions in the cache
};

struct Model {
    const Layer* layers;
    const Linear* head;
    const float* norm;
    int64_t hidden, inner, heads, shared, size, tanh_gelu;
    float scale, eps;
};

float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
    return sum;
}

// Everything below runs inside one parallel region, on n rows of one sequence. Each thread makes the small things
// (norms, u = down x) for itself: that is cheaper than waiting for another one.
using Floats = std::vector<float>;

// Outputs [begin, end) of a linear for n rows x -> y (n, BLOCK); u (n, rank) = down x is there already.
void outputs(const Linear& l, const float* x, const Floats& u, int64_t n, int64_t begin, int64_t end, float* y) {
    const int64_t at = begin * l.pitch, rows = end - begin;
    if (l.kind == 0) products((const float*)l.weight + at, l.pitch, x, n, l.columns, rows, y, BLOCK);
    if (l.kind == 1) products((const Binary16*)l.weight + at, l.pitch, x, n, l.columns, rows, y, BLOCK);
    if (l.kind == 2) products((const Half*)l.weight + at, l.pitch, x, n, l.columns, rows, y, BLOCK);
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
    products(l.down, l.columns, x, n, l.columns, l.rank, u.data(), l.rank);
}

void normalise(const float* x, const float* weight, int64_t K, float eps, float* y) {
    const float r = 1.0f / std::sqrt(dot(x, x, K) / float(K) + eps);
    #pragma omp simd
    for (int64_t j = 0; j < K; ++j) y[j] = x[j] * r * weight[j];
}

// y (n, ldy) = [l1 x | l2 x | ...], or y += for the residual stream.
void product(const Linear* list, int64_t count, const float* x, int64_t n, Floats* u, float* y, int64_t ldy, bool add) {
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
        outputs(list[s], x, u[s], n, begin, end, part.data());
        for (int64_t t = 0; t < n; ++t)
            for (int64_t i = 0; i < end - begin; ++i) {
                float& target = y[t * ldy + offset + begin + i];
                target = part[t * BLOCK + i] + (add ? target : 0.0f);
            }
    }
}

// y (n, inner) = act(gate x) * (up x)
void gated(const Layer& l, const Model& m, const float* x, int64_t n, Floats* u, float* y) {
    lora_down(l.gate, x, n, u[0]);
    lora_down(l.up, x, n, u[1]);
    Floats gate(size_t(n * BLOCK)), up(size_t(n * BLOCK));
#pragma omp for schedule(dynamic)
    for (int64_t begin = 0; begin < m.inner; begin += BLOCK) {
        const int64_t end = std::min(begin + BLOCK, m.inner);
        outputs(l.gate, x, u[0], n, begin, end, gate.data());
        outputs(l.up, x, u[1], n, begin, end, up.data());
        for (int64_t t = 0; t < n; ++t)
            for (int64_t i = 0; i < end - begin; ++i) {
                const float z = gate[t * BLOCK + i];
                const float act = m.tanh_gelu ? 0.5f * z * (1 + std::tanh(0.7978845608f * (z + 0.044715f * z * z * z)))
                                              : z / (1.0f + exponential(-z));
                y[t * m.inner + begin + i] = act * up[t * BLOCK + i];
            }
    }
}

// Head norm and rotation of every q and k head, in place; k and v go into the cache.
void place(const Layer& l, const Model& m, float* qkv, int64_t n, const Rope& r, float* keys, float* values) {
    const int64_t D = m.size, half = D / 2, heads = m.heads + m.shared;
#pragma omp for
    for (int64_t item = 0; item < n * heads; ++item) {
        const int64_t t = item / heads, head = item % heads, group = head - m.heads;
        float *a = qkv + (t * (heads + m.shared) + head) * D, *b = a + half;
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
        std::copy(a + m.shared * D, a + (m.shared + 1) * D, values + at);
    }
}

void attend(const Layer& l, const Model& m, const float* qkv, int64_t n, const Rope& r, const float* keys,
            const float* values, Floats& p, float* out) {
    const int64_t D = m.size;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < n * m.heads; ++item) {
        const int64_t t = item / m.heads, head = item % m.heads, stop = r.position + t + 1;
        const int64_t begin = l.window ? std::max(int64_t(0), stop - l.window) : 0, count = stop - begin;
        const int64_t at = (head / (m.heads / m.shared) * r.capacity + begin) * D;
        p.resize(size_t(count));
        products(keys + at, D, qkv + (t * (m.heads + 2 * m.shared) + head) * D, 1, D, count, p.data(), 0);
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

// h (n, hidden): embeddings of n tokens that follow each other, used up. cache (layers, 2, shared, capacity, size):
// keys and values; those of these tokens are written. logits (V) of the last token, or null when nobody asks.
void decode(const Model* model, int64_t layers, float* h, int64_t n, const Rope* rope, float* cache, float* logits,
            int threads) {
    const Model& m = *model;
    const int64_t side = m.shared * rope->capacity * m.size, width = (m.heads + 2 * m.shared) * m.size;
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
            product(l.qkv, 3, normalised(l.norm1), n, u, qkv.data(), width, false);
            place(l, m, qkv.data(), n, *rope, keys, values);
            attend(l, m, qkv.data(), n, *rope, keys, values, p, o.data());
            product(&l.o, 1, o.data(), n, u, h, m.hidden, true);
            gated(l, m, normalised(l.norm2), n, u, a.data());
            product(&l.down, 1, a.data(), n, u, h, m.hidden, true);
        }
        if (logits) product(m.head, 1, normalised(m.norm) + (n - 1) * m.hidden, 1, u, logits, 0, false);
    }
}

}  // extern "C"

// RMSNorm, gated activation, cross-entropy and RoPE, each in one pass over memory. Kernels have the names and formulas
// of the methods of TorchOps in ../ops.py.
// Compiled once per compute dtype T (-DT=float or -DT=BFloat16); arithmetic is float32.
// n: rows; ld*: row pitches in elements; threads: OpenMP threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.h"

extern "C" {

// out = h * rstd * weight. rstd (n) is computed and written, or read if rstd_given (TorchOps.norm_from_rstd).
void norm(const float* h, int64_t ldh, const float* weight, int64_t n, int64_t K, float eps, float* rstd, T* out,
          int64_t ldo, int rstd_given, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
        const float* x = h + i * ldh;
        if (!rstd_given) {
            float sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < K; ++j) sum += x[j] * x[j];
            rstd[i] = 1.0f / std::sqrt(sum / float(K) + eps);
        }
        const float r = rstd[i];
        T* y = out + i * ldo;
        #pragma omp simd
        for (int64_t j = 0; j < K; ++j) y[j] = from_float(x[j] * r * weight[j]);
    }
}

// d_h += gradient of the norm.
void norm_backward(const T* d_out, int64_t ldd, const float* h, int64_t ldh, const float* weight, const float* rstd,
                   int64_t n, int64_t K, float* d_h, int64_t lddh, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
        const T* g = d_out + i * ldd;
        const float* x = h + i * ldh;
        float* d = d_h + i * lddh;
        const float r = rstd[i];
        float dot = 0;
        #pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < K; ++j) dot += to_float(g[j]) * weight[j] * x[j];
        const float mean = dot * r * r / float(K);
        #pragma omp simd
        for (int64_t j = 0; j < K; ++j) d[j] += r * (to_float(g[j]) * weight[j] - x[j] * mean);
    }
}

// out (n, F) = silu(gate) * up; gate_up (n, 2F) = [gate | up].
void gate(const T* gate_up, int64_t ldg, int64_t n, int64_t F, T* out, int64_t ldo, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
        const T *g = gate_up + i * ldg, *up = g + F;
        T* y = out + i * ldo;
        #pragma omp simd
        for (int64_t j = 0; j < F; ++j) {
            const float x = to_float(g[j]);
            y[j] = from_float(x / (1.0f + exponential(-x)) * to_float(up[j]));
        }
    }
}

// d_gate_up (n, 2F) from d_out (n, F).
void gate_backward(const T* d_out, int64_t ldd, const T* gate_up, int64_t ldg, int64_t n, int64_t F, T* d_gate_up,
                   int64_t lddg, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
        const T *g = gate_up + i * ldg, *up = g + F, *d = d_out + i * ldd;
        T *d_gate = d_gate_up + i * lddg, *d_up = d_gate + F;
        #pragma omp simd
        for (int64_t j = 0; j < F; ++j) {
            const float x = to_float(g[j]), dy = to_float(d[j]);
            const float s = 1.0f / (1.0f + exponential(-x));
            d_up[j] = from_float(dy * x * s);
            d_gate[j] = from_float(dy * to_float(up[j]) * s * (1.0f + x * (1.0f - s)));
        }
    }
}

// loss[i] = cross-entropy of row i summed over its labels[first[i], first[i + 1]), in nats. With scale != 0, logits
// (n, V) are replaced by their gradient.
void cross_entropy(T* logits, int64_t ld, int64_t n, int64_t V, const int64_t* first, const int64_t* labels,
                   float scale, double* loss, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t i = 0; i < n; ++i) {
        T* z = logits + i * ld;
        float top = to_float(z[0]), sum = 0;
        #pragma omp simd reduction(max : top)
        for (int64_t j = 1; j < V; ++j) top = to_float(z[j]) > top ? to_float(z[j]) : top;
        #pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < V; ++j) sum += exponential(to_float(z[j]) - top);
        const int64_t begin = first[i], end = first[i + 1];
        const float log_sum = top + std::log(sum), factor = scale * float(end - begin);
        std::vector<float> mine;
        loss[i] = 0;
        for (int64_t p = begin; p < end; ++p) {
            mine.push_back(to_float(z[labels[p]]));
            loss[i] += double(log_sum) - double(mine.back());
        }
        if (scale == 0) continue;
        #pragma omp simd
        for (int64_t j = 0; j < V; ++j) z[j] = from_float(factor * exponential(to_float(z[j]) - log_sum));
        for (int64_t p = begin; p < end; ++p) {
            float same = 0;
            for (int64_t q = begin; q < end; ++q) same += labels[q] == labels[p];
            z[labels[p]] = from_float(factor * std::exp(mine[p - begin] - log_sum) - scale * same);
        }
    }
}

// RoPE on the first `heads` heads of x, in place; cosines, sines (n, half); sign -1 is the transpose (backward).
void rope(float* x, int64_t ld, int64_t n, int64_t heads, int64_t half, const float* cosines, const float* sines,
            float sign, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
        const float *c = cosines + i * half, *s = sines + i * half;
        for (int64_t head = 0; head < heads; ++head) {
            float *a = x + i * ld + head * 2 * half, *b = a + half;
            #pragma omp simd
            for (int64_t j = 0; j < half; ++j) {
                const float first = a[j], second = b[j];
                a[j] = first * c[j] - second * s[j] * sign;
                b[j] = second * c[j] + first * s[j] * sign;
            }
        }
    }
}

}  // extern "C"

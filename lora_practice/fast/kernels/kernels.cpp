// Compiled spellings of ops.Plain, each one pass over memory. Same names, same formulas; see ops.py and dropout.py.
// Compiled once per compute dtype T (-DT=float or -DT=Half); everything is computed in float.
// n rows, ld* row pitches in elements.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.h"

extern "C" {

void norm(const float* h, int64_t ldh, const float* weight, int64_t n, int64_t K, float eps, float* rstd, T* out,
          int64_t ldo, int again, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
        const float* x = h + i * ldh;
        if (!again) {
            float sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < K; ++j) sum += x[j] * x[j];
            rstd[i] = 1.0f / std::sqrt(sum / float(K) + eps);
        }
        const float r = rstd[i];
        T* y = out + i * ldo;
        #pragma omp simd
        for (int64_t j = 0; j < K; ++j) y[j] = narrow(x[j] * r * weight[j]);
    }
}

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
        for (int64_t j = 0; j < K; ++j) dot += wide(g[j]) * weight[j] * x[j];
        const float mean = dot * r * r / float(K);
        #pragma omp simd
        for (int64_t j = 0; j < K; ++j) d[j] += r * (wide(g[j]) * weight[j] - x[j] * mean);
    }
}

void gate(const T* gate_up, int64_t ldg, int64_t n, int64_t F, T* out, int64_t ldo, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
        const T *g = gate_up + i * ldg, *up = g + F;
        T* y = out + i * ldo;
        #pragma omp simd
        for (int64_t j = 0; j < F; ++j) {
            const float x = wide(g[j]);
            y[j] = narrow(x / (1.0f + exponential(-x)) * wide(up[j]));
        }
    }
}

void gate_backward(const T* d_out, int64_t ldd, const T* gate_up, int64_t ldg, int64_t n, int64_t F, T* d_gate_up,
                   int64_t lddg, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
        const T *g = gate_up + i * ldg, *up = g + F, *d = d_out + i * ldd;
        T *d_gate = d_gate_up + i * lddg, *d_up = d_gate + F;
        #pragma omp simd
        for (int64_t j = 0; j < F; ++j) {
            const float x = wide(g[j]), dy = wide(d[j]);
            const float s = 1.0f / (1.0f + exponential(-x));
            d_up[j] = narrow(dy * x * s);
            d_gate[j] = narrow(dy * wide(up[j]) * s * (1.0f + x * (1.0f - s)));
        }
    }
}

// Loss of each row, logits -> gradient in place when scale is not 0. Labels of row i: labels[first[i], first[i + 1]).
void cross_entropy(T* logits, int64_t ld, int64_t n, int64_t V, const int64_t* first, const int64_t* labels,
                   float scale, double* loss, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t i = 0; i < n; ++i) {
        T* z = logits + i * ld;
        float top = wide(z[0]), sum = 0;
        #pragma omp simd reduction(max : top)
        for (int64_t j = 1; j < V; ++j) top = wide(z[j]) > top ? wide(z[j]) : top;
        #pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < V; ++j) sum += exponential(wide(z[j]) - top);
        const int64_t begin = first[i], end = first[i + 1];
        const float log_sum = top + std::log(sum), factor = scale * float(end - begin);
        std::vector<float> mine;
        loss[i] = 0;
        for (int64_t p = begin; p < end; ++p) {
            mine.push_back(wide(z[labels[p]]));
            loss[i] += double(log_sum) - double(mine.back());
        }
        if (scale == 0) continue;
        #pragma omp simd
        for (int64_t j = 0; j < V; ++j) z[j] = narrow(factor * exponential(wide(z[j]) - log_sum));
        for (int64_t p = begin; p < end; ++p) {
            float same = 0;
            for (int64_t q = begin; q < end; ++q) same += labels[q] == labels[p];
            z[labels[p]] = narrow(factor * std::exp(mine[p - begin] - log_sum) - scale * same);
        }
    }
}

void rotate(float* x, int64_t ld, int64_t n, int64_t heads, int64_t half, const float* cosines, const float* sines,
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

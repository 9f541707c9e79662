// The arithmetic of a decoder layer between its matrices. Plain loops that compilers turn into vectors;
// sums have sixteen partial sums whatever the vectors' width, so that every instruction set gives the same bits.
#pragma once

#include <cmath>

#include "half.hpp"
#include "layout.hpp"
#include "matrix.hpp"

namespace waterfill {
namespace {

inline float sum16(const float (&partial)[16]) {
    float s[16];
    for (int k = 0; k < 16; ++k) s[k] = partial[k];
    for (int half = 8; half; half /= 2)
        for (int k = 0; k < half; ++k) s[k] += s[k + half];
    return s[0];
}

inline float dot16(const float* a, const float* b, int64_t n) {
    float sum[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 16; ++k) sum[k] += a[i + k] * b[i + k];
    for (; i < n; ++i) sum[i % 16] += a[i] * b[i];
    return sum16(sum);
}

// e^x to 2 units in the last place, 0 below -87. Cephes' polynomial on [-ln 2 / 2, ln 2 / 2], scaled by a power of two.
inline float exponential(float x) {
    constexpr float round = 12582912.0f;  // 1.5 * 2^23
    const float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = (clamped * 1.44269504f + round) - round;
    const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    y *= bits_to_float(uint32_t(int32_t(n) + 127) << 23);
    return x < -87.0f ? 0.0f : x == x ? y : x;
}

inline void rms_norm(const float* x, const float* weight, float epsilon, int64_t n, float* out) {
    const float by = 1.0f / std::sqrt(dot16(x, x, n) / float(n) + epsilon);
    for (int64_t i = 0; i < n; ++i) out[i] = weight[i] * (x[i] * by);
}

// silu(gate) * up
inline void swiglu(const float* gate, const float* up, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

// gelu(gate) * up, where gelu is the one with tanh (arXiv 1606.08415): x (1 + tanh u) / 2 = x / (1 + e^(-2u)).
inline void geglu(const float* gate, const float* up, int64_t n, float* out) {
    constexpr float cubic = 0.044715f, twice = 1.59576912f;  // 2 sqrt(2 / pi)
    for (int64_t i = 0; i < n; ++i) {
        const float x = gate[i], u = twice * (x + cubic * (x * x * x));
        out[i] = x / (1.0f + exponential(-u)) * up[i];
    }
}

template <class Number>
inline float number(Number value) {
    if constexpr (sizeof(Number) == 2)
        return bfloat_to_float(value);
    else
        return value;
}

// Softmax of what one query scored at each position, in place.
inline void softmax(float* s, int64_t positions) {
    float largest[16], partial[16] = {};
    for (float& each : largest) each = s[0];
    int64_t j = 0;
    for (; j + 16 <= positions; j += 16)
        for (int k = 0; k < 16; ++k) largest[k] = s[j + k] > largest[k] ? s[j + k] : largest[k];
    for (; j < positions; ++j) largest[0] = s[j] > largest[0] ? s[j] : largest[0];
    for (int k = 1; k < 16; ++k) largest[0] = largest[k] > largest[0] ? largest[k] : largest[0];
    const float most_of_all = largest[0];
    for (j = 0; j < positions; ++j) s[j] = exponential(s[j] - most_of_all);
    j = 0;
    for (; j + 16 <= positions; j += 16)
        for (int k = 0; k < 16; ++k) partial[k] += s[j + k];
    for (; j < positions; ++j) partial[j % 16] += s[j];
    const float by = 1.0f / sum16(partial);
    for (j = 0; j < positions; ++j) s[j] *= by;
}

// Each row of keys and values is converted once for all tokens. `scores` [tokens][queries][positions + tokens - 1].
template <class Number>
inline void attend_typed(const Attention& a, float* scores) {
    const Number *keys = static_cast<const Number*>(a.keys), *values = static_cast<const Number*>(a.values);
    const int64_t d = a.head_dim, all = a.positions + a.tokens - 1;
    // Position j is seen by the tokens from first_token(j) to end_token(j); token t sees those from first_seen(t) on.
    auto first_token = [&](int64_t j) { return j < a.positions ? 0 : j - a.positions + 1; };
    auto end_token = [&](int64_t j) { return least(a.tokens, j - a.positions + a.window + 1); };
    auto first_seen = [&](int64_t t) { return most(0, a.positions + t - a.window); };
    float row[kMostHeadDim];
    for (int64_t j = 0; j < all; ++j) {
        for (int64_t i = 0; i < d; ++i) row[i] = number(keys[j * d + i]);
        for (int64_t t = first_token(j), end = end_token(j); t < end; ++t)
            for (int64_t q = 0; q < a.queries; ++q)
                scores[(t * a.queries + q) * all + j] = dot16(a.q + t * a.stride + q * d, row, d) * a.scaling;
    }
    for (int64_t t = 0; t < a.tokens; ++t) {
        const int64_t from = first_seen(t);
        for (int64_t q = 0; q < a.queries; ++q)
            softmax(scores + (t * a.queries + q) * all + from, a.positions + t - from);
        for (int64_t i = 0; i < a.queries * d; ++i) a.out[t * a.stride + i] = 0;
    }
    for (int64_t j = 0; j < all; ++j) {
        for (int64_t i = 0; i < d; ++i) row[i] = number(values[j * d + i]);
        for (int64_t t = first_token(j), end = end_token(j); t < end; ++t)
            for (int64_t q = 0; q < a.queries; ++q) {
                const float weight = scores[(t * a.queries + q) * all + j];
                float* out = a.out + t * a.stride + q * d;
                for (int64_t i = 0; i < d; ++i) out[i] += weight * row[i];
            }
    }
}

inline void attend(const Attention& a, float* scores) {
    a.half ? attend_typed<uint16_t>(a, scores) : attend_typed<float>(a, scores);
}

}  // namespace
}  // namespace waterfill

// The arithmetic of a decoder layer between its matrices, in vectors of eight floats: compilers make what the machine
// has of them. Sums have sixteen partial sums whatever that is, so that every instruction set gives the same bits.
#pragma once

#include <cmath>
#include <cstring>

#include "half.hpp"
#include "layout.hpp"
#include "matrix.hpp"

namespace waterfill {
namespace {

typedef float Four __attribute__((vector_size(16)));
typedef float Eight __attribute__((vector_size(32)));
typedef int32_t Eight32 __attribute__((vector_size(32)));

inline Eight load8(const float* p) { return loaded<Eight>(p); }
inline void store8(float* p, Eight x) { std::memcpy(p, &x, sizeof x); }

// Of 16: those that are 8 apart first, then those that are 4, 2 and 1 apart.
inline float sum16(Eight low, Eight high) {
    Four half[2];
    const Eight eight = low + high;
    std::memcpy(half, &eight, sizeof half);
    const Four four = half[0] + half[1];
    const Four two = four + Four{four[2], four[3], four[0], four[1]};
    return two[0] + two[1];
}

inline float total16(const float* x, int64_t n) {
    Eight low = {}, high = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) low += load8(x + i), high += load8(x + i + 8);
    float rest[16] = {};
    std::memcpy(rest, x + i, size_t(n - i) * sizeof(float));
    return sum16(low + load8(rest), high + load8(rest + 8));
}

inline float dot16(const float* a, const float* b, int64_t n) {
    Eight low = {}, high = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        low += load8(a + i) * load8(b + i);
        high += load8(a + i + 8) * load8(b + i + 8);
    }
    if (i < n) {
        float rest[2][16] = {};
        std::memcpy(rest[0], a + i, size_t(n - i) * sizeof(float));
        std::memcpy(rest[1], b + i, size_t(n - i) * sizeof(float));
        low += load8(rest[0]) * load8(rest[1]);
        high += load8(rest[0] + 8) * load8(rest[1] + 8);
    }
    return sum16(low, high);
}

inline Eight chosen(Eight32 mask, Eight set, Eight clear) {
    return Eight((mask & Eight32(set)) | (~mask & Eight32(clear)));
}

// e^x to 2 units in the last place, 0 below -87. Cephes' polynomial on [-ln 2 / 2, ln 2 / 2], scaled by a power of two.
inline Eight exponential(Eight x) {
    constexpr float round = 12582912.0f;  // 1.5 * 2^23
    const Eight zero = {}, least_x = zero - 87.0f, most_x = zero + 88.0f;
    const Eight clamped = chosen(x < least_x, least_x, chosen(x > most_x, most_x, x));
    const Eight n = (clamped * 1.44269504f + round) - round;
    const Eight r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    Eight y = zero + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    y *= Eight((__builtin_convertvector(n, Eight32) + 127) << 23);
    return chosen(x < least_x, zero, chosen(x == x, y, x));
}

inline void rms_norm(const float* x, const float* weight, float epsilon, int64_t n, float* out) {
    const float by = 1.0f / std::sqrt(dot16(x, x, n) / float(n) + epsilon);
    for (int64_t i = 0; i < n; ++i) out[i] = weight[i] * (x[i] * by);
}

// out = f(x), eight at a time; the last ones in the company of zeros.
template <class F>
inline void in_eights(const float* x, int64_t n, float* out, const F& f) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) store8(out + i, f(load8(x + i)));
    float rest[8] = {};
    std::memcpy(rest, x + i, size_t(n - i) * sizeof(float));
    store8(rest, f(load8(rest)));
    std::memcpy(out + i, rest, size_t(n - i) * sizeof(float));
}

// silu(gate) * up
inline void swiglu(const float* gate, const float* up, int64_t n, float* out) {
    in_eights(gate, n, out, [](Eight x) { return x / (1.0f + exponential(-x)); });
    for (int64_t i = 0; i < n; ++i) out[i] *= up[i];
}

// gelu(gate) * up, where gelu is the one with tanh (arXiv 1606.08415): x (1 + tanh u) / 2 = x / (1 + e^(-2u)).
inline void geglu(const float* gate, const float* up, int64_t n, float* out) {
    constexpr float cubic = 0.044715f, twice = 1.59576912f;  // 2 sqrt(2 / pi)
    in_eights(gate, n, out, [](Eight x) { return x / (1.0f + exponential(-(twice * (x + cubic * (x * x * x))))); });
    for (int64_t i = 0; i < n; ++i) out[i] *= up[i];
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
    Eight largest = Eight{} + s[0];
    int64_t j = 0;
    for (; j + 8 <= positions; j += 8) largest = chosen(load8(s + j) > largest, load8(s + j), largest);
    for (; j < positions; ++j) largest[0] = s[j] > largest[0] ? s[j] : largest[0];
    for (int k = 1; k < 8; ++k) largest[0] = largest[k] > largest[0] ? largest[k] : largest[0];
    in_eights(s, positions, s, [&](Eight x) { return exponential(x - largest[0]); });
    const float by = 1.0f / total16(s, positions);
    for (j = 0; j < positions; ++j) s[j] *= by;
}

// out += weights[j] * rows[j], one j after the other, of 8 * VECTORS numbers.
template <int VECTORS>
inline void add_weighted(const float* weights, const float* rows, int64_t stride, int64_t count, float* out) {
    Eight sum[VECTORS];
    WF_UNROLL for (int k = 0; k < VECTORS; ++k) sum[k] = load8(out + 8 * k);
    for (int64_t j = 0; j < count; ++j, rows += stride) {
        const float w = weights[j];
        WF_UNROLL for (int k = 0; k < VECTORS; ++k) sum[k] += w * load8(rows + 8 * k);
    }
    WF_UNROLL for (int k = 0; k < VECTORS; ++k) store8(out + 8 * k, sum[k]);
}
inline void add_weighted(const float* weights, const float* rows, int64_t d, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + 64 <= d; i += 64) add_weighted<8>(weights, rows + i, d, count, out + i);
    for (; i + 8 <= d; i += 8) add_weighted<1>(weights, rows + i, d, count, out + i);
    for (; i < d; ++i)
        for (int64_t j = 0; j < count; ++j) out[i] += weights[j] * rows[j * d + i];
}

// Some rows of keys or values at a time are converted for all queries. `scores` [tokens][queries][positions + tokens -
// 1].
template <class Number>
inline void attend_typed(const Attention& a, float* scores) {
    constexpr int64_t most_numbers = 4096;  // of rows that a cache holds beside the rest
    static_assert(most_numbers >= kMostHeadDim, "a row fits");
    const int64_t d = a.head_dim, all = a.positions + a.tokens - 1, together = most_numbers / d;
    float rows[most_numbers];
    // use(query, its scores, its result, rows, how many) for the rows that each query's token sees, in order.
    auto each_query = [&](const void* numbers, const auto& use) {
        for (int64_t first = 0; first < all; first += together) {
            const int64_t end = least(all, first + together);
            const Number* from = static_cast<const Number*>(numbers) + first * d;
            for (int64_t i = 0; i < (end - first) * d; ++i) rows[i] = number(from[i]);
            for (int64_t t = 0; t < a.tokens; ++t) {
                const int64_t low = most(first, a.positions + t - a.window), high = least(end, a.positions + t);
                for (int64_t q = 0; q < a.queries && low < high; ++q)
                    use(t * a.stride + q * d, scores + (t * a.queries + q) * all + low, rows + (low - first) * d,
                        high - low);
            }
        }
    };
    each_query(a.keys, [&](int64_t at, float* to, const float* row, int64_t count) {
        for (int64_t j = 0; j < count; ++j) to[j] = dot16(a.q + at, row + j * d, d) * a.scaling;
    });
    for (int64_t t = 0; t < a.tokens; ++t) {
        const int64_t from = most(0, a.positions + t - a.window);
        for (int64_t q = 0; q < a.queries; ++q)
            softmax(scores + (t * a.queries + q) * all + from, a.positions + t - from);
        for (int64_t i = 0; i < a.queries * d; ++i) a.out[t * a.stride + i] = 0;
    }
    each_query(a.values, [&](int64_t at, const float* weights, const float* row, int64_t count) {
        add_weighted(weights, row, d, count, a.out + at);
    });
}

inline void attend(const Attention& a, float* scores) {
    a.half ? attend_typed<uint16_t>(a, scores) : attend_typed<float>(a, scores);
}

}  // namespace
}  // namespace waterfill

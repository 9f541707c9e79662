// Orthonormal Walsh-Hadamard transform and the rotation made of it (waterfill/codecs/hadamard.py), in vectors of W
// floats.
//
// Stages run in the same order as in Python, each sum is of the same two terms, and nothing is contracted, so the bits
// are the same on every machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "layout.hpp"

namespace waterfill {
namespace {

template <int W>
struct Lanes;
#define WF_LANES(W)                                                                 \
    template <>                                                                     \
    struct Lanes<W> {                                                               \
        typedef float F __attribute__((vector_size(4 * W)));                        \
        typedef int32_t I __attribute__((vector_size(4 * W)));                      \
        typedef float U __attribute__((vector_size(4 * W), aligned(4), may_alias)); \
    }
WF_LANES(4);
WF_LANES(8);
WF_LANES(16);
#undef WF_LANES

template <int W>
struct Hadamard {
    using F = typename Lanes<W>::F;
    using I = typename Lanes<W>::I;
    using U = typename Lanes<W>::U;

    static F load(const float* p) { return *reinterpret_cast<const U*>(p); }
    static void store(float* p, F v) { *reinterpret_cast<U*>(p) = v; }

    // One stage inside a vector: lanes i and i ^ half become their sum and their difference.
    template <int HALF>
    static F within(F v) {
        F swapped;
        I sign;
#if defined(__clang__) || __GNUC__ >= 12
        if constexpr (W == 16)
            swapped = __builtin_shufflevector(v, v, 0 ^ HALF, 1 ^ HALF, 2 ^ HALF, 3 ^ HALF, 4 ^ HALF, 5 ^ HALF,
                                              6 ^ HALF, 7 ^ HALF, 8 ^ HALF, 9 ^ HALF, 10 ^ HALF, 11 ^ HALF, 12 ^ HALF,
                                              13 ^ HALF, 14 ^ HALF, 15 ^ HALF);
        else if constexpr (W == 8)
            swapped = __builtin_shufflevector(v, v, 0 ^ HALF, 1 ^ HALF, 2 ^ HALF, 3 ^ HALF, 4 ^ HALF, 5 ^ HALF,
                                              6 ^ HALF, 7 ^ HALF);
        else
            swapped = __builtin_shufflevector(v, v, 0 ^ HALF, 1 ^ HALF, 2 ^ HALF, 3 ^ HALF);
#else
        I order;
        for (int i = 0; i < W; ++i) order[i] = i ^ HALF;
        swapped = __builtin_shuffle(v, order);
#endif
        for (int i = 0; i < W; ++i) sign[i] = i & HALF ? INT32_MIN : 0;
        return swapped + F(I(v) ^ sign);
    }

    template <int HALF = 1>
    static F all_within(F v) {
        if constexpr (HALF < W)
            return all_within<2 * HALF>(within<HALF>(v));
        else
            return v;
    }

    // log2(R) stages over R vectors that lie `stride` floats apart.
    template <int R, bool FIRST>
    static void butterflies(float* x, int64_t stride, F factor) {
        F v[R];
        for (int i = 0; i < R; ++i) {
            v[i] = load(x + i * stride);
            if constexpr (FIRST) v[i] = all_within(v[i]);
        }
        for (int half = 1; half < R; half *= 2)
            for (int i = 0; i < R; ++i)
                if (!(i & half)) {
                    const F a = v[i], b = v[i + half];
                    v[i] = a + b;
                    v[i + half] = a - b;
                }
        for (int i = 0; i < R; ++i) store(x + i * stride, v[i] * factor);
    }

    template <bool FIRST>
    static void pass(float* x, int64_t n, int64_t stride, int radix, float factor) {
        const F by = factor - F{};
        for (int64_t block = 0; block < n; block += radix * stride)
            for (int64_t at = 0; at < stride; at += W) {
                float* start = x + block + at;
                switch (radix) {
                    case 1: butterflies<1, FIRST>(start, stride, by); break;
                    case 2: butterflies<2, FIRST>(start, stride, by); break;
                    case 4: butterflies<4, FIRST>(start, stride, by); break;
                    default: butterflies<8, FIRST>(start, stride, by); break;
                }
            }
    }

    // n a power of two, in place.
    static void transform(float* x, int64_t n) {
        const float norm = float(1.0 / std::sqrt(double(n)));
        if (n < W) {
            for (int64_t half = 1; half < n; half *= 2)
                for (int64_t i = 0; i < n; ++i)
                    if (!(i & half)) {
                        const float a = x[i], b = x[i + half];
                        x[i] = a + b;
                        x[i + half] = a - b;
                    }
            for (int64_t i = 0; i < n; ++i) x[i] *= norm;
            return;
        }
        int64_t stride = W;
        int radix = int(least(8, n / W));
        pass<true>(x, n, stride, radix, radix * stride == n ? norm : 1.0f);
        for (stride *= radix; stride < n; stride *= radix) {
            radix = int(least(8, n / stride));
            pass<false>(x, n, stride, radix, radix * stride == n ? norm : 1.0f);
        }
    }
};

// +1 or -1 before window number `window`: the top bit of a hash of the coordinate (waterfill/codecs/hadamard.py,
// signs).
inline uint32_t sign_bit(int64_t coordinate, int window) {
    uint32_t mixed = uint32_t(coordinate + int64_t(window + 1) * 7919) * 0x9E3779B1u;
    mixed = (mixed ^ mixed >> 15) * 0x85EBCA77u;
    return mixed & 0x80000000u;
}

// The signs of the first 1536 coordinates for the three windows, made once.
struct Signs {
    uint32_t bit[3][kGroup + kGroup / 2];
    Signs() {
        for (int window = 0; window < 3; ++window)
            for (int64_t i = 0; i < kGroup + kGroup / 2; ++i) bit[window][i] = sign_bit(i, window);
    }
};

inline const Signs& signs() {
    static const Signs table;
    return table;
}

inline void flip(float* x, int64_t n, int window) {
    const uint32_t* bit = signs().bit[window];
    auto* word = reinterpret_cast<uint32_t*>(x);
    for (int64_t i = 0; i < n; ++i) {
        uint32_t value;
        std::memcpy(&value, word + i, 4);
        value ^= bit[i];
        std::memcpy(word + i, &value, 4);
    }
}

// Rotate one row in place, or undo it.
template <int W>
void rotate_row(float* row, int64_t width, bool inverse) {
    for (int64_t g = 0; g < groups_of(width); ++g) {
        float* x = row + g * kGroup;
        const int64_t size = group_stop(width, g) - g * kGroup;
        int64_t block = 1;
        while (2 * block <= size && block < kGroup) block *= 2;
        const int windows = block == size ? 1 : 3;
        for (int k = 0; k < windows; ++k) {
            const int window = inverse ? windows - 1 - k : k;
            const int64_t start = window == 1 ? size - block : 0;
            if (!inverse) flip(x, size, window);
            Hadamard<W>::transform(x + start, block);
            if (inverse) flip(x, size, window);
        }
    }
}

}  // namespace
}  // namespace waterfill

// Rows of keys and values on their way to codes (coded.hpp). Sums are those of layer_math.hpp, and the rest is done
// number by number, so that every instruction set gives the same codes.
#pragma once

#include <cmath>
#include <cstring>

#include "coded.hpp"
#include "hadamard.hpp"
#include "half.hpp"
#include "layer_math.hpp"
#include "layout.hpp"
#include "matrix.hpp"

namespace waterfill {
namespace {

constexpr float kMostHalf = 65504.0f;

// Sets code number i of a block's `n`.
inline void put_code(uint8_t* planes, int64_t n, int bits, int64_t i, int code) {
    for (int plane = 8; plane; plane /= 2) {
        if (!(bits & plane)) continue;
        const int64_t bytes = n * plane / 8;
        const int shift = int(i / bytes) * plane, mask = (1 << plane) - 1;
        uint8_t& byte = planes[i % bytes];
        byte = uint8_t((byte & ~(mask << shift)) | (code & mask) << shift);
        code >>= plane, planes += bytes;
    }
}

// The levels nearest to a rotated row: their codes, and themselves as floats.
inline void nearest_levels(const CodedSide& side, const float* x, int64_t d, uint8_t* codes, float* levels) {
    constexpr float round = 12582912.0f;
    if (side.bits == 8) {
        float largest = 0;
        for (int64_t i = 0; i < d; ++i) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
        const float by = largest > 1e-30f ? side.unit / largest : 0.0f;
        for (int64_t i = 0; i < d; ++i) levels[i] = (x[i] * by + round) - round;
        for (int64_t i = 0; i < d; ++i) codes[i] = uint8_t(int8_t(levels[i]));
        return;
    }
    const float rms = std::sqrt(dot16(x, x, d) / float(d)), by = rms > 1e-30f ? side.unit / rms : 0.0f;
    for (int64_t i = 0; i < d; ++i) levels[i] = x[i] * by, codes[i] = 0;
    for (int k = 1; k < 1 << side.bits; ++k) {
        const float between = 0.5f * float(side.levels[k - 1] + side.levels[k]);
        for (int64_t i = 0; i < d; ++i) codes[i] = uint8_t(codes[i] + (levels[i] > between));
    }
    for (int64_t i = 0; i < d; ++i) levels[i] = float(side.levels[codes[i]]);
}

// The scale with which levels / unit come nearest to x.
inline uint16_t scale_for(const CodedSide& side, const float* x, const float* levels, int64_t d) {
    const float squares = dot16(levels, levels, d), scale = dot16(x, levels, d) / squares * side.unit;
    if (!(squares > 0)) return 0;
    return float_to_half(scale < kMostHalf ? scale : kMostHalf);
}

// Floats of a row that is there as it is.
inline void whole_row(const CodedAttention& a, const CodedSide& side, int64_t position, float* out) {
    const int64_t d = a.head_dim;
    if (position >= a.pass_position) {
        std::memcpy(out, side.fresh + (position - a.pass_position) * side.fresh_stride, size_t(d) * sizeof(float));
        return;
    }
    const int64_t row = side.bits == 16 || position < a.first ? position : a.first + position % a.ring;
    if (a.half) {
        const uint16_t* from = static_cast<const uint16_t*>(side.whole) + row * d;
        for (int64_t i = 0; i < d; ++i) out[i] = bfloat_to_float(from[i]);
    } else {
        std::memcpy(out, static_cast<const float*>(side.whole) + row * d, size_t(d) * sizeof(float));
    }
}

// A head's row of token `position` -> its place among the codes. The row is changed.
template <int W>
void code_row(const CodedSide& side, bool along_tokens, float* x, int64_t d, int64_t position) {
    uint8_t codes[kMostHeadDim];
    float levels[kMostHeadDim];
    float magnitude = 0;
    for (int64_t i = 0; i < d; ++i) magnitude += std::fabs(x[i]);
    const int64_t at = position % kCodedTokens, n = kCodedTokens * d;
    uint8_t* block = side.blocks + position / kCodedTokens * coded_block_bytes(side.bits, d);
    uint16_t scale = 0x7e00;  // NaN
    std::memset(codes, 0, sizeof codes);
    if (magnitude < INFINITY) {
        rotate_row<W>(x, d, false);
        nearest_levels(side, x, d, codes, levels);
        scale = scale_for(side, x, levels, d);
    }
    std::memcpy(block + 2 * at, &scale, 2);
    for (int64_t i = 0; i < d; ++i)
        put_code(block + coded_scales_bytes(), n, side.bits, along_tokens ? i * kCodedTokens + at : at * d + i,
                 codes[i]);
}

// Rows of tokens from … to - 1 -> codes.
template <int W>
void code_rows(const CodedAttention& a, const CodedSide& side, bool along_tokens, int64_t from, int64_t to) {
    for (int64_t j = from; j < to; ++j) {
        float row[kMostHeadDim];
        whole_row(a, side, j, row);
        code_row<W>(side, along_tokens, row, a.head_dim, j);
    }
}

// To bfloat16 and back.
inline void round_row(float* x, int64_t d) {
    for (int64_t i = 0; i < d; ++i) x[i] = bfloat_to_float(float_to_bfloat(x[i]));
}

}  // namespace
}  // namespace waterfill

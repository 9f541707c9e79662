// Activations as integers, in the order that a table asks for (layout.hpp): x is about whole * scale.
#pragma once

#include <cmath>
#include <cstring>

#include "half.hpp"
#include "layout.hpp"

namespace waterfill {
namespace {

// Every ORDER-th column side by side, in runs of 64.
template <int ORDER, class Element>
inline void in_runs(const Element (&from)[kUnit], Element* to) {
    for (int64_t block = 0; block < kUnit; block += 64 * ORDER)
        for (int k = 0; k < ORDER; ++k)
            for (int64_t i = 0; i < 64; ++i) to[block + 64 * k + i] = from[block + ORDER * i + k];
}

// One row -> numbers of at most 127 or 2047, padded with zeros; scales and corrections [groups].
template <class Element>
inline void quantise_row(const float* row, int64_t width, int order, int bias, Element* out, float* scales,
                         int32_t* corrections) {
    constexpr float limit = sizeof(Element) == 1 ? 127.0f : 2047.0f;
    constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest whole number, ties to even
    for (int64_t g = 0; g < groups_of(width); ++g) {
        const int64_t start = g * kGroup, stop = group_stop(width, g);
        uint32_t magnitude = 0;  // compared as integers, where NaN is largest
        for (int64_t i = start; i < stop; ++i) {
            const uint32_t bits = float_to_bits(row[i]) & 0x7fffffff;
            magnitude = magnitude > bits ? magnitude : bits;
        }
        const float largest = bits_to_float(magnitude);
        const bool usable = largest > 1e-30f && magnitude < 0x7f800000;
        scales[g] = usable ? largest / limit : magnitude < 0x7f800000 ? 0.0f : NAN;
        const float by = usable ? limit / largest : 0.0f;
        int32_t sum = 0;
        const int64_t end = ceil_div(stop, kUnit) * kUnit;
        for (int64_t block = start; block < end; block += kUnit) {
            Element whole[kUnit] = {};
            const int64_t count = least(kUnit, stop - block);
            if (usable)
                for (int64_t i = 0; i < count; ++i) {
                    const int32_t value = int32_t((row[block + i] * by + round) - round);
                    whole[i] = Element(value);
                    sum += value;
                }
            switch (order) {
                case 2: in_runs<2>(whole, out + block); break;
                case 4: in_runs<4>(whole, out + block); break;
                default: std::memcpy(out + block, whole, sizeof whole);
            }
        }
        corrections[g] = -bias * sum;
    }
}

inline void quantise(const float* row, int64_t width, int order, int precision, int bias, void* out, float* scales,
                     int32_t* corrections) {
    if (precision == 8)
        quantise_row(row, width, order, bias, static_cast<int8_t*>(out), scales, corrections);
    else
        quantise_row(row, width, order, 0, static_cast<int16_t*>(out), scales, corrections);
}

}  // namespace
}  // namespace waterfill

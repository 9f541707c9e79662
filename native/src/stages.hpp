// A row of a nested matrix: stages added up, and rounded to levels whose largest is the largest weight of a group.
// `rounded` in waterfill/codecs/decoded.py is the same, to the bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.hpp"
#include "layout.hpp"
#include "matrix.hpp"

namespace waterfill {
namespace {

template <class Code>
void add_stage(const uint8_t* codes, float scale, int64_t count, float* sums) {
    constexpr int bias = sizeof(Code) == 2 ? 0x8000 : 0x80;
    for (int64_t i = 0; i < count; ++i) {
        Code code;
        std::memcpy(&code, codes + i * int64_t(sizeof code), sizeof code);
        sums[i] += float(int(code) - bias) * scale;
    }
}

template <class Code>
void round_levels(const float* sums, float step, int64_t count, uint8_t* codes) {
    constexpr int bias = sizeof(Code) == 2 ? 0x8000 : 0x80;
    constexpr float even = 0x1.8p23f;  // added and taken away again: to whole numbers, ties to even
    for (int64_t i = 0; i < count; ++i) {
        const float level = step > 0 ? sums[i] / step + even - even : 0.0f;
        const Code code = Code(int(level) + bias);
        std::memcpy(codes + i * int64_t(sizeof code), &code, sizeof code);
    }
}

// codes [width] of `bits` bits and scales [groups]; false if a number is infinite.
bool sum_stages(const StageRow* stages, int count, float gain, int64_t width, int bits, float* sums, uint8_t* codes,
                uint16_t* scales) {
    if (!std::isfinite(gain)) return false;
    std::memset(sums, 0, size_t(width) * sizeof(float));
    const float most = bits == 16 ? 2047.0f : 127.0f;
    for (int64_t g = 0; g < groups_of(width); ++g) {
        const int64_t first = g * kGroup, size = group_stop(width, g) - first;
        float* own = sums + first;
        for (int s = 0; s < count; ++s) {
            const float scale = half_to_float(stages[s].scales[g]);
            if (stages[s].wide)
                add_stage<uint16_t>(stages[s].codes + 2 * first, scale, size, own);
            else
                add_stage<uint8_t>(stages[s].codes + first, scale, size, own);
        }
        float largest = 0;
        for (int64_t i = 0; i < size; ++i) {
            own[i] *= gain;
            const float magnitude = std::fabs(own[i]);
            largest = magnitude > largest ? magnitude : largest;
        }
        scales[g] = float_to_half(largest / most * (1 + 0x1p-10f) + 0x1p-25f);
        if (scales[g] == 0x7c00) return false;
        const float step = half_to_float(scales[g]);
        if (bits == 16)
            round_levels<uint16_t>(own, step, size, codes + 2 * first);
        else
            round_levels<uint8_t>(own, step, size, codes + first);
    }
    return true;
}

}  // namespace
}  // namespace waterfill

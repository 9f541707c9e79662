// Conversions between float and the 16-bit formats, in portable code but where an instruction does what is most often
// needed.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include "intrinsics.hpp"
#endif

namespace waterfill {
namespace {

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float half_to_float(uint16_t half) {
#if defined(__F16C__)
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
#else
    const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x0400) return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
    const float subnormal = float(magnitude) * 0x1p-24f;
    return sign ? -subnormal : subnormal;
#endif
}

inline float bfloat_to_float(uint16_t value) { return bits_to_float(uint32_t(value) << 16); }

// To nearest, ties to even; infinities and NaN stay what they are.
inline uint16_t float_to_bfloat(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint16_t rounded = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    return (bits & 0x7fffffff) > 0x7f800000 ? uint16_t(0x7fc0) : rounded;
}

inline uint16_t float_to_half(float value) {
    const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65536 or more
    if (magnitude < 0x38800000) {  // subnormal: adding one half of 2^-13 lets the float unit round to steps of 2^-24
        const uint32_t steps = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
        return uint16_t(sign | steps);
    }
    return uint16_t(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13);
}

}  // namespace
}  // namespace waterfill

// Many tokens: 32 rows are decoded once and multiplied with all of them, vpdpbusd (or vpdpwssd) on full registers.
//
//     decode_tile x 8  ->  rows [32][positions]  --transpose 4-byte words-->  [position / 4][32 rows][4 bytes]
//     12 tokens x 32 rows of accumulators; activations are broadcast four bytes at a time, lanes are rows
#pragma once

#include "intrinsics.hpp"
#include "kernels.hpp"

namespace waterfill {
namespace {

constexpr int kRows = 32;    // of a block: two registers
constexpr int kTokens = 12;  // of a block: 24 accumulators

inline int64_t gemm_scratch(int64_t stride, int64_t tokens) {
    const int64_t group = 2 * (kGroup + kGroup / 2 + kUnit) * kRows;  // transposed, words of 16 bits
    return stride * kRows + group + tokens * kRows * int64_t(sizeof(float)) + 3 * 64;
}

// 16 rows of 64 bytes -> 16 registers, each with the same four bytes of all rows.
inline void transpose16(const uint8_t* rows, int64_t stride, uint8_t* out, int64_t out_stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows + i * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; ++k) {
            a[i + 2 * k] = _mm512_unpacklo_epi64(b[i + k], b[i + k + 2]);
            a[i + 2 * k + 1] = _mm512_unpackhi_epi64(b[i + k], b[i + k + 2]);
        }
    for (int i = 0; i < 4; ++i) {  // a[i], a[4+i], a[8+i], a[12+i]: word i of each 128-bit lane, for 4 rows each
        b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
        b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
        _mm512_storeu_si512(out + (8 + i) * out_stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
        _mm512_storeu_si512(out + (4 + i) * out_stride, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88));
        _mm512_storeu_si512(out + (12 + i) * out_stride, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xdd));
    }
}

// Written as assembly: with the intrinsics GCC 12 copies and spills accumulators.
template <class Element>
inline __m512i accumulate(__m512i acc, __m512i w, __m512i x) {
    if constexpr (sizeof(Element) == 1)
        asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    else
        asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
}

// TOKENS x 32 sums over `bytes` of each row, added as floats.
template <class Element, int TOKENS>
inline void gemm_block(const uint8_t* w, const uint8_t* x, int64_t x_stride, int64_t bytes, const int32_t* start,
                       int64_t start_stride, float (*sum)[kRows]) {
    __m512i acc[TOKENS][2];
    for (int t = 0; t < TOKENS; ++t)
        acc[t][0] = acc[t][1] = _mm512_set1_epi32(sizeof(Element) == 1 ? start[t * start_stride] : 0);
    for (int64_t at = 0; at < bytes; at += 4, w += 4 * kRows) {
        const __m512i low = _mm512_load_si512(w), high = _mm512_load_si512(w + 64);
        for (int t = 0; t < TOKENS; ++t) {
            int32_t four;
            std::memcpy(&four, x + t * x_stride + at, 4);
            const __m512i all = _mm512_set1_epi32(four);
            acc[t][0] = accumulate<Element>(acc[t][0], low, all);
            acc[t][1] = accumulate<Element>(acc[t][1], high, all);
        }
    }
    for (int t = 0; t < TOKENS; ++t)
        for (int k = 0; k < 2; ++k) {
            float* to = sum[t] + 16 * k;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_cvtepi32_ps(acc[t][k])));
        }
}

template <class Element>
inline void gemm_tokens(int tokens, const uint8_t* w, const uint8_t* x, int64_t x_stride, int64_t bytes,
                        const int32_t* start, int64_t start_stride, float (*sum)[kRows]) {
    while (tokens > 0) {
        const int count = tokens >= 12 ? 12 : tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1;
        switch (count) {
            case 12: gemm_block<Element, 12>(w, x, x_stride, bytes, start, start_stride, sum); break;
            case 4: gemm_block<Element, 4>(w, x, x_stride, bytes, start, start_stride, sum); break;
            case 2: gemm_block<Element, 2>(w, x, x_stride, bytes, start, start_stride, sum); break;
            default: gemm_block<Element, 1>(w, x, x_stride, bytes, start, start_stride, sum); break;
        }
        tokens -= count, x += count * x_stride, start += count * start_stride, sum += count;
    }
}

template <class K, class Element>
void gemm_avx512(const Matrix& m, const Prepared& x, int64_t first_tile, int64_t last_tile, float* y,
                 uint8_t* scratch) {
    constexpr int64_t size = sizeof(Element);
    const auto buffer = K::buffer_in(nullptr, m, x);
    const int64_t stride = buffer.stride, groups = x.groups;
    uint8_t* rows = scratch;
    uint8_t* transposed = rows + stride * kRows;
    float* total = reinterpret_cast<float*>(transposed + ceil_div(2 * (kGroup + kGroup / 2 + kUnit) * kRows, 64) * 64);
    for (int64_t tile = first_tile; tile < last_tile; tile += kRows / kTile) {
        const int64_t tiles = least(kRows / kTile, last_tile - tile);
        for (int64_t i = 0; i < tiles; ++i) K::decode_tile(m, tile + i, rows + i * kTile * stride, stride);
        std::memset(total, 0, size_t(x.tokens * kRows) * sizeof(float));
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t from = g * kGroup * size,
                          to = g + 1 < groups ? from + kGroup * size : buffer.positions * size;
            for (int64_t at = from; at < to; at += 64)
                for (int half = 0; half < 2; ++half)
                    transpose16(rows + half * 16 * stride + at, stride, transposed + (at - from) * kRows + half * 64,
                                4 * kRows);
            alignas(64) float scale[kRows] = {};
            for (int r = 0; r < tiles * kTile; ++r)
                scale[r] = half_to_float(m.scales[((tile + r / kTile) * groups + g) * kTile + r % kTile]) * m.step;
            const int64_t part = size == 1 ? to - from : kExactWords * size;
            for (int64_t t = 0; t < x.tokens; t += kTokens) {
                const int count = int(least(kTokens, x.tokens - t));
                alignas(64) float sum[kTokens][kRows] = {};
                for (int64_t at = from; at < to; at += part)
                    gemm_tokens<Element>(count, transposed + (at - from) * kRows, x.data + t * x.padded * size + at,
                                         x.padded * size, least(part, to - at), x.corrections + t * groups + g, groups,
                                         sum);
                for (int i = 0; i < count; ++i) {
                    const float by = x.scales[(t + i) * groups + g];
                    float* add = total + (t + i) * kRows;
                    for (int r = 0; r < kRows; ++r) add[r] += sum[i][r] * (scale[r] * by);
                }
            }
        }
        const int64_t row = tile * kTile, kept = least(tiles * kTile, m.rows - row);
        for (int64_t t = 0; t < x.tokens; ++t)
            std::memcpy(y + t * m.rows + row, total + t * kRows, size_t(kept) * sizeof(float));
    }
}

}  // namespace
}  // namespace waterfill

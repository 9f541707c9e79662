// Products by way of a buffer: rows are decoded once, and multiplied with as many tokens as there are.
#pragma once

#include <cstring>

#include "decode.hpp"
#include "half.hpp"
#include "layout.hpp"
#include "matrix.hpp"

namespace waterfill {
namespace {

constexpr int64_t kExactWords = 512;  // products of 2047 * 2047 that surely fit an int32 sum

template <class Isa>
struct Buffered : Decoding<Isa> {
    using Decoding<Isa>::decode_tile;
    using Bytes = typename Isa::Bytes;
    using Acc = typename Isa::Acc;

    template <class Element>
    static const Element* row(const Prepared& x, int64_t t) {
        return reinterpret_cast<const Element*>(x.data) + t * x.padded;
    }

    static void scatter(const Matrix& m, const float* out, int64_t tile, int64_t token, int64_t tokens, float* y) {
        const int64_t row = tile * kTile, rows = least(kTile, m.rows - row);
        for (int64_t t = 0; t < tokens; ++t) {
            float* to = y + (token + t) * m.rows + row;
            if (rows == kTile)
                std::memcpy(to, out + t * kTile, kTile * sizeof(float));
            else
                std::memcpy(to, out + t * kTile, size_t(rows) * sizeof(float));
        }
    }

    // Sums of one group, `positions` long, for four rows and some tokens, as exact as float sums of exact parts can be.
    template <class Element, bool UNSIGNED, int TOKENS>
    static void group_sums(const uint8_t* rows, int64_t stride, const Element* const (&x)[TOKENS], int64_t positions,
                           const int32_t (&start)[TOKENS], float (&sum)[TOKENS][kTile]) {
        constexpr int64_t step = 64 / int64_t(sizeof(Element)), part = sizeof(Element) == 1 ? 4 * kGroup : kExactWords;
        for (int64_t from = 0; from < positions; from += part) {
            Acc acc[TOKENS][kTile];
            WF_UNROLL for (int t = 0; t < TOKENS; ++t) WF_UNROLL for (int r = 0; r < kTile; ++r) acc[t][r] =
                Isa::start(start[t]);
            for (int64_t at = from; at < least(positions, from + part); at += step)
                WF_UNROLL for (int r = 0; r < kTile; ++r) {
                    const Bytes w = Isa::load(rows + r * stride + at * int64_t(sizeof(Element)));
                    WF_UNROLL for (int t = 0; t < TOKENS; ++t) {
                        if constexpr (sizeof(Element) == 2)
                            acc[t][r] = Isa::dot_words(acc[t][r], w, x[t] + at);
                        else if constexpr (UNSIGNED)
                            acc[t][r] = Isa::template dot_unsigned<Isa>(acc[t][r], w, x[t] + at);
                        else
                            acc[t][r] = Isa::dot(acc[t][r], w, x[t] + at);
                    }
                }
            for (int t = 0; t < TOKENS; ++t) {
                int32_t whole[kTile];
                Isa::reduce(acc[t], whole);
                for (int r = 0; r < kTile; ++r) sum[t][r] += float(whole[r]);
            }
        }
    }

    // Some tiles' rows, decoded, and what a unit of each row's groups is worth.
    struct Buffer {
        int64_t tiles, stride;  // at most; bytes of a row
        int64_t positions;      // of a row that are multiplied, not counting what only pads it
        uint8_t* rows;          // [tiles][kTile][stride]
        float* factors;         // [tiles][groups][kTile]
    };

    static Buffer buffer_in(uint8_t* scratch, const Matrix& m, const Prepared& x) {
        constexpr int64_t most_bytes = 1 << 14, most_tiles = 8;  // that stay in a cache while many tokens pass
        const int64_t decoded = chunks_per_row(m.width, m.table->p) * kChunk * m.table->p;
        const int64_t stride = ceil_div(most(x.padded, decoded) * m.table->precision / 8 + 64, 64) * 64;
        const int64_t tiles = x.tokens > 1 ? most(1, least(most_tiles, most_bytes / (stride * kTile))) : 1;
        return {tiles, stride, least(x.padded, decoded), scratch,
                reinterpret_cast<float*>(scratch + tiles * kTile * stride)};
    }

    static void fill(const Buffer& b, const Matrix& m, int64_t first_tile, int64_t tiles, int64_t groups) {
        for (int64_t i = 0; i < tiles; ++i) decode_tile(m, first_tile + i, b.rows + i * kTile * b.stride, b.stride);
        const uint16_t* scale = m.scales + first_tile * groups * kTile;
        for (int64_t i = 0; i < tiles * groups * kTile; ++i) b.factors[i] = half_to_float(scale[i]) * m.step;
    }

    // Tile number `i` of the buffer times some tokens, from `token` on: sums [TOKENS][kTile].
    template <class Element, bool UNSIGNED, int TOKENS>
    static void dots_from_buffer(const Buffer& b, int64_t i, const Prepared& x, int64_t token, float* sums) {
        float out[TOKENS][kTile] = {};
        const uint8_t* rows = b.rows + i * kTile * b.stride;
        const float* factor = b.factors + i * x.groups * kTile;
        for (int64_t g = 0; g < x.groups; ++g, factor += kTile) {
            const int64_t from = g * kGroup, to = g + 1 < x.groups ? from + kGroup : b.positions;
            const Element* activations[TOKENS];
            int32_t start[TOKENS];
            for (int t = 0; t < TOKENS; ++t) {
                activations[t] = row<Element>(x, token + t) + from;
                start[t] = sizeof(Element) == 1 ? x.corrections[(token + t) * x.groups + g] : 0;
            }
            float sum[TOKENS][kTile] = {};
            group_sums<Element, UNSIGNED, TOKENS>(rows + from * int64_t(sizeof(Element)), b.stride, activations,
                                                  to - from, start, sum);
            for (int t = 0; t < TOKENS; ++t) {
                const float by = x.scales[(token + t) * x.groups + g];
                for (int r = 0; r < kTile; ++r) out[t][r] += sum[t][r] * (factor[r] * by);
            }
        }
        std::memcpy(sums, out, sizeof out);
    }

    template <class Element, bool UNSIGNED>
    static void through_buffer_of(const Matrix& m, const Prepared& x, int64_t first_tile, int64_t last_tile, float* y,
                                  uint8_t* scratch) {
        const Buffer b = buffer_in(scratch, m, x);
        float sums[2 * kTile];
        for (int64_t tile = first_tile; tile < last_tile; tile += b.tiles) {
            const int64_t tiles = least(b.tiles, last_tile - tile);
            fill(b, m, tile, tiles, x.groups);
            for (int64_t token = 0; token < x.tokens;) {
                const int count = x.tokens - token > 1 ? 2 : 1;
                for (int64_t i = 0; i < tiles; ++i) {
                    (count == 2 ? dots_from_buffer<Element, UNSIGNED, 2>
                                : dots_from_buffer<Element, UNSIGNED, 1>)(b, i, x, token, sums);
                    scatter(m, sums, tile + i, token, count, y);
                }
                token += count;
            }
        }
    }

    static void through_buffer(const Matrix& m, const Prepared& x, int64_t first_tile, int64_t last_tile, float* y,
                               uint8_t* scratch) {
        (m.table->precision == 16 ? through_buffer_of<int16_t, false>
         : m.table->halves        ? through_buffer_of<int8_t, true>
                                  : through_buffer_of<int8_t, false>)(m, x, first_tile, last_tile, y, scratch);
    }

    static int64_t scratch_bytes(const Matrix& m, const Prepared& x) {
        const Buffer b = buffer_in(nullptr, m, x);
        return b.tiles * kTile * (b.stride + x.groups * int64_t(sizeof(float))) +
               Isa::gemm_scratch_bytes(b.stride, x.tokens);
    }
};

}  // namespace
}  // namespace waterfill

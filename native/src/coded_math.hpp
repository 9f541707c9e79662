// Coding of keys and values, and attention to them from their codes (coded.hpp): scores and weighted sums are products
// of whole numbers, of levels with queries or weights of 16 bits, and exact; floats between them come in one order.
// Hence every instruction set gives the same bits, however a text is cut into passes.
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

constexpr int64_t kTileNumbers = 4096;  // decoded at a time, which stay in the first cache
constexpr float kMostHalf = 65504.0f;

// Numbers of 16 bits for floats, and what one unit of them is; NaN where a float is none.
inline float to_words(const float* x, int64_t count, int16_t* out) {
    constexpr float round = 12582912.0f;  // as in prepare.hpp
    uint32_t magnitude = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = float_to_bits(x[i]) & 0x7fffffff;
        magnitude = magnitude > bits ? magnitude : bits;
    }
    const float largest = bits_to_float(magnitude);
    const bool usable = largest > 1e-30f && magnitude < 0x7f800000;
    const float by = usable ? 32767.0f / largest : 0.0f;
    for (int64_t i = 0; i < count; ++i) out[i] = usable ? int16_t(int32_t((x[i] * by + round) - round)) : int16_t(0);
    return usable ? largest / 32767.0f : magnitude < 0x7f800000 ? 0.0f : NAN;
}

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

template <class Isa>
struct CodedHead {
    using Bytes = typename Isa::Bytes;
    using Acc = typename Isa::Acc;
    using Octets = typename Isa::Octets;
    static constexpr int64_t kOctets = sizeof(Octets);

    static Octets load(const uint8_t* p) {
        Octets o;
        std::memcpy(&o, p, sizeof o);
        return o;
    }

    // A plane's fields of codes i … i + kOctets - 1 of a block's n.
    template <int PLANE>
    static Octets fields(const uint8_t* plane, int64_t n, int64_t i) {
        typedef uint16_t Pairs __attribute__((vector_size(sizeof(Octets))));
        const int64_t bytes = n * PLANE / 8;
        const Octets all = load(plane + i % bytes);  // bits of a neighbour come along
        return Octets(Pairs(all) >> uint16_t(i / bytes * PLANE)) & uint8_t((1 << PLANE) - 1);
    }

    // Levels of codes `from` … `from` + count - 1 of a block's n, which are whole vectors.
    template <int BITS>
    static void levels_of(const int8_t* table, const uint8_t* planes, int64_t n, int64_t from, int64_t count,
                          int8_t* out) {
        uint8_t entries[2][16] = {};
        std::memcpy(entries, table, size_t(1) << BITS);
        const Octets low = Isa::repeated(entries[0]), high = Isa::repeated(entries[1]);
        for (int64_t i = 0; i < count; i += kOctets) {
            Octets level;
            if constexpr (BITS == 3) {
                const Octets top = fields<1>(planes + n / 4, n, from + i);
                level = Isa::look_up(low, fields<2>(planes, n, from + i) | (top + top + top + top));
            } else {
                const Octets code = fields<4>(planes, n, from + i);
                level = Isa::look_up(low, code);
                if constexpr (BITS == 5) {
                    const Octets upper = Octets{} - fields<1>(planes + n / 2, n, from + i);
                    level = (level & ~upper) | (Isa::look_up(high, code) & upper);
                }
            }
            std::memcpy(out + i, &level, sizeof level);
        }
    }

    // Rows first … first + rows - 1 of a block's levels [n / width][width], as numbers of 16 bits, padded with zeros.
    static void decode(const CodedSide& side, const uint8_t* block, int64_t n, int64_t width, int64_t first,
                       int64_t rows, int16_t* tile) {
        alignas(64) int8_t bytes[kTileNumbers];
        const uint8_t* planes = block + coded_scales_bytes();
        const int64_t from = first * width, count = rows * width, padded = row_of_words(width);
        const int8_t* levels = bytes;
        switch (side.bits) {
            case 3: levels_of<3>(side.levels, planes, n, from, count, bytes); break;
            case 4: levels_of<4>(side.levels, planes, n, from, count, bytes); break;
            case 5: levels_of<5>(side.levels, planes, n, from, count, bytes); break;
            default: levels = reinterpret_cast<const int8_t*>(planes) + from;
        }
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < width; ++i) tile[r * padded + i] = levels[r * width + i];
            for (int64_t i = width; i < padded; ++i) tile[r * padded + i] = 0;
        }
    }

    // use(number of the vector, row, sums of kTile rows) for the rows of a tile times `count` vectors, both `width`
    // numbers of 16 bits, padded.
    template <int VECTORS, class Use>
    static void multiply_some(const int16_t* tile, int64_t rows, int64_t width, const int16_t* x, int64_t number,
                              const Use& use) {
        for (int64_t row = 0; row < rows; row += kTile) {
            Acc acc[VECTORS][kTile];
            WF_UNROLL for (int v = 0; v < VECTORS; ++v) WF_UNROLL for (int r = 0; r < kTile; ++r) acc[v][r] =
                Isa::start(0);
            for (int64_t at = 0; at < width; at += 32) WF_UNROLL for (int r = 0; r < kTile; ++r) {
                    const Bytes w = Isa::load(tile + (row + r) * width + at);
                    WF_UNROLL for (int v = 0; v < VECTORS; ++v) acc[v][r] =
                        Isa::dot_words(acc[v][r], w, x + (number + v) * width + at);
                }
            WF_UNROLL for (int v = 0; v < VECTORS; ++v) {
                int32_t sums[kTile];
                Isa::reduce(acc[v], sums);
                use(number + v, row, sums);
            }
        }
    }
    template <class Use>
    static void multiply(const int16_t* tile, int64_t rows, int64_t width, const int16_t* x, int64_t count,
                         const Use& use) {
        int64_t number = 0;
        for (; number + 2 <= count; number += 2) multiply_some<2>(tile, rows, width, x, number, use);
        if (number < count) multiply_some<1>(tile, rows, width, x, number, use);
    }

    // Behind the last token that token t sees from codes, and the first that it sees at all.
    static int64_t coded_end(const CodedAttention& a, int64_t t) {
        return most(most(a.position + t - a.recent + 1, a.kept_from), a.first);
    }
    static int64_t first_seen(const CodedAttention& a, int64_t t) { return most(0, a.position + t - a.window + 1); }

    // use(position, first token, end token) for rows that are seen as they are, in order.
    template <class Use>
    static void each_whole(const CodedAttention& a, const CodedSide& side, const Use& use) {
        const int64_t end = a.position + a.tokens;
        auto span = [&](int64_t from, int64_t to, int64_t window) {
            for (int64_t j = most(from, a.position - window + 1); j < to; ++j) {
                const int64_t before = j - a.position;  // the token itself is the first that sees it
                use(j, most(0, before), least(a.tokens, before + window));
            }
        };
        if (side.bits == 16) return span(0, end, a.window);
        span(0, least(a.first, end), a.window);
        span(most(a.first, a.kept_from), end, least(a.window, a.recent));
    }

    // use(block, its scales, first and end of the tokens of it that some query sees from codes)
    template <class Use>
    static void each_block(const CodedAttention& a, const CodedSide& side, const Use& use) {
        if (side.bits == 16) return;
        const int64_t from = most(a.first, first_seen(a, 0)), to = coded_end(a, a.tokens - 1);
        const int64_t size = coded_block_bytes(side.bits, a.head_dim);
        for (int64_t start = from / kCodedTokens * kCodedTokens; start < to; start += kCodedTokens) {
            const uint8_t* block = side.blocks + start / kCodedTokens * size;
            float scales[kCodedTokens];
            const int64_t first = most(0, from - start), end = least(kCodedTokens, to - start);
            uint16_t half[kCodedTokens];
            std::memcpy(half, block, sizeof half);
            for (int64_t j = first; j < end; ++j) scales[j] = half_to_float(half[j]) / side.unit;
            use(block, start, scales, first, end);
        }
    }

    // Scores of all queries [tokens][queries][all]: those from codes first, which those of whole rows then replace.
    static void score(const CodedAttention& a, int64_t from, int64_t all, const CodedScratch& memory) {
        const int64_t d = a.head_dim, count = a.tokens * a.queries, padded = row_of_words(d);
        float row[kMostHeadDim], *scores = memory.scores, *units = memory.units;
        int16_t* words = memory.words;
        if (a.keys.bits != 16 && coded_end(a, a.tokens - 1) > most(a.first, from))
            for (int64_t n = 0; n < count; ++n) {
                std::memcpy(row, a.q + n / a.queries * a.stride + n % a.queries * d, size_t(d) * sizeof(float));
                rotate_row<Isa::lanes>(row, d, false);
                std::memset(words + n * padded + d, 0, size_t(padded - d) * sizeof(int16_t));
                units[n] = to_words(row, d, words + n * padded) * a.scaling;
            }
        each_block(
            a, a.keys, [&](const uint8_t* block, int64_t start, const float* scales, int64_t first, int64_t end) {
                alignas(64) int16_t tile[kTileNumbers];
                const int64_t rows = kTileNumbers / padded / kTile * kTile;
                for (int64_t at = first / kTile * kTile; at < end; at += rows) {
                    const int64_t some = least(rows, ceil_div(end - at, kTile) * kTile);
                    decode(a.keys, block, kCodedTokens * d, d, at, some, tile);
                    multiply(tile, some, padded, words, count, [&](int64_t n, int64_t r, const int32_t(&sums)[kTile]) {
                        float* to = scores + n * all + start - from;
                        for (int64_t k = 0, j = at + r; k < kTile; ++k, ++j)
                            if (j >= first && j < end) to[j] = float(sums[k]) * (scales[j] * units[n]);
                    });
                }
            });
        each_whole(a, a.keys, [&](int64_t j, int64_t t, int64_t end) {
            whole_row(a, a.keys, j, row);
            for (; t < end; ++t)
                for (int64_t q = 0; q < a.queries; ++q)
                    scores[(t * a.queries + q) * all + j - from] =
                        dot16(a.q + t * a.stride + q * d, row, d) * a.scaling;
        });
    }

    // Values by their weights: sums of codes in the rotated basis [tokens][queries][head_dim], rotated back.
    static void mix_coded(const CodedAttention& a, int64_t from, int64_t all, const CodedScratch& memory) {
        const int64_t d = a.head_dim, count = a.tokens * a.queries;
        float *sums = memory.sums, *units = memory.units;
        int16_t* words = memory.words;
        std::memset(sums, 0, size_t(count * d) * sizeof(float));
        bool any = false;
        each_block(a, a.values,
                   [&](const uint8_t* block, int64_t start, const float* scales, int64_t first, int64_t end) {
                       alignas(64) int16_t tile[kTileNumbers];
                       float products[kCodedTokens];
                       any = true;
                       for (int64_t n = 0; n < count; ++n) {
                           const int64_t t = n / a.queries, low = most(first, first_seen(a, t) - start),
                                         high = least(end, coded_end(a, t) - start);
                           std::memset(products, 0, sizeof products);
                           for (int64_t j = low; j < high; ++j)
                               products[j] = memory.scores[n * all + start - from + j] * scales[j];
                           units[n] = to_words(products, kCodedTokens, words + n * kCodedTokens);
                       }
                       constexpr int64_t rows = kTileNumbers / kCodedTokens;
                       for (int64_t at = 0; at < d; at += rows) {
                           const int64_t some = least(rows, d - at);
                           decode(a.values, block, kCodedTokens * d, kCodedTokens, at, some, tile);
                           multiply(tile, some, kCodedTokens, words, count,
                                    [&](int64_t n, int64_t r, const int32_t(&whole)[kTile]) {
                                        float* to = sums + n * d + at + r;
                                        for (int k = 0; k < kTile; ++k) to[k] += float(whole[k]) * units[n];
                                    });
                       }
                   });
        if (any)
            for (int64_t n = 0; n < count; ++n) rotate_row<Isa::lanes>(sums + n * d, d, true);
    }

    static void attend(const CodedAttention& a, const CodedScratch& memory) {
        const int64_t d = a.head_dim, from = first_seen(a, 0), all = a.position + a.tokens - from;
        float *scores = memory.scores, *sums = memory.sums;
        score(a, from, all, memory);
        for (int64_t t = 0; t < a.tokens; ++t)
            for (int64_t q = 0; q < a.queries; ++q)
                softmax(scores + (t * a.queries + q) * all + first_seen(a, t) - from,
                        a.position + t + 1 - first_seen(a, t));
        mix_coded(a, from, all, memory);
        for (int64_t t = 0; t < a.tokens; ++t)
            std::memcpy(a.out + t * a.stride, sums + t * a.queries * d, size_t(a.queries * d) * sizeof(float));
        each_whole(a, a.values, [&](int64_t j, int64_t t, int64_t end) {
            float row[kMostHeadDim];
            whole_row(a, a.values, j, row);
            for (; t < end; ++t)
                for (int64_t q = 0; q < a.queries; ++q) {
                    const float weight = scores[(t * a.queries + q) * all + j - from];
                    float* out = a.out + t * a.stride + q * d;
                    for (int64_t i = 0; i < d; ++i) out[i] += weight * row[i];
                }
        });
    }
};

}  // namespace
}  // namespace waterfill

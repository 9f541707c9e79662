// Attention to coded keys and values from their codes (coded.hpp): scores and weighted sums are products of whole
// numbers, of levels with queries or weights of 16 bits, and exact; floats between them come in one order. Hence every
// instruction set gives the same bits, however a text is cut into passes.
#pragma once

#include <cmath>
#include <cstring>

#include "coded_rows.hpp"
#include "coded_tiles.hpp"

namespace waterfill {
namespace {

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

// Behind the last token that token t of the queries sees from codes, and the first that it sees at all.
inline int64_t coded_end(const CodedAttention& a, int64_t t) {
    return most(most(a.position + t - a.recent + 1, a.kept_from), a.first);
}
inline int64_t first_seen(const CodedAttention& a, int64_t t) { return most(0, a.position + t - a.window + 1); }

// use(position, first token, end token) for rows that are seen as they are, in order.
template <class Use>
inline void each_whole(const CodedAttention& a, const CodedSide& side, const Use& use) {
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

// Of a head's block from token `start` on: those from `first` to `end`, counted from there, that some query sees.
struct CodedBlock {
    const uint8_t* data;
    int64_t start, first, end;
    float scales[kCodedTokens];  // of levels; of those that are seen
};

template <class Use>
inline void each_block(const CodedAttention& a, const CodedSide& side, const Use& use) {
    if (side.bits == 16) return;
    const int64_t from = most(a.first, first_seen(a, 0)), to = coded_end(a, a.tokens - 1);
    for (int64_t start = from / kCodedTokens * kCodedTokens; start < to; start += kCodedTokens) {
        CodedBlock b;
        b.data = side.blocks + start / kCodedTokens * coded_block_bytes(side.bits, a.head_dim);
        b.start = start, b.first = most(0, from - start), b.end = least(kCodedTokens, to - start);
        uint16_t half[kCodedTokens];
        std::memcpy(half, b.data, sizeof half);
        for (int64_t j = b.first; j < b.end; ++j) b.scales[j] = half_to_float(half[j]) / side.unit;
        use(b);
    }
}

template <class Isa>
struct CodedHead {
    using Tiles = CodedTiles<Isa>;

    // What the queries and values of a, and their results, have in common.
    const CodedAttention& a;
    const CodedScratch& memory;
    const int64_t d = a.head_dim, count = a.tokens * a.queries, words = row_of_words(d);
    const int64_t from = first_seen(a, 0), seen = a.position + a.tokens - from;

    const float* query(int64_t n) const { return a.q + n / a.queries * a.stride + n % a.queries * d; }

    void rotate_queries() const {
        for (int64_t n = 0; n < count; ++n) {
            float row[kMostHeadDim];
            std::memcpy(row, query(n), size_t(d) * sizeof(float));
            rotate_row<Isa::lanes>(row, d, false);
            std::memset(memory.words + n * words + d, 0, size_t(words - d) * sizeof(int16_t));
            memory.units[n] = to_words(row, d, memory.words + n * words) * a.scaling;
        }
    }

    void score_block(const CodedBlock& b) const {
        alignas(64) int16_t tile[kTileNumbers];
        const int64_t rows = kTileNumbers / words / kTile * kTile;
        for (int64_t at = b.first / kTile * kTile; at < b.end; at += rows) {
            const int64_t some = least(rows, ceil_div(b.end - at, kTile) * kTile);
            Tiles::decode(a.keys, b.data, kCodedTokens * d, d, at, some, tile);
            Tiles::multiply(tile, some, words, memory.words, count, memory.products);
            for (int64_t n = 0; n < count; ++n) {
                const int32_t* products = memory.products + n * some - at;
                float* to = memory.scores + n * seen + b.start - from;
                for (int64_t j = most(b.first, at); j < least(b.end, at + some); ++j)
                    to[j] = float(products[j]) * (b.scales[j] * memory.units[n]);
            }
        }
    }

    // Those from codes first, which those of whole rows then replace where a token sees a row as it is.
    void score() const {
        if (a.keys.bits != 16) rotate_queries();
        each_block(a, a.keys, [&](const CodedBlock& b) { score_block(b); });
        each_whole(a, a.keys, [&](int64_t j, int64_t t, int64_t end) {
            float row[kMostHeadDim];
            whole_row(a, a.keys, j, row);
            for (int64_t n = t * a.queries; n < end * a.queries; ++n)
                memory.scores[n * seen + j - from] = dot16(query(n), row, d) * a.scaling;
        });
    }

    // Weights of a block's tokens times their values' scales, of each query, as whole numbers.
    void weigh(const CodedBlock& b) const {
        for (int64_t n = 0; n < count; ++n) {
            const int64_t t = n / a.queries, low = most(b.first, first_seen(a, t) - b.start),
                          high = least(b.end, coded_end(a, t) - b.start);
            const float* weights = memory.scores + n * seen + b.start - from;
            float shares[kCodedTokens] = {};
            for (int64_t j = low; j < high; ++j) shares[j] = weights[j] * b.scales[j];
            memory.units[n] = to_words(shares, kCodedTokens, memory.words + n * kCodedTokens);
        }
    }

    void mix_block(const CodedBlock& b) const {
        alignas(64) int16_t tile[kTileNumbers];
        constexpr int64_t rows = kTileNumbers / kCodedTokens;
        weigh(b);
        for (int64_t at = 0; at < d; at += rows) {
            const int64_t some = least(rows, d - at);
            Tiles::decode(a.values, b.data, kCodedTokens * d, kCodedTokens, at, some, tile);
            Tiles::multiply(tile, some, kCodedTokens, memory.words, count, memory.products);
            for (int64_t n = 0; n < count; ++n) {
                const int32_t* products = memory.products + n * some;
                float* to = memory.sums + n * d + at;
                for (int64_t i = 0; i < some; ++i) to[i] += float(products[i]) * memory.units[n];
            }
        }
    }

    // Values by their weights, from codes in the rotated basis, and then as they are.
    void mix() const {
        bool any = false;
        std::memset(memory.sums, 0, size_t(count * d) * sizeof(float));
        each_block(a, a.values, [&](const CodedBlock& b) { mix_block(b), any = true; });
        for (int64_t n = 0; any && n < count; ++n) rotate_row<Isa::lanes>(memory.sums + n * d, d, true);
        each_whole(a, a.values, [&](int64_t j, int64_t t, int64_t end) {
            float row[kMostHeadDim];
            whole_row(a, a.values, j, row);
            for (int64_t n = t * a.queries; n < end * a.queries; ++n) {
                const float weight = memory.scores[n * seen + j - from];
                for (int64_t i = 0; i < d; ++i) memory.sums[n * d + i] += weight * row[i];
            }
        });
    }

    void run() const {
        score();
        for (int64_t n = 0; n < count; ++n) {
            const int64_t t = n / a.queries, first = first_seen(a, t);
            softmax(memory.scores + n * seen + first - from, a.position + t + 1 - first);
        }
        mix();
        for (int64_t t = 0; t < a.tokens; ++t)
            std::memcpy(a.out + t * a.stride, memory.sums + t * a.queries * d, size_t(a.queries * d) * sizeof(float));
    }

    static void attend(const CodedAttention& a, const CodedScratch& memory) { CodedHead{a, memory}.run(); }
};

}  // namespace
}  // namespace waterfill

// Coded keys and values of one head: how they lie in memory, and what attention to them is given.
//
// A row, of one token, is rotated (hadamard.hpp), divided by its scale, and coded by levels of 8 bits. Blocks of 128
// tokens follow one another, each of so many scales (fp16) and `n` = 128 * head_dim codes, of keys token after token,
// of values coordinate after coordinate: products are sums along what lies side by side. Codes are split into planes
// of 8, 4, 2 and 1 bits, the lowest bits in the widest one; in a plane of b bits code i is the field number
// i / (n b / 8) of byte i % (n b / 8), from the lowest field up.
#pragma once

#include <cstdint>

#include "layout.hpp"

namespace waterfill {

// A head's keys or values. `whole` are rows as they are: with `bits` 16 all of them, else the text's first tokens, and
// behind them a ring of the newest.
struct CodedSide {
    int bits;
    const int8_t* levels;  // [2^bits] of 3, 4 and 5 bits
    float unit;            // levels of a standard deviation; of 8 bits, of the largest coordinate
    uint8_t* blocks;
    void* whole;
    const float* fresh;  // rows of this pass's tokens, from one to the next `fresh_stride` floats
    int64_t fresh_stride;
};

// Queries of consecutive tokens that share a head, of which the first is the text's token `position`. A token sees as
// they are the first `first` tokens, and of the `recent` newest, itself included, those from `kept_from` on; the others
// from codes. None is seen further back than `window`.
struct CodedAttention {
    int64_t head_dim, queries, tokens, position;
    int64_t window, first, recent, ring, kept_from;
    int64_t pass_position;  // of the pass's first token
    int64_t stride;         // floats from one token's queries to the next one's, in q and in out
    float scaling;
    bool half;  // whole rows are bfloat16
    CodedSide keys, values;
    const float* q;
    float* out;
};

// Memory of one head's attention, each for all queries.
struct CodedScratch {
    float* scores;      // [tokens][queries][seen]: tokens from the first to the last that are seen at all
    float* sums;        // [tokens][queries][head_dim]
    float* units;       // [tokens][queries]
    int16_t* words;     // [tokens][queries][coded_words(head_dim)]
    int32_t* products;  // [tokens][queries][kCodedTokens]
};

namespace {

constexpr int64_t kCodedTokens = 128;
constexpr int64_t kCodedHeadDim = 16;  // of which a head's numbers are a multiple, so that vectors are whole

inline bool coded_bits(int bits) { return bits == 3 || bits == 4 || bits == 5 || bits == 8; }
// Numbers of 16 bits of a row, padded with zeros; of a query, which is as long as a row of keys or one of values.
inline int64_t row_of_words(int64_t count) { return ceil_div(count, 32) * 32; }
inline int64_t coded_words(int64_t d) { return most(row_of_words(d), kCodedTokens); }
inline int64_t coded_scales_bytes() { return kCodedTokens * 2; }
inline int64_t coded_block_bytes(int bits, int64_t d) { return coded_scales_bytes() + kCodedTokens * d * bits / 8; }

}  // namespace
}  // namespace waterfill

// What entropy decoding is given, as plain views (see matrix.hpp for why they have no member functions).
#pragma once

#include <cstdint>

namespace waterfill {

constexpr int kSlotBits = 12, kSlots = 1 << kSlotBits;
constexpr uint32_t kLeastState = 1u << 16;
constexpr int kMostLanes = 32;

// slots[x mod 4096] = symbol << 24 | k << 12 | freq - 1. With at most 32 buckets also by bucket: threshold of the slot
// below which the bucket's own symbol holds, and for own and other symbol << 24 | (k - slot) mod 4096 << 12 | freq - 1.
struct RansTable {
    int bucket_bits;  // log2 of the number of buckets
    uint32_t slots[kSlots];
    uint32_t threshold[32], own[32], other[32];
};

// A stream while it is decoded: states of 32 lanes, words that are left, and where the next symbols go.
struct RansLanes {
    const RansTable* table;
    uint32_t x[kMostLanes];
    const uint8_t *at, *end;
    uint8_t* out;
};

// Systematic feedback convolutional code of Ungerboeck (1987, table I): parity-check polynomials without their last bit.
struct TrellisCode {
    int states;
    uint8_t h0, h1;
};

struct Walk {
    TrellisCode code;
    int center, raw_bits;
    const int8_t* levels;  // by symbol, or null: 4j + 1
};

}  // namespace waterfill

// What entropy decoding is given, as plain views (see matrix.hpp for why they have no member functions).
#pragma once

#include <cstdint>

namespace waterfill {

constexpr int kSlotBits = 12, kSlots = 1 << kSlotBits;
constexpr uint32_t kLeastState = 1u << 16;
constexpr int kMostLanes = 32;
constexpr int kTogether = 4;  // streams that a thread reads side by side

// slots[x mod 4096] = symbol << 24 | k << 12 | freq - 1. With at most 32 buckets also by bucket: threshold of the slot
// below which the bucket's own symbol holds, and for own and other symbol << 24 | (k - slot) mod 4096 << 12 | freq - 1.
struct RansTable {
    int bucket_bits;  // log2 of the number of buckets
    uint32_t slots[kSlots];
    uint32_t threshold[32], own[32], other[32];
};

// Systematic feedback convolutional code of Ungerboeck (1987, table I): parity-check polynomials without their last
// bit.
struct TrellisCode {
    int states;
    uint8_t h0, h1;
};

// The bitshift trellis: bitshift_search.hpp. States are windows of 12 bits.
constexpr int kWindows = 4096, kMostWays = 32;

// One step: groups of `ways` states, in the order in which their metrics lie. `places` has those of a group next to
// each other, and `level` says which level each state has that takes such a place; `group` is where a state's group
// begins, by the state that is reached.
struct WindowStep {
    int ways;
    const uint16_t *places, *group;
    const uint8_t* level;
    const uint16_t* before;  // the states that have those places
    const uint16_t* states;  // places of all states before the step
};

// Steps are the same again after `cycle` of them.
struct WindowCode {
    int cycle, count;
    float unit;  // of cost, that a squared error of 1 is
    const WindowStep* steps;
    const float* level;  // [count]
};

struct Walk {
    TrellisCode code;
    int center, raw_bits;
    const int8_t* levels;  // by symbol, or null: 4j + 1
};

// A stream of levels while it is read.
struct LevelReader {
    bool good;  // or else damaged
    RansTable table;
    Walk walk;
    int lanes;
    int64_t left;                   // symbols, padding included
    uint32_t x[kMostLanes];         // states of the coder
    uint8_t state[kMostLanes];      // and of the trellis
    const uint8_t *at, *end, *raw;  // words that are left, and the numbers' raw bits
};

// Where the levels of a stream go: chunk c of row r lies at codes + r / 4 * tile + r % 4 * row + c * chunk.
struct LevelPlace {
    uint8_t* codes;
    int64_t tile, row, chunk;  // bytes
    bool padded;               // to whole chunks and tiles
    uint16_t flip;             // bits that are turned over in every level
};

}  // namespace waterfill

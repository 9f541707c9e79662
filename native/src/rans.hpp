// Range asymmetric numeral systems (Duda, arXiv 1311.2540), static 12-bit tables by the alias method.
//
// READ FIRST: three things that surprise.
//   - A stream is decoded in the order of its symbols, and so it is encoded from the last symbol to the first: the
//   states
//     that a decoder starts from, which are read first, are what the encoder ends with. A decoder has to end with 2^16.
//   - The encoder finds its words backwards: the last one that it gives off is the first one that a decoder reads.
//   - All lanes share one sequence of words, with nothing that says whose a word is: in each step those lanes whose
//   states
//     fall below 2^16 take the next ones, in the order of the lanes.
//
// Symbol i of a stream belongs to lane i mod lanes. Every lane is a coder of its own, with a state x in [2^16, 2^32):
//
//     bytes: the states, 4 bytes each, then the words, 2 bytes each, all little-endian
//     slot = x mod 4096;  symbol, freq, k = table[slot];  x = freq * (x / 4096) + k;  if x < 2^16: x = x * 2^16 + word
//
// The alias method (Vose 1991) cuts the 4096 slots into equal buckets, each shared by at most two symbols, so that a
// table of 16 or 32 buckets fits vector registers and needs no gather.
#pragma once

#include <cstdint>
#include <cstring>

#include "coding.hpp"

namespace waterfill {
namespace {

// The most that a step of all lanes can take, a word for each: what has to be there before vector code, which loads
// words before it knows how many are needed, decodes a step.
constexpr int64_t kStepBytes = 2 * kMostLanes;

inline uint32_t word_at(const uint8_t* p) { return uint32_t(p[0]) | uint32_t(p[1]) << 8; }

// One symbol of one lane. False when the words have run out.
inline bool decode_one(const RansTable& t, uint32_t& x, const uint8_t*& at, const uint8_t* end, uint8_t& symbol) {
    const uint32_t slot = t.slots[x & (kSlots - 1)];
    symbol = uint8_t(slot >> 24);
    x = ((slot & 4095) + 1) * (x >> kSlotBits) + (slot >> 12 & 4095);
    if (x < kLeastState) {
        if (end - at < 2) return false;
        x = x << 16 | word_at(at);
        at += 2;
    }
    return true;
}

// `count` symbols, a multiple of `lanes`, with states x[lanes]; `at` is moved behind the last word that was read.
inline bool decode_plain(const RansTable& t, int lanes, uint32_t* x, const uint8_t*& at, const uint8_t* end,
                         int64_t count, uint8_t* out) {
    for (int64_t i = 0; i < count; i += lanes)
        for (int lane = 0; lane < lanes; ++lane)
            if (!decode_one(t, x[lane], at, end, out[i + lane])) return false;
    return true;
}

// `count` raw bit fields -> numbers.
inline void unpack_raw(const uint8_t* raw, int64_t first, int bits, int lanes, int16_t* out) {
    for (int lane = 0; lane < lanes; ++lane) {
        int low = 0;
        for (int b = 0; b < bits; ++b) {
            const int64_t bit = (first + lane) * bits + b;
            low |= (raw[bit / 8] >> (bit % 8) & 1) << b;
        }
        out[lane] = int16_t(low);
    }
}

// Levels of `count / LANES` steps of a trellis in LANES lanes, from their states on.
//
// A level is a number p = 4j + 1, its sign the state's: so both unions of the code have the same probabilities, and
// symbols are decoded without knowing the state. The path bit says which of its union's two subsets p lies in.
template <int LANES, class Level>
inline void walk(const Walk& w, uint8_t* states, int64_t count, const uint8_t* symbols, const uint8_t* raw,
                 Level* out) {
    uint8_t state[LANES];
    std::memcpy(state, states, LANES);
    int16_t low[LANES] = {};
    const int offset = w.code.states > 1;
    const uint8_t h0 = w.code.h0, h1 = w.code.h1;
    for (int64_t i = 0; i < count; i += LANES, symbols += LANES, out += LANES) {
        if (sizeof(Level) == 2 && w.raw_bits) unpack_raw(raw, i, w.raw_bits, LANES, low);
        Level level[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            const Level j =
                Level(Level(symbols[lane] - w.center) * (sizeof(Level) == 2 ? 1 << w.raw_bits : 1) + low[lane]);
            const uint8_t z0 = state[lane] & 1, z1 = uint8_t((j ^ z0) & 1);
            level[lane] = Level((Level(4 * j + offset) ^ Level(-z0)) + z0);
            state[lane] = uint8_t((state[lane] >> 1) ^ (uint8_t(-z0) & h0) ^ (uint8_t(-z1) & h1));
        }
        std::memcpy(out, level, sizeof level);
    }
    std::memcpy(states, state, LANES);
}

// The same with `levels` in place of 4j + 1: low rates, where centroids are not uniform.
inline void walk_levels(const Walk& w, int lanes, uint8_t* state, int64_t count, const uint8_t* symbols, int8_t* out) {
    for (int64_t i = 0; i < count; ++i) {
        uint8_t& s = state[i % lanes];
        const uint8_t z0 = s & 1, z1 = uint8_t(((symbols[i] - w.center) ^ z0) & 1);
        const int level = w.levels[symbols[i]];
        out[i] = int8_t(z0 ? -level : level);
        s = uint8_t((s >> 1) ^ (z0 ? w.code.h0 : 0) ^ (z1 ? w.code.h1 : 0));
    }
}

template <class Level>
inline void walk_lanes(const Walk& w, int lanes, uint8_t* state, int64_t count, const uint8_t* symbols,
                       const uint8_t* raw, Level* out) {
    switch (lanes) {
        case 1: return walk<1>(w, state, count, symbols, raw, out);
        case 2: return walk<2>(w, state, count, symbols, raw, out);
        case 4: return walk<4>(w, state, count, symbols, raw, out);
        case 8: return walk<8>(w, state, count, symbols, raw, out);
        case 16: return walk<16>(w, state, count, symbols, raw, out);
        default: return walk<32>(w, state, count, symbols, raw, out);
    }
}

inline void walk_narrow(const Walk& w, int lanes, uint8_t* state, int64_t count, const uint8_t* symbols, int8_t* out) {
    if (w.levels)
        walk_levels(w, lanes, state, count, symbols, out);
    else
        walk_lanes(w, lanes, state, count, symbols, nullptr, out);
}

}  // namespace
}  // namespace waterfill

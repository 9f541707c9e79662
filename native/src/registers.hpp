// How the codes of a bitshift trellis (waterfill/codecs/bitshift/code.py) lie in memory while they are multiplied from.
//
// A chunk is 128 columns of a tile's four rows: 8 steps of 16 lanes of each. It has, for each register in turn, bytes
// of as many symbols as they hold, the first one highest, and after those of one row's 16 lanes the next row's:
//
//     1 bit,                64 bytes: all 8 steps
//     2 bits,          2 of 64 bytes: 4 steps each
//     4 bits,          4 of 64 bytes: 2 steps each
//     1 bit every second,   32 bytes: all 4 symbols of two lanes, the first one's in the lower half
//
// In front of every tile lie the chunks that its lanes' paths come from, the ends of the lanes before them.
#pragma once

#include <cstdint>

#include "layout.hpp"

namespace waterfill {
namespace {

constexpr int kRowLanes = 16, kChunkSteps = kChunk / kRowLanes;
constexpr int kWindowBias = 64;  // of levels, which have 7 bits

struct Register {
    int bits, symbols, every;
};

struct Registers {
    int count;
    Register of[3];
};

// Of a rate, given as twice its bits; none where there is no such rate. Together they have 12 bits, each a multiple
// of 4.
constexpr Registers registers_of(int halves) {
    switch (halves) {
        case 2: return {1, {{1, 12, 1}}};
        case 3: return {2, {{1, 8, 1}, {1, 4, 2}}};
        case 4: return {1, {{2, 6, 1}}};
        case 5: return {2, {{2, 4, 1}, {1, 4, 2}}};
        case 6: return {2, {{2, 4, 1}, {1, 4, 1}}};
        case 7: return {3, {{2, 2, 1}, {1, 4, 1}, {1, 4, 2}}};
        case 8: return {1, {{4, 3, 1}}};
        case 9: return {2, {{4, 2, 1}, {1, 4, 2}}};
        case 10: return {2, {{4, 2, 1}, {1, 4, 1}}};
        default: return {};
    }
}

// Of one row.
constexpr int register_chunk_bytes(Register r) { return kRowLanes * kChunkSteps / r.every * r.bits / 8; }
constexpr int window_chunk_bytes(int halves) { return kRowLanes * kChunkSteps * halves / 16; }

// Chunks in front of a tile: as many steps as any register remembers.
constexpr int history_chunks(int halves) { return halves == 2 ? 2 : 1; }

inline int64_t tile_window_bytes(int64_t width, int halves) {
    return (history_chunks(halves) + chunks_per_row(width, 1)) * kTile * window_chunk_bytes(halves);
}

// Columns of a row of `width`, with those that are only there to be shifted.
inline int64_t window_columns(int64_t width, int halves) {
    const int64_t whole = kRowLanes * (halves % 2 ? 2 : 1);
    return ceil_div(width, whole) * whole;
}

// Bytes of a row, and of one register of it, as an artifact has them.
inline int64_t register_bytes(int64_t width, int halves, Register r) {
    return ceil_div(window_columns(width, halves) / r.every * r.bits, 8);
}
inline int64_t window_row_bytes(int64_t width, int halves) {
    const Registers registers = registers_of(halves);
    int64_t bytes = 0;
    for (int i = 0; i < registers.count; ++i) bytes += register_bytes(width, halves, registers.of[i]);
    return bytes;
}

}  // namespace
}  // namespace waterfill

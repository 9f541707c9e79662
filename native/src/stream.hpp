// Streams of entropy-coded matrices: docs/format.md has the bytes.
#pragma once

#include <atomic>
#include <cstdint>

#include "matrix.hpp"

namespace waterfill {

// Frequencies [256] that sum to 4096 -> the table; false if they do not.
bool make_table(const uint16_t* frequencies, RansTable& table);

// The code with that many states (1, 4, 8 … 256), or null.
const TrellisCode* trellis_code(int states);

// Symbols -> lanes' states, 4 bytes each, and words; returns their bytes, or -1 if `capacity` is too small or a symbol has
// no frequency.
int64_t rans_encode(const uint8_t* symbols, int64_t count, int lanes, const uint16_t* frequencies, uint8_t* out,
                    int64_t capacity);

// `bytes` bytes of states and words -> `count` symbols; false unless they are exactly that.
bool rans_decode(const Functions& f, const uint8_t* in, int64_t bytes, int lanes, const RansTable& table, int64_t count,
                 uint8_t* out);

struct StreamShape {
    int64_t rows, width;
    int states;
    bool wide;  // levels of 16 bits
};

int64_t stream_rows(int64_t width);                // rows of each stream but the last
int64_t stream_count(const StreamShape& s);
int64_t padded_count(int64_t weights, int* lanes);  // symbols of a stream, and how many lanes they are coded in

// One stream -> levels [rows * width, rounded up to lanes] and fp16 scales [rows][groups] of its rows.
bool decode_stream(const Functions& f, const StreamShape& s, int64_t rows, const uint8_t* in, int64_t bytes, void* levels,
                   uint16_t* scales);

// The first damaged stream is the one that is named, whichever thread finds one first.
void lower(std::atomic<int64_t>& least, int64_t value);

}  // namespace waterfill

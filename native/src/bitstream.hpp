// Streams of entropy-coded matrices: docs/format.md has the bytes.
#pragma once

#include <atomic>
#include <cstdint>

#include "layout.hpp"
#include "matrix.hpp"

namespace waterfill {

// Frequencies [256] that sum to 4096 -> the table; false if they do not.
bool make_table(const uint16_t* frequencies, RansTable& table);

// The code with that many states (1, 4, 8 … 256), or null.
const TrellisCode* trellis_code(int states);

// Symbols -> lanes' states, 4 bytes each, and words; returns their bytes, or -1 if `capacity` is too small or a symbol
// has no frequency.
int64_t rans_encode(const uint8_t* symbols, int64_t count, int lanes, const uint16_t* frequencies, uint8_t* out,
                    int64_t capacity);

// `bytes` bytes of states and words -> `count` symbols; false unless they are exactly that.
bool rans_decode(const Functions& f, const uint8_t* in, int64_t bytes, int lanes, const RansTable& table, int64_t count,
                 uint8_t* out);

struct BitstreamShape {
    int64_t rows, width;
    int states;
    bool wide;  // levels of 16 bits
};

int64_t stream_rows(int64_t width);  // rows of each stream but the last
int64_t stream_count(const BitstreamShape& s);
int64_t padded_count(int64_t weights, int* lanes);  // symbols of a stream, and how many lanes they are coded in

// One stream: its rows, its bytes, where their fp16 scales [rows][groups] go, and where their levels.
struct BitstreamPart {
    int64_t rows;
    const uint8_t* in;
    int64_t bytes;
    uint16_t* scales;
    LevelPlace to;
};

// Row by row, as the codes of a grid of all levels.
LevelPlace in_rows(const BitstreamShape& s, uint8_t* codes);

// In the layout of the kernels whose bias is `bias`.
LevelPlace in_tiles(const BitstreamShape& s, uint8_t* codes, int bias);

// Up to kTogether streams, side by side where the instruction set can; `good` is false for those that are damaged.
void read_streams(const Functions& f, const BitstreamShape& s, const BitstreamPart* parts, int count, bool* good);

// The first damaged stream is the one that is named, whichever thread finds one first.
void lower(std::atomic<int64_t>& least, int64_t value);

}  // namespace waterfill

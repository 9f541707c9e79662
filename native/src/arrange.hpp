// From codes as an artifact has them, row by row, to the layout that the kernels multiply from.
#pragma once

#include <cstdint>

#include "product.hpp"

namespace waterfill {

// A matrix as stored. `word_indices` > 0: radix words of so many indices in `word_bytes`; 0: bit fields.
struct StoredRows {
    const wf_table* table;
    int64_t rows, width;
    const uint8_t* codes;    // [rows][row_bytes], of which nothing beyond is read
    const uint16_t* scales;  // [rows][groups]
    int word_indices, word_bytes;
    int64_t row_bytes;
};

// Bytes of a tile of four rows in that layout.
int64_t tile_code_bytes(const Table& t, int64_t width);

// Tiles first … last, in the calling thread; `codes` and `scales` begin with the first of them.
void arrange_tiles(const Functions& f, const StoredRows& m, int64_t first_tile, int64_t last_tile, uint8_t* codes,
                   uint16_t* scales);

}  // namespace waterfill

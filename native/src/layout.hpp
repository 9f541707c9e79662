// How a packed matrix lies in memory while it is multiplied from (arrange.hpp brings it there).
//
// Rows are interleaved by four, so that a matrix is one sequential stream and four accumulators hide the latency of
// the dot product. Codes come in chunks of 128 per row, each split into bit planes of 8, 4, 2 and 1 bits, whose fields
// lie where one load and one shift bring 64 codes into the low bits of 64 bytes:
//
//     16 bits (levels),  256 bytes: little-endian numbers
//     plane of 8 bits, 128 bytes: byte i = code i
//     plane of 4 bits,  64 bytes: byte i = code i | code 64+i << 4
//     plane of 2 bits,  32 bytes: byte i = code i | code 32+i << 2 | code 64+i << 4 | code 96+i << 6
//     plane of 1 bit,   16 bytes: bit i (little endian) = code i
//
//     codes:  [tile of 4 rows][chunk][row in tile][planes]       scales (fp16): [tile][group][row in tile]
//
// Groups of a row (1024 weights, the last 512 to 1535) are those of waterfill/codecs/hadamard.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define WF_UNROLL _Pragma("GCC unroll 32")  // or an array of vectors would not be one of registers
#define WF_INLINE __attribute__((always_inline)) inline
#else
#define WF_UNROLL
#define WF_INLINE inline
#endif

namespace waterfill {
namespace {

// Vectors of any kind, from anywhere.
template <class Vector>
inline Vector loaded(const void* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

constexpr int kChunk = 128;  // codes
constexpr int kTile = 4;     // rows
constexpr int64_t kGroup = 1024;
constexpr int kAhead = 4096;    // bytes: codes are fetched before they are needed, across pages too
constexpr int64_t kUnit = 512;  // prepared activations are padded to a multiple of it: a chunk of quadruples

struct Planes {  // byte offset of each plane in a chunk, -1 where the width has none
    int at8, at4, at2, at1, bytes;
};

constexpr Planes planes_of(int bits) {
    Planes p{-1, -1, -1, -1, 0};
    if (bits == 16) p.bytes = 2 * kChunk;  // numbers of two bytes, which are not looked up
    if (bits & 8) p.at8 = p.bytes, p.bytes += 128;
    if (bits & 4) p.at4 = p.bytes, p.bytes += 64;
    if (bits & 2) p.at2 = p.bytes, p.bytes += 32;
    if (bits & 1) p.at1 = p.bytes, p.bytes += 16;
    return p;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Width of a bit field that holds an index below n.
inline int bits_of(int n) {
    int bits = 0;
    while ((1 << bits) < n) ++bits;
    return bits;
}

inline int64_t groups_of(int64_t width) { return width < kGroup + kGroup / 2 ? 1 : (width + kGroup / 2) / kGroup; }

// Where group g ends; it starts at g * kGroup.
inline int64_t group_stop(int64_t width, int64_t g) { return g + 1 < groups_of(width) ? (g + 1) * kGroup : width; }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

inline int64_t codes_per_row(int64_t width, int p) { return ceil_div(width, p); }
// Scalars and pairs of a group of 1024 fill whole chunks, so that only the end of a row is padded.
inline int64_t chunks_per_row(int64_t width, int p) { return ceil_div(codes_per_row(width, p), kChunk); }
inline int64_t tiles_of(int64_t rows) { return ceil_div(rows, kTile); }
inline int64_t padded_width(int64_t width) { return ceil_div(width, kUnit) * kUnit; }

// Where column `column` of a row lies among the prepared activations, by the order that a table asks for.
//   1: in place.
//   2, 4: in blocks of 128 or 256, runs of 64 with every second or fourth column. A table of pairs or quadruples then
//         yields whole runs, one per coordinate, with nothing to interleave.
inline int64_t ordered_position(int64_t column, int order) {
    const int64_t block = 64 * order, at = column % block;
    return column - at + at % order * 64 + at / order;
}

// The inverse: the column at a position.
inline int64_t ordered_column(int64_t position, int order) {
    const int64_t block = 64 * order, at = position % block;
    return position - at + at % 64 * order + at / 64;
}

// Reads code i of a chunk.
inline uint32_t code_at(const uint8_t* chunk, Planes p, int i) {
    uint32_t code = 0;
    int shift = 0;
    if (p.at8 >= 0) code |= uint32_t(chunk[p.at8 + i]), shift += 8;
    if (p.at4 >= 0) code |= uint32_t(chunk[p.at4 + i % 64] >> (i / 64 * 4) & 15) << shift, shift += 4;
    if (p.at2 >= 0) code |= uint32_t(chunk[p.at2 + i % 32] >> (i / 32 * 2) & 3) << shift, shift += 2;
    if (p.at1 >= 0) code |= uint32_t(chunk[p.at1 + i / 8] >> (i % 8) & 1) << shift;
    return code;
}

// All codes of a chunk.
inline void chunk_codes(const uint8_t* chunk, Planes p, uint16_t (&code)[kChunk]) {
    int shift = 0;
    for (int i = 0; i < kChunk; ++i) code[i] = p.at8 >= 0 ? chunk[p.at8 + i] : 0;
    if (p.at8 >= 0) shift += 8;
    if (p.at4 >= 0) {
        for (int i = 0; i < 64; ++i) code[i] |= uint16_t((chunk[p.at4 + i] & 15) << shift);
        for (int i = 0; i < 64; ++i) code[64 + i] |= uint16_t((chunk[p.at4 + i] >> 4) << shift);
        shift += 4;
    }
    if (p.at2 >= 0) {
        for (int part = 0; part < 4; ++part)
            for (int i = 0; i < 32; ++i) code[32 * part + i] |= uint16_t((chunk[p.at2 + i] >> (2 * part) & 3) << shift);
        shift += 2;
    }
    if (p.at1 >= 0)
        for (int i = 0; i < kChunk; ++i) code[i] |= uint16_t((chunk[p.at1 + i / 8] >> (i % 8) & 1) << shift);
}

}  // namespace
}  // namespace waterfill

// What the kernels are given, as plain views: a grid as integer tables, a matrix in its layout, prepared activations.
//
// No member functions: these types cross translation units that are compiled for different instruction sets, and an
// inline function shared between them could end up compiled for one that the machine lacks. For the same reason
// everything else in these headers lies in unnamed namespaces.
#pragma once

#include <cstdint>

#include "coded.hpp"
#include "coding.hpp"

namespace waterfill {

// A grid of n points in p dimensions, in units of a step. Unsigned tables have `bias` added to their bytes.
struct Table {
    int p, n, bits, precision, bias;
    int entry;                // bytes of one entry: p numbers, rounded up to a power of two
    const uint8_t* entries;   // [n][entry], and 8 bytes more
    const uint8_t* bytes[4];  // precision 8, n <= 256: one coordinate each, repeated to 256; or null
    const int16_t* words;     // precision 16, p = 1, n <= 256: repeated to 256; or null
    const float* points;      // [n][p], the grid itself
    bool direct;              // the codes are the numbers of `precision` bits themselves, and there are no tables
    int halves;               // twice the bits of a bitshift trellis (registers.hpp), or 0; its tables:
    uint8_t hash[3][16];      // of each four bits of a window, lowest first
    uint8_t levels[2][16];    // of the upper and the lower half of a hash; `bias` is in the first
};

struct Matrix {
    int64_t rows, width;
    float step;  // value of a table unit times the tensor's power of two
    float unit;  // the tensor's power of two
    const Table* table;
    const uint8_t* codes;    // layout.hpp
    const uint16_t* scales;  // fp16
};

// Rotated activations as integers of 8 or 16 bits, with a scale and a correction for each token and group.
struct Prepared {
    int64_t tokens, groups, padded;
    const uint8_t* data;         // [tokens][padded], 64-byte aligned
    const float* scales;         // [tokens][groups]
    const int32_t* corrections;  // [tokens][groups]: -bias times the sum of the group
};

constexpr int kMostPairBits = 3;
constexpr int kMostHeadDim = 512;

// Queries of consecutive tokens that share a head of keys and values, [positions][head_dim] of float or bfloat16. The
// first token sees `positions` of them, each later one sees one more; none of them more than the last `window`.
struct Attention {
    int64_t head_dim, queries, tokens, positions;
    int64_t window;
    int64_t stride;  // floats from one token's queries to the next one's, in q and in out
    float scaling;
    bool half;  // bfloat16
    const void *keys, *values;
    const float* q;  // [tokens][queries][head_dim]
    float* out;      // [tokens][queries][head_dim]
};

// A row of one stage of a nested matrix: levels plus 128, or `wide` plus 32768 in two bytes, and fp16 scales [groups].
struct StageRow {
    const uint8_t* codes;
    const uint16_t* scales;
    bool wide;
};

struct Functions {
    const char* name;
    int bias;
    int pair_bits;               // codes of scalars up to so many bits are looked up in pairs
    int (*order)(const Table&);  // of the activations: layout.hpp
    void (*rotate)(float* row, int64_t width, bool inverse);
    // One row of `width` floats -> `padded` integers; scales and corrections [groups].
    void (*quantise)(const float* row, int64_t width, int order, int precision, int bias, void* out, float* scales,
                     int32_t* corrections);
    int64_t (*scratch_bytes)(const Matrix&, const Prepared&);
    void (*multiply)(const Matrix&, const Prepared&, int64_t first_tile, int64_t last_tile, float* y, uint8_t* scratch);
    // One row in the rotated basis, exact; `width` floats.
    void (*decode_row)(const Matrix&, int64_t row, float* out);
    float (*dot)(const float* a, const float* b, int64_t n);
    // layer_math.hpp; `scores` [tokens][queries][positions + tokens - 1].
    void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t n, float* out);
    void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);
    void (*geglu)(const float* gate, const float* up, int64_t n, float* out);
    void (*attend)(const Attention& a, float* scores);
    // coded_rows.hpp and coded_attention.hpp; `along_tokens`: as values lie.
    void (*round_row)(float* x, int64_t d);
    void (*code_rows)(const CodedAttention& a, const CodedSide& side, bool along_tokens, int64_t from, int64_t to);
    void (*attend_coded)(const CodedAttention& a, const CodedScratch& memory);
    // rans.hpp, trellis_search.hpp, trellis_states.hpp.
    bool (*decode_symbols)(const RansTable& t, int lanes, uint32_t* x, const uint8_t*& at, const uint8_t* end,
                           int64_t count, uint8_t* out);
    // Rows from `first` to `last` of up to kTogether streams side by side, in one go where this is possible; else
    // false.
    bool (*decode_rows)(LevelReader* const* readers, const LevelPlace* places, int count, int64_t width, int64_t first,
                        int64_t last);
    // Symbols to levels, from the trellis's states [lanes] on.
    void (*walk)(const Walk& w, int lanes, uint8_t* state, int64_t count, const uint8_t* symbols, int8_t* out);
    void (*walk_wide)(const Walk& w, int lanes, uint8_t* state, int64_t count, const uint8_t* symbols,
                      const uint8_t* raw, int16_t* out);
    void (*search)(const TrellisCode& code, int lanes, int64_t count, const float* x, int least, int most,
                   uint8_t* scratch, int16_t* out);
    // Of one lane, with at least 16 states; the same levels.
    void (*search_lane)(const TrellisCode& code, int lanes, int lane, int64_t count, const float* x, int least,
                        int most, uint8_t* scratch, int16_t* out);
    // bitshift_search.hpp: 16 sequences.
    void (*search_windows)(const WindowCode& code, int64_t steps, const float* x, const uint16_t* start,
                           uint8_t* scratch, uint16_t* out);
    // stages.hpp; `sums` [width].
    bool (*sum_stages)(const StageRow* stages, int count, float gain, int64_t width, int bits, float* sums,
                       uint8_t* codes, uint16_t* scales);
    uint64_t (*checksum)(const uint8_t* data, int64_t bytes);
};

// Tables of functions, null where the library was built without the instruction set.
const Functions* scalar_functions();
const Functions* avx2_functions();
const Functions* avx512_functions();
const Functions* avx512vbmi_functions();
const Functions* neon_functions();

}  // namespace waterfill

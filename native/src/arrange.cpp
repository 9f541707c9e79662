// A chunk at a time: its codes side by side as bytes or 16-bit numbers, then whole planes of them. Words of 64 bits
// hold several codes, which any compiler turns into the vectors that it has.
#include "arrange.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "layout.hpp"
#include "registers.hpp"

namespace waterfill {
namespace {

constexpr int64_t kWord = 8;  // bytes; a chunk is read in whole words

using Wide = unsigned __int128;

uint64_t load(const void* from) {
    uint64_t word;
    std::memcpy(&word, from, kWord);
    return word;
}

void store(void* to, uint64_t word) { std::memcpy(to, &word, kWord); }

// A word with a 1 in every `bits` bits.
constexpr uint64_t every(int bits) { return bits == 64 ? 1 : ~uint64_t(0) / ((uint64_t(1) << bits) - 1); }

// What is the same for all rows.
struct Way {
    const StoredRows& m;
    int n;       // of the codes that are stored
    int paired;  // bits of each where two of them make a code of the table, else 0
    bool runs;   // even columns before odd ones: ordered_column
    int64_t count, chunks;
};

template <int BITS>
using Code = std::conditional_t<BITS <= 8, uint8_t, uint16_t>;

// Two fields of FIELD bits in every two lanes of LANE bits: the upper one moves to its own lane.
template <int FIELD, int LANE>
uint64_t spread(uint64_t x) {
    constexpr uint64_t lower = ((uint64_t(1) << FIELD) - 1) * every(2 * LANE);
    return (x & lower) | (x << (LANE - FIELD) & lower << LANE);
}

// Bit fields; up to a word beyond them is read.
template <int BITS>
void from_fields(const uint8_t* from, Code<BITS> (&code)[kChunk]) {
    constexpr int per_word = kWord / sizeof(Code<BITS>);
    for (int i = 0; i < kChunk; i += per_word) {
        uint64_t word = load(from + i * BITS / 8) >> i * BITS % 8;
        if constexpr (BITS <= 8)
            word = spread<BITS, 8>(spread<2 * BITS, 16>(spread<4 * BITS, 32>(word)));
        else
            word = spread<BITS, 16>(spread<2 * BITS, 32>(word));
        store(code + i, word);
    }
}

// Fields of a row whose chunk at byte `at` reaches its end, or nearly, which is not to be read beyond.
template <int BITS>
void from_last_fields(const Way& way, const uint8_t* row, int64_t at, Code<BITS> (&code)[kChunk]) {
    constexpr int64_t bytes = kChunk * BITS / 8;
    const int64_t bits = way.count * bits_of(way.n) - 8 * at;
    uint8_t fields[bytes + kWord] = {};
    std::memcpy(fields, row + at, size_t(least(bytes + kWord, ceil_div(bits, 8))));
    if (bits < 8 * bytes) fields[bits / 8] &= uint8_t((1 << bits % 8) - 1);
    from_fields<BITS>(fields, code);
}

template <int BITS>
void from_indices(const Way& way, const uint16_t* index, Code<BITS> (&code)[kChunk]) {
    if (way.paired)
        for (int i = 0; i < kChunk; ++i) code[i] = Code<BITS>(index[2 * i] | index[2 * i + 1] << way.paired);
    else
        for (int i = 0; i < kChunk; ++i) code[i] = Code<BITS>(index[i]);
}

// Fields that no encoder writes mean the last point.
template <class Number>
void clamp(const Way& way, Number (&code)[kChunk]) {
    const Number last = Number(way.n - 1);
    if (way.paired) {
        for (Number& c : code) {
            const int low = std::min<int>(c & ((1 << way.paired) - 1), last),
                      high = std::min<int>(c >> way.paired, last);
            c = Number(low | high << way.paired);
        }
    } else {
        for (Number& c : code) c = std::min(c, last);
    }
}

template <class Number>
void in_runs(const Number (&code)[kChunk], Number (&run)[kChunk]) {
    for (int i = 0; i < kChunk / 2; ++i) {
        run[i] = code[2 * i];
        run[kChunk / 2 + i] = code[2 * i + 1];
    }
}

// The inverse of chunk_codes.
template <int BITS>
void put_planes(const Code<BITS> (&code)[kChunk], uint8_t* out) {
    if constexpr (BITS > 8) {
        uint8_t upper[kChunk];
        for (int i = 0; i < kChunk; ++i) out[i] = uint8_t(code[i]);
        for (int i = 0; i < kChunk; ++i) upper[i] = uint8_t(code[i] >> 8);
        put_planes<BITS - 8>(upper, out + kChunk);
    } else {
        constexpr Planes at = planes_of(BITS);
        auto part = [&](int first, int shift, int mask) {
            return load(code + first) >> shift & every(8) * uint64_t(mask);
        };
        if constexpr (at.at8 >= 0) std::memcpy(out, code, kChunk);
        if constexpr (at.at4 >= 0)
            for (int i = 0; i < 64; i += kWord) store(out + at.at4 + i, part(i, 0, 15) | part(64 + i, 0, 15) << 4);
        if constexpr (at.at2 >= 0)
            for (int i = 0; i < 32; i += kWord) {
                constexpr int shift = BITS & 4;
                store(out + at.at2 + i, part(i, shift, 3) | part(32 + i, shift, 3) << 2 | part(64 + i, shift, 3) << 4 |
                                            part(96 + i, shift, 3) << 6);
            }
        if constexpr (at.at1 >= 0)
            for (int i = 0; i < kChunk;
                 i += kWord)  // the product gathers the lowest bits of all bytes in the highest byte
                out[at.at1 + i / 8] = uint8_t(part(i, BITS - 1, 1) * 0x0102040810204080 >> 56);
    }
}

// The digits of a row of radix words, and zeros up to the end of its last chunk.
//
// A word over n^digits is a fraction, and times n its whole part is the highest digit. Fractions of 64 bits are rounded
// up by a few units at most and words have at most 56 bits: the lowest digit still comes out right.
const uint16_t* radix_row(const Way& way, const uint8_t* row) {
    const int digits = way.m.word_indices, bytes = way.m.word_bytes;
    const int64_t whole = way.chunks * kChunk * (way.paired ? 2 : 1);
    auto* index = reinterpret_cast<uint16_t*>(scratch(kIndices, (whole + digits) * 2));
    const uint64_t n = uint64_t(way.n);
    uint64_t power = 1;
    for (int k = 0; k < digits; ++k) power *= n;
    int shift = 0;
    while (power > uint64_t(2) << shift) ++shift;
    const uint64_t inverse = uint64_t(((Wide(1) << (64 + shift)) - 1) / power + 1);
    const uint8_t* end = row + way.m.row_bytes;
    for (int64_t i = 0; i < way.count; i += digits, row += bytes) {
        uint64_t word = 0;
        if (end - row >= kWord)
            word = load(row) & ((uint64_t(1) << 8 * bytes) - 1);
        else
            std::memcpy(&word, row, size_t(least(bytes, end - row)));
        uint64_t fraction = uint64_t(Wide(word) * inverse >> shift) + 1;
        for (int k = digits - 1; k >= 0; --k) {
            const Wide product = Wide(fraction) * n;
            index[i + k] = uint16_t(product >> 64);
            fraction = uint64_t(product);
        }
    }
    std::fill(index + way.count, index + whole, uint16_t(0));
    return index;
}

template <int BITS>
void arrange_row(const Way& way, const uint8_t* row, uint8_t* out) {
    constexpr int64_t bytes = planes_of(BITS).bytes;
    const bool words = way.m.word_indices > 0, whole = words || way.n == 1 << bits_of(way.n);
    const uint16_t* index = words ? radix_row(way, row) : nullptr;
    for (int64_t c = 0; c < way.chunks; ++c, out += kTile * bytes) {
        Code<BITS> code[kChunk];
        if (words)
            from_indices<BITS>(way, index + c * kChunk * (way.paired ? 2 : 1), code);
        else if ((c + 1) * bytes + kWord <= way.m.row_bytes)
            from_fields<BITS>(row + c * bytes, code);
        else
            from_last_fields<BITS>(way, row, c * bytes, code);
        if (!whole) clamp(way, code);
        if (way.runs) {
            Code<BITS> run[kChunk];
            in_runs(code, run);
            put_planes<BITS>(run, out);
        } else {
            put_planes<BITS>(code, out);
        }
    }
}

// Levels: what is stored has half their number added, which signed numbers have not. Padding is level 0.
template <int BITS>
void arrange_levels(const Way& way, const uint8_t* row, uint8_t* out) {
    constexpr int64_t bytes = kChunk * BITS / 8;
    constexpr uint64_t zero = every(BITS) << (BITS - 1);
    const uint64_t flip = way.m.table->view.bias ? 0 : zero;
    for (int64_t c = 0; c < way.chunks; ++c, out += kTile * bytes) {
        const uint8_t* from = row + c * bytes;
        uint8_t padded[bytes];
        if (const int64_t left = way.count * BITS / 8 - c * bytes; left < bytes) {
            for (int64_t i = 0; i < bytes; i += kWord) store(padded + i, zero);
            std::memcpy(padded, from, size_t(left));
            from = padded;
        }
        if (flip)
            for (int64_t i = 0; i < bytes; i += kWord) store(out + i, load(from + i) ^ flip);
        else
            std::memcpy(out, from, bytes);
    }
}

// The symbols of a byte, of 1, 2 or 4 bits, a byte each.
struct Spread {
    uint64_t of[256];
    explicit Spread(int bits) {
        for (int byte = 0; byte < 256; ++byte) {
            of[byte] = 0;
            for (int i = 0; i < 8 / bits; ++i) of[byte] |= uint64_t(byte >> i * bits & ((1 << bits) - 1)) << 8 * i;
        }
    }
};

const Spread& spread_of(int bits) {
    static const Spread one(1), two(2), four(4);
    return bits == 1 ? one : bits == 2 ? two : four;
}

// What a register's lanes are given at a step, a byte each, from a row's symbols. Steps below 0 are those of the lanes
// before, as the path goes.
struct LaneSymbols {
    const uint8_t* from;
    int bits;
    int64_t steps;
    const Spread& spread;

    Wide at(int64_t step) const {
        const int64_t back = step < 0 ? ceil_div(-step, steps) : 0;  // lanes
        step += back * steps;
        if (step >= steps || back >= kRowLanes) return 0;
        const uint8_t* bytes = from + step * 2 * bits;
        uint64_t half[2] = {};
        for (int i = 0; i < bits; ++i) {
            half[0] |= spread.of[bytes[i]] << i * (64 / bits);
            half[1] |= spread.of[bytes[bits + i]] << i * (64 / bits);
        }
        return (Wide(half[1]) << 64 | half[0]) << 8 * back;
    }
};

// What a register's lanes are given at the steps of a chunk: registers.hpp.
void put_chunk(const LaneSymbols& symbols, Register r, int64_t first, int64_t row, uint8_t* out) {
    const int steps = kChunkSteps / r.every, each = std::min(steps, 8 / r.bits);  // in a byte, or half of one
    for (int64_t begin = first; begin < first + steps; begin += each, out += kTile * kRowLanes) {
        Wide fields = 0;
        for (int64_t step = begin; step < begin + each; ++step) fields = fields << r.bits | symbols.at(step);
        uint8_t field[kRowLanes];
        for (int i = 0; i < 2; ++i) store(field + 8 * i, uint64_t(fields >> 64 * i));
        if (each * r.bits == 8)
            std::memcpy(out + row * kRowLanes, field, sizeof field);
        else
            for (int i = 0; i < kRowLanes / 2; ++i)
                out[row * kRowLanes / 2 + i] = uint8_t(field[2 * i] | field[2 * i + 1] << 4);
    }
}

// One row of a tile of a bitshift trellis: chunks of what comes before each lane, and those of the row.
void arrange_windows(const Table& t, const uint8_t* codes, int64_t width, int64_t row, uint8_t* out) {
    const Registers registers = registers_of(t.halves);
    const int64_t stride = kTile * window_chunk_bytes(t.halves), chunks = chunks_per_row(width, 1);
    for (int i = 0; i < registers.count; ++i) {
        const Register r = registers.of[i];
        const int64_t steps = window_columns(width, t.halves) / r.every / kRowLanes, each = kChunkSteps / r.every;
        const LaneSymbols symbols{codes, r.bits, steps, spread_of(r.bits)};
        uint8_t* to = out;
        for (int64_t chunk = -history_chunks(t.halves); chunk < chunks; ++chunk, to += stride)
            put_chunk(symbols, r, chunk * each, row, to);
        out += kTile * register_chunk_bytes(r);
        codes += register_bytes(width, t.halves, r);
    }
}

void arrange_window_tiles(const StoredRows& m, int64_t first_tile, int64_t last_tile, uint8_t* codes,
                          uint16_t* scales) {
    const Table& t = m.table->view;
    const int64_t groups = groups_of(m.width), tile_bytes = tile_window_bytes(m.width, t.halves);
    for (int64_t tile = first_tile; tile < last_tile; ++tile, codes += tile_bytes, scales += groups * kTile) {
        std::memset(codes, 0, size_t(tile_bytes));
        std::fill(scales, scales + groups * kTile, uint16_t(0));
        for (int64_t row = tile * kTile; row < least((tile + 1) * kTile, m.rows); ++row) {
            const int64_t r = row % kTile;
            for (int64_t g = 0; g < groups; ++g) scales[g * kTile + r] = m.scales[row * groups + g];
            arrange_windows(t, m.codes + row * m.row_bytes, m.width, r, codes);
        }
    }
}

using ArrangeRow = void (*)(const Way& way, const uint8_t* row, uint8_t* out);

ArrangeRow row_function(const Table& t) {
    static constexpr ArrangeRow by_bits[] = {nullptr,        arrange_row<1>, arrange_row<2>,  arrange_row<3>,
                                             arrange_row<4>, arrange_row<5>, arrange_row<6>,  arrange_row<7>,
                                             arrange_row<8>, arrange_row<9>, arrange_row<10>, arrange_row<11>,
                                             arrange_row<12>};
    return !t.direct ? by_bits[t.bits] : t.bits == 8 ? arrange_levels<8> : arrange_levels<16>;
}

}  // namespace

int64_t tile_code_bytes(const Table& t, int64_t width) {
    if (t.halves) return tile_window_bytes(width, t.halves);
    return chunks_per_row(width, t.p) * kTile * planes_of(t.bits).bytes;
}

void arrange_tiles(const Functions& f, const StoredRows& m, int64_t first_tile, int64_t last_tile, uint8_t* codes,
                   uint16_t* scales) {
    const Table& t = m.table->view;
    if (t.halves) return arrange_window_tiles(m, first_tile, last_tile, codes, scales);
    const int paired = m.table->paired;
    const Way way{m,
                  paired ? paired : t.n,
                  paired ? bits_of(paired) : 0,
                  t.p == 1 && f.order(t) > 1,
                  codes_per_row(m.width, paired ? 1 : t.p),
                  chunks_per_row(m.width, t.p)};
    const ArrangeRow arrange = row_function(t);
    const int64_t groups = groups_of(m.width), bytes = planes_of(t.bits).bytes;
    for (int64_t tile = first_tile; tile < last_tile;
         ++tile, codes += way.chunks * kTile * bytes, scales += groups * kTile)
        for (int r = 0; r < kTile; ++r) {
            const int64_t row = tile * kTile + r;
            const bool exists = row < m.rows;
            for (int64_t g = 0; g < groups; ++g)
                scales[g * kTile + r] = exists ? m.scales[row * groups + g] : uint16_t(0);
            if (exists)
                arrange(way, m.codes + row * m.row_bytes, codes + r * bytes);
            else
                for (int64_t c = 0; c < way.chunks; ++c) std::memset(codes + (c * kTile + r) * bytes, 0, size_t(bytes));
        }
}

}  // namespace waterfill

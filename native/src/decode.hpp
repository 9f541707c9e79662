// From codes in the kernels' layout to numbers: four rows as integers in a buffer, or one row as exact floats.
//
//     tables that fit registers    decode_bytes, decode_words: 128 codes at a time (`Isa::codes`, then its tables)
//     levels of 16 bits            copy_words: the codes are the numbers
//     anything else                decode_entries: entries copied one by one
#pragma once

#include <cstring>
#include <type_traits>

#include "half.hpp"
#include "layout.hpp"
#include "matrix.hpp"
#include "windows.hpp"

namespace waterfill {
namespace {

template <class Isa>
struct Decoding {
    using Bytes = typename Isa::Bytes;

    // Whether products take the codes to registers and multiply there: of bytes, of words.
    static bool from_codes(const Table& t) {
        if (t.direct || t.halves) return true;
        if (t.precision != 8 || t.bits > 8) return false;
        return t.p == 1 ? t.bits <= 4 : t.p == 2 || (t.p == 4 && t.bits >= 3 && Isa::quadruples);
    }
    static bool from_words(const Table& t) { return t.precision == 16 && t.p == 1 && t.bits >= 5 && t.bits <= 8; }
    static int order(const Table& t) {
        if (t.halves || t.direct || Isa::interleaved(t.bits, t.p) || !(from_codes(t) || from_words(t))) return 1;
        return t.p == 4 ? 4 : 2;
    }

    // Levels of 8 bits are what a table of them would give.
    struct Direct {
        explicit Direct(const Table&) {}
        void look_up(const Bytes (&index)[2], Bytes (&value)[2]) const { value[0] = index[0], value[1] = index[1]; }
    };
    template <int BITS, int P>
    using TableOf = std::conditional_t<BITS == 8 && P == 1, Direct, typename Isa::template Table<BITS, P>>;

    template <int BITS, int P>
    static void decode_bytes(const Matrix& m, int64_t tile, uint8_t* out, int64_t stride) {
        constexpr int bytes = planes_of(BITS).bytes;
        const TableOf<BITS, P> table(*m.table);
        const int64_t chunks = chunks_per_row(m.width, P);
        const uint8_t* code = m.codes + tile * chunks * kTile * bytes;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            for (int r = 0; r < kTile; ++r, code += bytes) {
                Bytes index[2], value[2 * P];
                Isa::template codes<BITS>(code, index);
                table.look_up(index, value);
                for (int k = 0; k < 2 * P; ++k) Isa::store(out + r * stride + chunk * kChunk * P + 64 * k, value[k]);
            }
    }

    template <int P>
    static void decode_vectors(const Matrix& m, int64_t tile, uint8_t* out, int64_t stride) {
        switch (m.table->bits) {
            case 1: return decode_bytes<1, P>(m, tile, out, stride);
            case 2: return decode_bytes<2, P>(m, tile, out, stride);
            case 3: return decode_bytes<3, P>(m, tile, out, stride);
            case 4: return decode_bytes<4, P>(m, tile, out, stride);
            case 5: return decode_bytes<5, P>(m, tile, out, stride);
            case 6: return decode_bytes<6, P>(m, tile, out, stride);
            case 7: return decode_bytes<7, P>(m, tile, out, stride);
            default: return decode_bytes<8, P>(m, tile, out, stride);
        }
    }

    template <int BITS>
    static void decode_words(const Matrix& m, int64_t tile, int16_t* out, int64_t stride) {
        constexpr int bytes = planes_of(BITS).bytes;
        const typename Isa::template WordTable<BITS> table(*m.table);
        const int64_t chunks = chunks_per_row(m.width, 1);
        const uint8_t* code = m.codes + tile * chunks * kTile * bytes;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            for (int r = 0; r < kTile; ++r, code += bytes) {
                Bytes index[2];
                Isa::template codes<BITS>(code, index);
                table.look_up(index, out + r * stride + chunk * kChunk);
            }
    }

    static void copy_words(const Matrix& m, int64_t tile, uint8_t* out, int64_t stride) {
        const int64_t chunks = chunks_per_row(m.width, 1);
        const uint8_t* code = m.codes + tile * chunks * kTile * 2 * kChunk;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            for (int r = 0; r < kTile; ++r, code += 2 * kChunk)
                std::memcpy(out + r * stride + chunk * 2 * kChunk, code, 2 * kChunk);
    }

    // Any grid: entries of ENTRY bytes copied one by one, USED of which count. Codes are read four at a time: loads are
    // what limits this.
    template <int ENTRY, int USED>
    static void decode_entries(const Matrix& m, int64_t tile, uint8_t* out, int64_t stride) {
        const Planes planes = planes_of(m.table->bits);
        const int64_t chunks = chunks_per_row(m.width, m.table->p);
        const uint8_t* chunk = m.codes + tile * chunks * kTile * planes.bytes;
        const uint8_t* entries = m.table->entries;
        for (int64_t c = 0; c < chunks; ++c)
            for (int r = 0; r < kTile; ++r, chunk += planes.bytes) {
                uint8_t* to = out + r * stride + c * kChunk * USED;
                alignas(64) uint16_t index[kChunk];
                chunk_codes(chunk, planes, index);
                for (int i = 0; i < kChunk; i += 4, to += 4 * USED) {
                    uint64_t four;
                    std::memcpy(&four, index + i, 8);
                    std::memcpy(to, entries + (four & 0xffff) * ENTRY, ENTRY);
                    std::memcpy(to + USED, entries + (four >> 16 & 0xffff) * ENTRY, ENTRY);
                    std::memcpy(to + 2 * USED, entries + (four >> 32 & 0xffff) * ENTRY, ENTRY);
                    std::memcpy(to + 3 * USED, entries + (four >> 48) * ENTRY, ENTRY);
                }
            }
    }

    template <int HALVES>
    static void decode_windows(const Matrix& m, int64_t tile, uint8_t* out, int64_t stride) {
        using Decoder = Windows<Isa, HALVES>;
        const Decoder decoder(*m.table);
        typename Decoder::Chunk before[Decoder::vectors];
        const uint8_t* code = decoder.begin(m.codes + tile * tile_window_bytes(m.width, HALVES), before);
        for (int64_t chunk = 0; chunk < chunks_per_row(m.width, 1); ++chunk, code += Decoder::bytes, out += kChunk)
            for (int v = 0; v < Decoder::vectors; ++v) {
                const typename Decoder::Chunk now = decoder.read(code, v, before[v]);
                uint8_t* to = out + v * Decoder::rows * stride;
                WF_UNROLL for (int step = 0; step < kChunkSteps; ++step) {
                    const typename Decoder::Octets level = decoder.level(before[v], now, step);
                    const auto* from = reinterpret_cast<const uint8_t*>(&level);
                    for (int r = 0; r < Decoder::rows; ++r)
                        std::memcpy(to + r * stride + step * kRowLanes, from + r * kRowLanes, kRowLanes);
                }
                decoder.copy(now, before[v]);
            }
    }

    // Four rows as integers in the order of the prepared activations; `stride` in bytes.
    static void decode_tile(const Matrix& m, int64_t tile, uint8_t* out, int64_t stride) {
        if (m.table->halves)
            return by_rate(m.table->halves,
                           [&](auto halves) { decode_windows<decltype(halves)::value>(m, tile, out, stride); });
        if (from_codes(*m.table)) {
            if (m.table->p == 1) switch (m.table->bits) {
                    case 1: return decode_bytes<1, 1>(m, tile, out, stride);
                    case 2: return decode_bytes<2, 1>(m, tile, out, stride);
                    case 3: return decode_bytes<3, 1>(m, tile, out, stride);
                    case 4: return decode_bytes<4, 1>(m, tile, out, stride);
                    case 8: return decode_bytes<8, 1>(m, tile, out, stride);
                    case 16: return copy_words(m, tile, out, stride);
                }
            if constexpr (Isa::quadruples)
                if (m.table->p == 4) return decode_vectors<4>(m, tile, out, stride);
            return decode_vectors<2>(m, tile, out, stride);
        }
        if (m.table->precision == 16 && m.table->p == 1) {
            auto* words = reinterpret_cast<int16_t*>(out);
            switch (m.table->bits) {
                case 5: return decode_words<5>(m, tile, words, stride / 2);
                case 6: return decode_words<6>(m, tile, words, stride / 2);
                case 7: return decode_words<7>(m, tile, words, stride / 2);
                case 8: return decode_words<8>(m, tile, words, stride / 2);
            }
        }
        switch (m.table->p * m.table->precision / 8) {
            case 1: return decode_entries<1, 1>(m, tile, out, stride);
            case 2: return decode_entries<2, 2>(m, tile, out, stride);
            case 3: return decode_entries<4, 3>(m, tile, out, stride);
            case 4: return decode_entries<4, 4>(m, tile, out, stride);
            case 6: return decode_entries<8, 6>(m, tile, out, stride);
            default: return decode_entries<8, 8>(m, tile, out, stride);
        }
    }

    // The number that code i of a chunk is, where there is no table.
    static int level_at(const Table& t, const uint8_t* chunk, int64_t i) {
        if (t.precision == 8) return t.bias ? chunk[i] - t.bias : int8_t(chunk[i]);
        return int16_t(uint16_t(chunk[2 * i] | chunk[2 * i + 1] << 8));
    }

    template <int HALVES>
    static void window_row(const Matrix& m, int64_t row, float* out) {
        using Decoder = Windows<Isa, HALVES>;
        const Decoder decoder(*m.table);
        typename Decoder::Chunk before[Decoder::vectors];
        const int64_t tile = row / kTile, groups = groups_of(m.width);
        const uint16_t* scale = m.scales + tile * groups * kTile + row % kTile;
        const uint8_t* code = decoder.begin(m.codes + tile * tile_window_bytes(m.width, HALVES), before);
        const int v = int(row % kTile) / Decoder::rows, r = int(row % kTile) % Decoder::rows;
        typename Decoder::Octets level = {};
        for (int64_t start = 0; start < m.width; start += kChunk, code += Decoder::bytes) {
            const typename Decoder::Chunk now = decoder.read(code, v, before[v]);
            const float by = half_to_float(scale[least(start / kGroup, groups - 1) * kTile]) * m.unit;
            for (int i = 0; i < least(kChunk, m.width - start); ++i) {
                if (i % kRowLanes == 0) level = decoder.level(before[v], now, i / kRowLanes);
                out[start + i] = float(level[r * kRowLanes + i % kRowLanes] - m.table->bias) * by;
            }
            decoder.copy(now, before[v]);
        }
    }

    static void decode_row(const Matrix& m, int64_t row, float* out) {
        const Table& t = *m.table;
        if (t.halves) return by_rate(t.halves, [&](auto halves) { window_row<decltype(halves)::value>(m, row, out); });
        const Planes planes = planes_of(t.bits);
        const int64_t chunks = chunks_per_row(m.width, t.p), tile = row / kTile, groups = groups_of(m.width);
        const uint16_t* scale = m.scales + tile * groups * kTile + row % kTile;
        const int in_order = t.p == 1 ? order(t) : 1;
        const int last = t.n - 1;
        for (int64_t c = 0; c < chunks; ++c) {
            const uint8_t* chunk = m.codes + ((tile * chunks + c) * kTile + row % kTile) * planes.bytes;
            if (t.direct) {
                const int64_t start = c * kChunk, stop = least(start + kChunk, m.width);
                const float by = half_to_float(scale[least(start / kGroup, groups - 1) * kTile]) * m.unit;
                for (int64_t i = start; i < stop; ++i) out[i] = float(level_at(t, chunk, i - start)) * by;
                continue;
            }
            uint16_t code[kChunk];
            chunk_codes(chunk, planes, code);
            for (int64_t i = 0; i < kChunk; ++i) {
                const float* point = t.points + (code[i] < last ? code[i] : last) * t.p;
                for (int k = 0; k < t.p; ++k) {
                    int64_t column = (c * kChunk + i) * t.p + k;
                    if (in_order > 1) column = ordered_column(column, in_order);
                    if (column >= m.width) continue;
                    const int64_t g = least(column / kGroup, groups - 1);
                    out[column] = point[k] * (half_to_float(scale[g * kTile]) * m.unit);
                }
            }
        }
    }
};

}  // namespace
}  // namespace waterfill

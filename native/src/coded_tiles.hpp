// Levels of coded keys and values as numbers of 16 bits, some rows of a block at a time, and products with them.
#pragma once

#include <cstring>

#include "coded.hpp"
#include "layout.hpp"
#include "matrix.hpp"

namespace waterfill {
namespace {

constexpr int64_t kTileNumbers = 4096;  // decoded at a time, which stay in the first cache

template <class Isa>
struct CodedTiles {
    using Bytes = typename Isa::Bytes;
    using Acc = typename Isa::Acc;
    using Octets = typename Isa::Octets;
    static constexpr int64_t kOctets = sizeof(Octets);

    // Fields of a plane of a block's n codes, from number `from` on, a vector at a time.
    template <int PLANE>
    struct Fields {
        const uint8_t* plane;
        int64_t bytes, at;
        int shift;
        Fields(const uint8_t* start, int64_t n, int64_t from) : plane(start), bytes(n * PLANE / 8) {
            at = from % bytes, shift = int(from / bytes) * PLANE;
        }
        Octets next() {
            typedef uint16_t Pairs __attribute__((vector_size(sizeof(Octets))));
            Isa::prefetch(plane + at + kAhead);
            const Octets all = loaded<Octets>(plane + at);  // bits of a neighbour come along
            const Octets found = Octets(Pairs(all) >> uint16_t(shift)) & uint8_t((1 << PLANE) - 1);
            at += kOctets;
            if (at == bytes) at = 0, shift += PLANE;
            return found;
        }
    };

    // Levels of codes `from` … `from` + count - 1 of a block's n, which are whole vectors.
    template <int BITS>
    static void levels_of(const int8_t* table, const uint8_t* planes, int64_t n, int64_t from, int64_t count,
                          int8_t* out) {
        uint8_t entries[2][16] = {};
        std::memcpy(entries, table, size_t(1) << BITS);
        const Octets low = Isa::repeated(entries[0]), high = Isa::repeated(entries[1]);
        Fields<BITS == 3 ? 2 : 4> lower(planes, n, from);
        Fields<1> top(planes + n * (BITS == 3 ? 2 : 4) / 8, n, from);  // of 3 and 5 bits
        for (int64_t i = 0; i < count; i += kOctets) {
            Octets code = lower.next(), level;
            if constexpr (BITS == 3) {
                const Octets bit = top.next(), two = bit + bit;
                code |= two + two;
            }
            level = Isa::look_up(low, code);
            if constexpr (BITS == 5) {
                const Octets upper = Octets{} - top.next();
                level = (level & ~upper) | (Isa::look_up(high, code) & upper);
            }
            std::memcpy(out + i, &level, sizeof level);
        }
    }

    // Rows first … first + rows - 1 of a block's levels [n / width][width], as numbers of 16 bits, padded with zeros.
    static void decode(const CodedSide& side, const uint8_t* block, int64_t n, int64_t width, int64_t first,
                       int64_t rows, int16_t* tile) {
        alignas(64) int8_t bytes[kTileNumbers];
        const uint8_t* planes = block + coded_scales_bytes();
        const int64_t from = first * width, count = rows * width, padded = row_of_words(width);
        const int8_t* levels = bytes;
        switch (side.bits) {
            case 3: levels_of<3>(side.levels, planes, n, from, count, bytes); break;
            case 4: levels_of<4>(side.levels, planes, n, from, count, bytes); break;
            case 5: levels_of<5>(side.levels, planes, n, from, count, bytes); break;
            default: levels = reinterpret_cast<const int8_t*>(planes) + from;
        }
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < width; ++i) tile[r * padded + i] = levels[r * width + i];
            for (int64_t i = width; i < padded; ++i) tile[r * padded + i] = 0;
        }
    }

    // Sums [count][rows] of the rows of a tile times `count` vectors, both `width` numbers of 16 bits, padded.
    static void multiply(const int16_t* tile, int64_t rows, int64_t width, const int16_t* x, int64_t count,
                         int32_t* sums) {
        for (int64_t n = 0; n < count; ++n, x += width, sums += rows)
            for (int64_t row = 0; row < rows; row += kTile) {
                Acc acc[kTile];
                WF_UNROLL for (int r = 0; r < kTile; ++r) acc[r] = Isa::start(0);
                for (int64_t at = 0; at < width; at += 32)
                    WF_UNROLL for (int r = 0; r < kTile; ++r) acc[r] =
                        Isa::dot_words(acc[r], Isa::load(tile + (row + r) * width + at), x + at);
                int32_t whole[kTile];
                Isa::reduce(acc, whole);
                std::memcpy(sums + row, whole, sizeof whole);
            }
    }
};

}  // namespace
}  // namespace waterfill

// What an instruction set does unless it says otherwise: its struct derives from this one, and hides what it does
// better.
#pragma once

#include <cstdint>
#include <cstring>

#include "matrix.hpp"
#include "rans.hpp"

namespace waterfill {
namespace {

// 16 floats of two, `set` where the mask has a bit; and element i taken from i ^ distance: through memory.
template <class Isa, class Floats>
Floats select_plain(uint32_t mask, Floats set, Floats clear) {
    float from[2][16];
    Isa::store_floats(from[0], clear), Isa::store_floats(from[1], set);
    for (int i = 0; i < 16; ++i) from[0][i] = from[mask >> i & 1][i];
    return Isa::load_floats(from[0]);
}
template <class Isa, class Floats>
Floats reordered_plain(Floats f, int distance) {
    float from[16], to[16];
    Isa::store_floats(from, f);
    for (int i = 0; i < 16; ++i) to[i] = from[i ^ distance];
    return Isa::load_floats(to);
}

struct Plain {
    static constexpr int bias = 0;               // of the bytes of tables
    static constexpr int pair_bits = 2;          // codes of scalars up to so many bits are looked up in pairs
    static constexpr bool quadruples = false;    // tables of quadruples in registers
    static constexpr bool eight_tokens = false;  // that many are multiplied with codes decoded once
    static constexpr bool interleaved(int, int) { return false; }  // coordinates come out side by side

    // No products of many tokens at once.
    static constexpr int64_t gemm_tokens = INT64_MAX;
    static int64_t gemm_scratch_bytes(int64_t, int64_t) { return 0; }
    template <class K>
    static void gemm(const Matrix&, const Prepared&, int64_t, int64_t, float*, uint8_t*) {}

    // As `dot`, of bytes without signs, of 7 bits.
    template <class Isa, class Acc, class Bytes>
    static Acc dot_unsigned(Acc acc, Bytes w, const int8_t* x) {
        return Isa::dot(acc, w, x);
    }

    // Distances between floats as they are.
    using Order = int;
    static Order order(int distance) { return distance; }

    // windows.hpp: bytes of 16 lanes of some rows, here of one; sums of products with unsigned bytes, four of each row.
    typedef uint8_t Octets __attribute__((vector_size(16)));
    typedef int32_t LaneSums __attribute__((vector_size(16)));
    // 16 bytes, for each row.
    static Octets repeated(const void* p) {
        Octets o;
        std::memcpy(&o, p, sizeof o);
        return o;
    }
    // Entries of a table for each row, by the lowest four bits of bytes whose highest is clear. No part of who calls
    // it, who would be an hour in compiling: vectors have no such step without an instruction for it.
    __attribute__((noinline)) static Octets look_up(Octets table, Octets index) {
        uint8_t from[16], at[16];
        std::memcpy(from, &table, 16), std::memcpy(at, &index, 16);
        for (int i = 0; i < 16; ++i) at[i] = from[at[i] & 15];
        return repeated(at);
    }
    // Halves of half as many bytes, the lower one first.
    static Octets from_nibbles(const uint8_t* p) {
        uint8_t each[16];
        for (int i = 0; i < 16; ++i) each[i] = p[i / 2] >> i % 2 * 4 & 15;
        return repeated(each);
    }
    __attribute__((noinline)) static LaneSums dot_lanes(LaneSums sums, Octets w, const int8_t* x) {
        uint8_t byte[16];
        int32_t sum[4];
        std::memcpy(byte, &w, sizeof byte), std::memcpy(sum, &sums, sizeof sum);
        for (int i = 0; i < 16; ++i) sum[i / 4] += int32_t(byte[i]) * x[i];
        std::memcpy(&sums, sum, sizeof sum);
        return sums;
    }

    // The sums of four rows, each of its own vector.
    static void reduce_lanes(const LaneSums (&sums)[kTile], int32_t (&whole)[kTile]) {
        for (int r = 0; r < kTile; ++r) whole[r] = sums[r][0] + sums[r][1] + sums[r][2] + sums[r][3];
    }

    // 16 unsigned numbers of 16 bits; sums stop at the largest, differences at 0.
    struct Shorts {
        uint16_t number[16];
    };
    static Shorts load_shorts(const uint16_t* p) {
        Shorts s;
        std::memcpy(s.number, p, sizeof s.number);
        return s;
    }
    static void store_shorts(uint16_t* p, const Shorts& s) { std::memcpy(p, s.number, sizeof s.number); }
    static Shorts min_shorts(Shorts a, const Shorts& b) {
        for (int i = 0; i < 16; ++i) a.number[i] = a.number[i] < b.number[i] ? a.number[i] : b.number[i];
        return a;
    }
    static Shorts add_shorts(Shorts a, const Shorts& b) {
        for (int i = 0; i < 16; ++i) {
            const uint16_t sum = uint16_t(a.number[i] + b.number[i]);
            a.number[i] = sum < b.number[i] ? uint16_t(0xffff) : sum;
        }
        return a;
    }
    static Shorts subtract_shorts(Shorts a, const Shorts& b) {
        for (int i = 0; i < 16; ++i) a.number[i] = a.number[i] > b.number[i] ? uint16_t(a.number[i] - b.number[i]) : 0;
        return a;
    }
    static uint32_t same_shorts(const Shorts& a, const Shorts& b) {  // a bit for each
        uint32_t mask = 0;
        for (int i = 0; i < 16; ++i) mask |= uint32_t(a.number[i] == b.number[i]) << i;
        return mask;
    }

    // Streams one after another, their lanes too.
    static bool decode_rows(LevelReader* const*, const LevelPlace*, int, int64_t, int64_t, int64_t) { return false; }
    static bool decode_symbols(const RansTable& t, int lanes, uint32_t* x, const uint8_t*& at, const uint8_t* end,
                               int64_t count, uint8_t* out) {
        return decode_plain(t, lanes, x, at, end, count, out);
    }
};

}  // namespace
}  // namespace waterfill

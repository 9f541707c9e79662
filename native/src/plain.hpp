// What an instruction set does unless it says otherwise: its struct derives from this one, and hides what it does
// better.
#pragma once

#include <cstdint>

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

    // Distances between floats as they are.
    using Order = int;
    static Order order(int distance) { return distance; }

    // Streams one after another, their lanes too.
    static bool decode_rows(LevelReader* const*, const LevelPlace*, int, int64_t, int64_t, int64_t) { return false; }
    static bool decode_symbols(const RansTable& t, int lanes, uint32_t* x, const uint8_t*& at, const uint8_t* end,
                               int64_t count, uint8_t* out) {
        return decode_plain(t, lanes, x, at, end, count, out);
    }
};

}  // namespace
}  // namespace waterfill

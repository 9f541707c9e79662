// What an instruction set does unless it says otherwise: its struct derives from this one, and hides what it does
// better.
#pragma once

#include <cstdint>

#include "matrix.hpp"
#include "rans.hpp"

namespace waterfill {
namespace {

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

    // Streams one after another, their lanes too.
    static bool decode_rows(LevelReader* const*, const LevelPlace*, int, int64_t, int64_t, int64_t) { return false; }
    static bool decode_symbols(const RansTable& t, int lanes, uint32_t* x, const uint8_t*& at, const uint8_t* end,
                               int64_t count, uint8_t* out) {
        return decode_plain(t, lanes, x, at, end, count, out);
    }
};

}  // namespace
}  // namespace waterfill

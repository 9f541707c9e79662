// Streams of narrow levels with AVX2: levels.hpp. One at a time, since the tables of two would fill the first cache.
#pragma once

#include "intrinsics.hpp"
#include "levels.hpp"
#include "rans_avx2.hpp"

namespace waterfill {
namespace {

struct LevelCode {
    __m256i h0_h1, h1;
    explicit LevelCode(const TrellisCode& c)
        : h0_h1(_mm256_set1_epi8(char(c.h0 ^ c.h1))), h1(_mm256_set1_epi8(char(c.h1))) {}
};

// Kept in registers, so without pointers to it.
struct LevelLanes {
    __m256i x[4], state;
    const uint8_t* at;

    explicit LevelLanes(const LevelReader& r) : at(r.at) {
        for (int k = 0; k < 4; ++k) x[k] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(r.x + 8 * k));
        state = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(r.state));
    }

    void leave(LevelReader& r) const {
        for (int k = 0; k < 4; ++k) _mm256_storeu_si256(reinterpret_cast<__m256i*>(r.x + 8 * k), x[k]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(r.state), state);
    }

    template <class Table>
    void step(const Table& t, const LevelCode& code, uint8_t* out) {
        const __m256i symbols = decode_lanes(t.slots, x, at), twice = _mm256_add_epi8(symbols, symbols);
        const __m256i level = _mm256_add_epi8(_mm256_add_epi8(twice, twice), t.level_of_0);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), walk(level, code));
    }

    // One step of the trellis: rans.hpp. Adding 128 to a level adds 128 to its negative as well.
    __m256i walk(__m256i level, const LevelCode& code) {
        const __m256i four = _mm256_set1_epi8(4);
        const __m256i negative = _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_and_si256(state, _mm256_set1_epi8(1)));
        const __m256i odd = _mm256_cmpeq_epi8(_mm256_and_si256(level, four), four);
        const __m256i shifted = _mm256_and_si256(_mm256_srli_epi16(state, 1), _mm256_set1_epi8(127));
        const __m256i changed =
            _mm256_xor_si256(_mm256_and_si256(negative, code.h0_h1), _mm256_and_si256(odd, code.h1));
        state = _mm256_xor_si256(shifted, changed);
        return _mm256_sub_epi8(_mm256_xor_si256(level, negative), negative);
    }
};

struct LevelTable {
    using Code = LevelCode;
    using Lanes = LevelLanes;
    const uint32_t* slots;
    __m256i level_of_0;

    LevelTable(const LevelReader& r, uint8_t flip) : slots(r.table.slots) {
        const int offset = r.walk.code.states > 1;
        level_of_0 = _mm256_set1_epi8(char(uint8_t(offset - 4 * r.walk.center) ^ flip));
    }
};

inline bool decode_rows_avx2(LevelReader* const* readers, const LevelPlace* places, int count, int64_t width,
                             int64_t first, int64_t last) {
    for (int i = 0; i < count; ++i)
        if (!steps_fit(*readers[i], width)) return false;
    for (int i = 0; i < count; ++i) decode_rows_of<LevelTable, 1>(readers + i, places + i, width, first, last);
    return true;
}

}  // namespace
}  // namespace waterfill

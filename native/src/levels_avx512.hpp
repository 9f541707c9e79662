// Streams of narrow levels with AVX-512: levels.hpp. Upper and lower halves of the states have a register each, and
// everything is done in 16 bits: x = freq * (x / 4096) + k is a 16-bit product of two halves and a carry. Tables by
// bucket (rans.hpp) give levels at once.
#pragma once

#include "intrinsics.hpp"
#include "levels.hpp"

namespace waterfill {
namespace {

template <bool VBMI>
__m512i next_words(__m512i low, __mmask32 need, const uint8_t* at) {
#ifdef __AVX512VBMI2__
    if constexpr (VBMI) return _mm512_mask_expand_epi16(low, need, _mm512_loadu_si512(at));
#endif
    auto half = [](const uint8_t* from, uint32_t mask) {
        const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        return _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(__mmask16(mask), words));
    };
    const uint32_t first = need & 0xffff;
    const __m256i upper = half(at + 2 * __builtin_popcount(first), need >> 16);
    return _mm512_mask_mov_epi16(low, need, _mm512_inserti64x4(_mm512_castsi256_si512(half(at, first)), upper, 1));
}

// The trellis code that all streams of a matrix have.
struct LevelCode {
    __m256i h0_h1, h1;
    explicit LevelCode(const TrellisCode& c)
        : h0_h1(_mm256_set1_epi8(char(c.h0 ^ c.h1))), h1(_mm256_set1_epi8(char(c.h1))) {}
};

// Kept in registers, so without pointers to it.
template <bool VBMI>
struct LevelLanes {
    __m512i high, low;
    __m256i state;
    const uint8_t* at;

    explicit LevelLanes(const LevelReader& r) : at(r.at) {
        const __m512i first = _mm512_loadu_si512(r.x), second = _mm512_loadu_si512(r.x + 16);
        auto halves = [&](int shift) {
            const __m256i a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(first, unsigned(shift)));
            const __m256i b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(second, unsigned(shift)));
            return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
        };
        high = halves(16), low = halves(0);
        state = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(r.state));
    }

    void leave(LevelReader& r) const {
        auto widened = [](__m512i x, int half) {
            return _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x));
        };
        for (int half = 0; half < 2; ++half)
            _mm512_storeu_si512(r.x + 16 * half,
                                _mm512_or_si512(_mm512_slli_epi32(widened(high, half), 16), widened(low, half)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(r.state), state);
    }

    template <class Table>
    void step(const Table& t, const LevelCode& code, uint8_t* out) {
        const __m512i slot = _mm512_and_si512(low, _mm512_set1_epi16(kSlots - 1));
        const __m512i index = t.index(low, slot);
        const __m512i frequency = t.pick(index, t.frequency);  // times 16
        const __m512i upper_slot = _mm512_and_si512(low, _mm512_set1_epi16(int16_t(~(kSlots - 1))));
        const __m512i added =
            _mm512_add_epi16(_mm512_add_epi16(slot, t.pick(index, t.start)), _mm512_mulhi_epu16(frequency, upper_slot));
        low = _mm512_add_epi16(_mm512_mullo_epi16(frequency, high), added);
        high = _mm512_mulhi_epu16(frequency, high);
        const __mmask32 carry = _mm512_cmplt_epu16_mask(low, added);
        const __mmask32 need = _mm512_mask_cmpge_epu16_mask(_mm512_testn_epi16_mask(high, high), low, added);
        high = _mm512_mask_sub_epi16(high, carry, high, _mm512_set1_epi16(-1));
        high = _mm512_mask_mov_epi16(high, need, low);
        low = next_words<VBMI>(low, need, at);
        at += 2 * __builtin_popcount(need);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), walk(_mm512_cvtepi16_epi8(t.pick(index, t.level)), code));
    }

    // One step of the trellis: rans.hpp. Adding 128 to a level adds 128 to its negative as well.
    __m256i walk(__m256i level, const LevelCode& code) {
        const __mmask32 negative = _mm256_test_epi8_mask(state, _mm256_set1_epi8(1));
        const __mmask32 odd = _mm256_test_epi8_mask(level, _mm256_set1_epi8(4));
        const __m256i shifted = _mm256_and_si256(_mm256_srli_epi16(state, 1), _mm256_set1_epi8(127));
        state = _mm256_ternarylogic_epi32(shifted, _mm256_maskz_mov_epi8(negative, code.h0_h1),
                                          _mm256_maskz_mov_epi8(odd, code.h1), 0x96);
        return _mm256_mask_sub_epi8(level, negative, _mm256_setzero_si256(), level);
    }
};

// A table of at most 1 << BITS buckets, and its levels, by bucket and then own symbol, other symbol.
//
// Slot plus shift[bucket] is 2 * bucket times their capacity at the bucket's beginning, and one capacity more at the
// threshold: upper bits of the sum are the index of slot's symbol.
template <bool VBMI, int BITS>
struct LevelTable {
    using Code = LevelCode;
    using Lanes = LevelLanes<VBMI>;

    static constexpr int kBuckets = 1 << BITS, kCapacityBits = kSlotBits - BITS;
    alignas(64) uint16_t shift[32], frequency[2 * kBuckets], start[2 * kBuckets], level[2 * kBuckets];

    LevelTable(const LevelReader& r, uint8_t flip) {
        const RansTable& t = r.table;
        const Walk& w = r.walk;
        constexpr int capacity = 1 << kCapacityBits;
        const int offset = w.code.states > 1;
        for (int b = 0; b < kBuckets; ++b) {
            const int first = b * capacity;
            const int own = int(least(most(t.threshold[b >> (BITS - t.bucket_bits)], first), first + capacity)) - first;
            shift[b] = uint16_t((b + 1) * capacity - own);
            for (int other = 0; other < 2; ++other) {
                const int slot = first + (other ? int(least(own, capacity - 1)) : 0), at = 2 * b + other;
                const uint32_t entry = t.slots[slot];
                frequency[at] = uint16_t(((entry & 4095) + 1) << 4);
                start[at] = uint16_t((entry >> 12 & 4095) - uint32_t(slot));
                level[at] = uint8_t(4 * (int(entry >> 24) - w.center) + offset) ^ flip;
            }
        }
        for (int b = kBuckets; b < 32; ++b) shift[b] = shift[b - kBuckets];
    }

    // The look-up heeds five bits of an index.
    __m512i index(__m512i x, __m512i slot) const {
        const __m512i by = _mm512_permutexvar_epi16(_mm512_srli_epi16(x, kCapacityBits), _mm512_load_si512(shift));
        return _mm512_srli_epi16(_mm512_add_epi16(slot, by), kCapacityBits);
    }

    // Entries of 32 lanes.
    static __m512i pick(__m512i index, const uint16_t* table) {
        const __m512i low = _mm512_load_si512(table);
        if constexpr (BITS == 4)
            return _mm512_permutexvar_epi16(index, low);
        else
            return _mm512_permutex2var_epi16(low, index, _mm512_load_si512(table + 32));
    }
};

template <bool VBMI>
bool decode_rows_avx512(LevelReader* const* readers, const LevelPlace* places, int count, int64_t width, int64_t first,
                        int64_t last) {
    int bits = 4;  // of buckets
    for (int i = 0; i < count; ++i) {
        const RansTable& t = readers[i]->table;
        const bool single = (t.slots[0] & 4095) == 4095;  // symbol: 16 times its frequency takes 17 bits
        if (!steps_fit(*readers[i], width) || t.bucket_bits > 5 || single) return false;
        bits = int(most(bits, t.bucket_bits));
    }
    if (bits == 4)
        decode_rows_with<LevelTable<VBMI, 4>>(readers, places, count, width, first, last);
    else
        decode_rows_with<LevelTable<VBMI, 5>>(readers, places, count, width, first, last);
    return true;
}

}  // namespace
}  // namespace waterfill

// rANS in 32 lanes, four registers of states.
#pragma once

#include "intrinsics.hpp"
#include "rans.hpp"

namespace waterfill {
namespace {

// Which of the next words each of eight lanes takes, for every set of lanes that need one.
struct Places {
    uint8_t at[256][8];
};
constexpr Places make_places() {
    Places places{};
    for (int mask = 0; mask < 256; ++mask)
        for (int lane = 0, next = 0; lane < 8; ++lane)
            if (mask >> lane & 1) places.at[mask][lane] = uint8_t(next++);
    return places;
}
constexpr Places kPlaces = make_places();

// Eight loads take less time than a gathering instruction.
inline __m256i entries_of(const uint32_t* slots, __m256i slot) {
    alignas(32) uint32_t at[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(at), slot);
    auto entry = [&](int lane) { return int(slots[at[lane]]); };
    return _mm256_setr_epi32(entry(0), entry(1), entry(2), entry(3), entry(4), entry(5), entry(6), entry(7));
}

// One symbol of each of eight lanes.
inline __m256i decode_eight(const uint32_t* slots, __m256i& x, const uint8_t*& at) {
    const __m256i low12 = _mm256_set1_epi32(kSlots - 1);
    const __m256i entry = entries_of(slots, _mm256_and_si256(x, low12));
    const __m256i freq = _mm256_add_epi32(_mm256_and_si256(entry, low12), _mm256_set1_epi32(1));
    x = _mm256_add_epi32(_mm256_mullo_epi32(freq, _mm256_srli_epi32(x, kSlotBits)),
                         _mm256_and_si256(_mm256_srli_epi32(entry, 12), low12));
    const __m256i need = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
    const uint32_t mask = uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(need)));
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    const __m256i places = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPlaces.at[mask])));
    const __m256i filled = _mm256_or_si256(_mm256_slli_epi32(x, 16), _mm256_permutevar8x32_epi32(words, places));
    x = _mm256_blendv_epi8(x, filled, need);
    at += 2 * __builtin_popcount(mask);
    return _mm256_srli_epi32(entry, 24);
}

// One symbol of each of 32 lanes, as bytes.
inline __m256i decode_lanes(const uint32_t* slots, __m256i (&x)[4], const uint8_t*& at) {
    __m256i symbols[4];
    for (int k = 0; k < 4; ++k) symbols[k] = decode_eight(slots, x[k], at);
    const __m256i low = _mm256_packs_epi32(symbols[0], symbols[1]), high = _mm256_packs_epi32(symbols[2], symbols[3]);
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// As many symbols as there surely are words for.
inline int64_t decode_avx2(const RansTable& t, uint32_t* x, const uint8_t*& from, const uint8_t* end, int64_t count,
                           uint8_t* out) {
    __m256i lane[4];
    const uint8_t* at = from;
    for (int k = 0; k < 4; ++k) lane[k] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * k));
    int64_t done = 0;
    for (; done < count && end - at >= kStepBytes; done += kMostLanes)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + done), decode_lanes(t.slots, lane, at));
    for (int k = 0; k < 4; ++k) _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + 8 * k), lane[k]);
    from = at;
    return done;
}

}  // namespace
}  // namespace waterfill

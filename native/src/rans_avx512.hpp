// rANS in 32 lanes, two registers of states. Tables of up to 32 buckets are looked up in registers, others by gathers.
#pragma once

#include "intrinsics.hpp"
#include "rans.hpp"

namespace waterfill {
namespace {

struct Gathered {
    const RansTable& t;
    __m512i operator()(__m512i slot) const { return _mm512_i32gather_epi32(slot, t.slots, 4); }
};

// 16 buckets (BITS = 4) or 32.
template <int BITS>
struct Buckets {
    __m512i threshold[2], own[2], other[2];
    explicit Buckets(const RansTable& t) {
        for (int i = 0; i < 2; ++i) {
            threshold[i] = _mm512_loadu_si512(t.threshold + 16 * i);
            own[i] = _mm512_loadu_si512(t.own + 16 * i);
            other[i] = _mm512_loadu_si512(t.other + 16 * i);
        }
    }
    static __m512i pick(__m512i index, const __m512i (&table)[2]) {
        if constexpr (BITS == 4)
            return _mm512_permutexvar_epi32(index, table[0]);
        else
            return _mm512_permutex2var_epi32(table[0], index, table[1]);
    }
    __m512i operator()(__m512i slot) const {
        const __m512i bucket = _mm512_srli_epi32(slot, kSlotBits - BITS);
        const __mmask16 mine = _mm512_cmplt_epu32_mask(slot, pick(bucket, threshold));
        const __m512i entry = _mm512_mask_mov_epi32(pick(bucket, other), mine, pick(bucket, own));
        // k - slot becomes k, modulo 4096, inside the entry
        const __m512i k = _mm512_add_epi32(entry, _mm512_slli_epi32(slot, 12));
        return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xfff000), k, entry, 0xCA);
    }
};

template <class Table>
__m512i decode_lanes(const Table& table, __m512i x, const uint8_t*& at, uint8_t* out) {
    const __m512i low12 = _mm512_set1_epi32(kSlots - 1);
    const __m512i entry = table(_mm512_and_si512(x, low12));
    const __m512i freq = _mm512_add_epi32(_mm512_and_si512(entry, low12), _mm512_set1_epi32(1));
    x = _mm512_add_epi32(_mm512_mullo_epi32(freq, _mm512_srli_epi32(x, kSlotBits)),
                         _mm512_and_si512(_mm512_srli_epi32(entry, 12), low12));
    const __mmask16 need = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32(int(kLeastState)));
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    x = _mm512_mask_or_epi32(x, need, _mm512_slli_epi32(x, 16), _mm512_maskz_expand_epi32(need, words));
    at += 2 * __builtin_popcount(need);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(_mm512_srli_epi32(entry, 24)));
    return x;
}

template <class Table>
int64_t decode_32(const Table& table, uint32_t* x, const uint8_t*& from, const uint8_t* end, int64_t count,
                  uint8_t* out) {
    __m512i low = _mm512_loadu_si512(x), high = _mm512_loadu_si512(x + 16);
    const uint8_t* at = from;
    int64_t done = 0;
    for (; done < count && end - at >= kStepBytes; done += 32) {
        low = decode_lanes(table, low, at, out + done);
        high = decode_lanes(table, high, at, out + done + 16);
    }
    _mm512_storeu_si512(x, low);
    _mm512_storeu_si512(x + 16, high);
    from = at;
    return done;
}

// As many symbols as there surely are words for; the rest is left to the scalar code.
inline int64_t decode_avx512(const RansTable& t, uint32_t* x, const uint8_t*& at, const uint8_t* end, int64_t count,
                             uint8_t* out) {
    switch (t.bucket_bits) {
        case 4: return decode_32(Buckets<4>(t), x, at, end, count, out);
        case 5: return decode_32(Buckets<5>(t), x, at, end, count, out);
        default: return decode_32(Gathered{t}, x, at, end, count, out);
    }
}

}  // namespace
}  // namespace waterfill

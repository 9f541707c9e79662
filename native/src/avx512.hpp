// AVX-512 with VNNI; with VBMI tables of up to 256 bytes are looked up in registers, without it words are.
//
// vpdpbusd multiplies unsigned with signed bytes: table entries carry a bias of 128, and the accumulators start from
// what undoes it.
#pragma once

#include <type_traits>

#include "gemm_avx512.hpp"
#include "intrinsics.hpp"
#include "kernels.hpp"
#include "levels_avx512.hpp"
#include "rans_avx512.hpp"

namespace waterfill {
namespace {

template <bool VBMI>
struct Avx512 {
    static constexpr int bias = 128, lanes = 16;
    static constexpr int pair_bits = VBMI ? 3 : 2;
    static constexpr bool quadruples = VBMI, eight_tokens = true;
    // Words of two coordinates come out side by side.
    static constexpr bool interleaved(int bits, int p) { return !VBMI && p == 2 && bits > 4; }
    static constexpr int64_t gemm_tokens = 24;

    using Bytes = __m512i;
    using Acc = __m512i;

    static Bytes load(const void* p) { return _mm512_loadu_si512(p); }
    static void store(void* p, Bytes b) { _mm512_storeu_si512(p, b); }
    static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

    static __m512i masked(__m512i v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8(char(mask))); }
    static __m512i broadcast256(const uint8_t* p) {
        return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }

    // Bits above BITS may be left over from neighbours where the look-up ignores them: vpermb reads six.
    template <int BITS>
    static void codes(const uint8_t* chunk, Bytes (&index)[2]) {
        constexpr Planes at = planes_of(BITS);
        if constexpr (BITS == 8) {
            index[0] = load(chunk);
            index[1] = load(chunk + 64);
            return;
        }
        const __m512i first = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(2), 1);  // 0 and 2
        if constexpr (at.at4 >= 0) {
            const __m512i both = load(chunk + at.at4);
            index[0] = both;
            index[1] = _mm512_srli_epi16(both, 4);
            if constexpr (at.at2 >= 0) {  // bits 4 and 5 from the plane of two
                const __m512i all = broadcast256(chunk + at.at2);
                const __m512i high0 = _mm512_rolv_epi32(all, _mm512_sub_epi32(_mm512_set1_epi32(4), first));
                const __m512i high1 = _mm512_rorv_epi32(all, first);
                const __m512i low = _mm512_set1_epi8(15);
                index[0] = _mm512_ternarylogic_epi32(low, index[0], high0, 0xCA);  // low ? index : high
                index[1] = _mm512_ternarylogic_epi32(low, index[1], high1, 0xCA);
            }
        } else if constexpr (at.at2 >= 0) {
            const __m512i all = broadcast256(chunk + at.at2);
            index[0] = _mm512_srlv_epi32(all, first);
            index[1] = _mm512_srlv_epi32(all, _mm512_add_epi32(first, _mm512_set1_epi32(4)));
        } else {
            index[0] = index[1] = _mm512_setzero_si512();
        }
        constexpr int below = BITS & ~1;
        if constexpr (at.at1 >= 0) {
            uint64_t bits[2];
            std::memcpy(bits, chunk + at.at1, 16);
            for (int half = 0; half < 2; ++half) {
                const __m512i clean = masked(index[half], (1 << (BITS - 1)) - 1);
                index[half] = _mm512_mask_add_epi8(clean, bits[half], clean, _mm512_set1_epi8(char(1 << (BITS - 1))));
            }
        } else if constexpr (!VBMI) {
            for (int half = 0; half < 2; ++half) index[half] = masked(index[half], (1 << below) - 1);
        }
    }

    // vpermw and vpermi2w: 32 or 64 words; more by blending.
    template <int BITS>
    struct Words {
        static constexpr int registers = BITS > 5 ? 1 << (BITS - 5) : 1;
        __m512i part[registers];
        explicit Words(const int16_t* words) {
            for (int i = 0; i < registers; ++i) part[i] = _mm512_loadu_si512(words + 32 * i);
        }
        __m512i operator()(__m512i index) const {
            if constexpr (registers == 1) return _mm512_permutexvar_epi16(index, part[0]);
            if constexpr (registers == 2) return _mm512_permutex2var_epi16(part[0], index, part[1]);
            if constexpr (registers == 4) return pick(index, 64, four<0>(index), four<2>(index));
            if constexpr (registers == 8)
                return pick(index, 128, pick(index, 64, four<0>(index), four<2>(index)),
                            pick(index, 64, four<4>(index), four<6>(index)));
        }
        template <int AT>
        __m512i four(__m512i index) const {
            if constexpr (AT + 1 < registers)
                return _mm512_permutex2var_epi16(part[AT], index, part[AT + 1]);
            else
                return index;
        }
        static __m512i pick(__m512i index, int bit, __m512i clear, __m512i set) {
            return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(short(bit))), clear, set);
        }
    };

    static __m512i widened(__m512i index, int half) {
        return _mm512_cvtepu8_epi16(half ? _mm512_extracti64x4_epi64(index, 1) : _mm512_castsi512_si256(index));
    }

    // 64 (six bits), 128 or 256 bytes per coordinate.
    template <int BITS>
    struct Permuted {
        static constexpr int registers = BITS > 6 ? 1 << (BITS - 6) : 1;
        __m512i part[registers];
        explicit Permuted(const uint8_t* bytes) {
            for (int i = 0; i < registers; ++i) part[i] = _mm512_loadu_si512(bytes + 64 * i);
        }
        __m512i operator()(__m512i index) const {
            if constexpr (VBMI) {
                if constexpr (registers == 1) return _mm512_permutexvar_epi8(index, part[0]);
                if constexpr (registers == 2) return _mm512_permutex2var_epi8(part[0], index, part[1]);
                if constexpr (registers == 4)
                    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index),
                                                  _mm512_permutex2var_epi8(part[0], index, part[1]),
                                                  _mm512_permutex2var_epi8(part[2], index, part[3]));
            } else {
                return _mm512_shuffle_epi8(part[0], index);  // sixteen entries, repeated
            }
        }
    };

    template <int BITS, int P>
    struct Separate {
        Permuted<BITS> first, second, third, fourth;  // those beyond P are never looked at
        explicit Separate(const waterfill::Table& t)
            : first(t.bytes[0]),
              second(t.bytes[P > 1]),
              third(t.bytes[P > 2 ? 2 : 0]),
              fourth(t.bytes[P > 2 ? 3 : 0]) {}
        void look_up(const Bytes (&index)[2], Bytes (&value)[2 * P]) const {
            for (int half = 0; half < 2; ++half) {
                value[half * P] = first(index[half]);
                if constexpr (P > 1) value[half * P + 1] = second(index[half]);
                if constexpr (P > 2) value[half * P + 2] = third(index[half]);
                if constexpr (P > 2) value[half * P + 3] = fourth(index[half]);
            }
        }
    };

    template <int BITS>
    struct SideBySide {
        Words<BITS> words;
        explicit SideBySide(const waterfill::Table& t) : words(reinterpret_cast<const int16_t*>(t.entries)) {}
        void look_up(const Bytes (&index)[2], Bytes (&value)[4]) const {
            for (int k = 0; k < 4; ++k) value[k] = words(widened(index[k / 2], k % 2));
        }
    };

    template <int BITS, int P>
    using Table = std::conditional_t<interleaved(BITS, P), SideBySide<BITS>, Separate<BITS, P>>;

    template <int BITS>
    struct WordTable {
        Words<BITS> words;
        explicit WordTable(const waterfill::Table& t) : words(t.words) {}
        void look_up(const Bytes (&index)[2], int16_t* out) const {
            for (int k = 0; k < 4; ++k) store(out + 32 * k, words(widened(index[k / 2], k % 2)));
        }
    };

    static Acc start(int32_t correction) { return _mm512_zextsi128_si512(_mm_cvtsi32_si128(correction)); }
    static Acc dot(Acc acc, Bytes w, const int8_t* x) { return accumulate<int8_t>(acc, w, load(x)); }
    template <class>
    static Acc dot_unsigned(Acc acc, Bytes w, const int8_t* x) {
        return dot(acc, w, x);
    }
    static Acc dot_words(Acc acc, Bytes w, const int16_t* x) { return accumulate<int16_t>(acc, w, load(x)); }
    static void reduce(const Acc (&acc)[kTile], int32_t (&sum)[kTile]) {
        const __m512i ab =
            _mm512_add_epi32(_mm512_unpacklo_epi32(acc[0], acc[1]), _mm512_unpackhi_epi32(acc[0], acc[1]));
        const __m512i cd =
            _mm512_add_epi32(_mm512_unpacklo_epi32(acc[2], acc[3]), _mm512_unpackhi_epi32(acc[2], acc[3]));
        const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(sum),
                         _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
    }

    typedef uint8_t Octets __attribute__((vector_size(64)));
    typedef int32_t LaneSums __attribute__((vector_size(64)));
    static Octets repeated(const void* p) {
        return Octets(_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p))));
    }
    static Octets look_up(Octets table, Octets index) {
        return Octets(_mm512_shuffle_epi8(__m512i(table), __m512i(index)));
    }
    static Octets from_nibbles(const uint8_t* p) {
        const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return Octets(masked(_mm512_or_si512(both, _mm512_slli_epi16(both, 4)), 15));
    }
    static LaneSums dot_lanes(LaneSums sums, Octets w, const int8_t* x) {
        return LaneSums(accumulate<int8_t>(__m512i(sums), __m512i(w), __m512i(repeated(x))));
    }
    static void reduce_lanes(const LaneSums (&sums)[1], int32_t (&whole)[kTile]) {  // of four rows
        const __m512i four = __m512i(sums[0]), two = _mm512_add_epi32(four, _mm512_shuffle_epi32(four, _MM_PERM_BADC));
        const __m512i each = _mm512_add_epi32(two, _mm512_shuffle_epi32(two, _MM_PERM_CDAB));
        const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(whole),
                         _mm512_castsi512_si128(_mm512_permutexvar_epi32(firsts, each)));
    }

    using Shorts = __m256i;
    static Shorts load_shorts(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static void store_shorts(uint16_t* p, Shorts s) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), s); }
    static Shorts min_shorts(Shorts a, Shorts b) { return _mm256_min_epu16(a, b); }
    static Shorts add_shorts(Shorts a, Shorts b) { return _mm256_adds_epu16(a, b); }
    static Shorts subtract_shorts(Shorts a, Shorts b) { return _mm256_subs_epu16(a, b); }
    static uint32_t same_shorts(Shorts a, Shorts b) { return _mm256_cmpeq_epi16_mask(a, b); }

    using Floats = __m512;
    static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
    static void store_floats(float* p, Floats f) { _mm512_storeu_ps(p, f); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    static uint32_t less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
    static Floats fill(float f) { return _mm512_set1_ps(f); }
    static Floats select(uint32_t mask, Floats set, Floats clear) {
        return _mm512_mask_blend_ps(__mmask16(mask), clear, set);
    }
    using Order = __m512i;  // element i is taken from i ^ distance
    static Order order(int distance) {
        const __m512i each = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_xor_si512(each, _mm512_set1_epi32(distance));
    }
    static Floats reordered(Floats f, Order order) { return _mm512_permutexvar_ps(order, f); }

    static bool decode_rows(LevelReader* const* readers, const LevelPlace* places, int count, int64_t width,
                            int64_t first, int64_t last) {
        return decode_rows_avx512<VBMI>(readers, places, count, width, first, last);
    }
    static bool decode_symbols(const RansTable& t, int lanes, uint32_t* x, const uint8_t*& at, const uint8_t* end,
                               int64_t count, uint8_t* out) {
        const int64_t done = lanes == 32 ? decode_avx512(t, x, at, end, count, out) : 0;
        return decode_plain(t, lanes, x, at, end, count - done, out + done);
    }

    static int64_t gemm_scratch_bytes(int64_t stride, int64_t tokens) { return gemm_scratch(stride, tokens); }
    template <class K>
    static void gemm(const Matrix& m, const Prepared& x, int64_t first_tile, int64_t last_tile, float* y,
                     uint8_t* scratch) {
        if (m.table->precision == 8)
            gemm_avx512<K, int8_t>(m, x, first_tile, last_tile, y, scratch);
        else
            gemm_avx512<K, int16_t>(m, x, first_tile, last_tile, y, scratch);
    }
};

}  // namespace
}  // namespace waterfill

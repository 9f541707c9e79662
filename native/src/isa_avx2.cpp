// AVX2. Products of bytes go through maddubs, which saturates: signs move from the table to the activations, so that
// no sum of two exceeds 2 * 127 * 127.
#include "matrix.hpp"

#if defined(__AVX2__)
#include "intrinsics.hpp"
#include "kernels.hpp"
#include "levels_avx2.hpp"
#include "plain.hpp"

namespace waterfill {
namespace {

struct Avx2 : Plain {
    static constexpr int lanes = 8;

    struct Bytes {
        __m256i low, high;
    };
    using Acc = __m256i;

    static __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static Bytes load(const void* p) { return {load256(p), load256(static_cast<const uint8_t*>(p) + 32)}; }
    static void store(void* p, Bytes b) {
        _mm256_storeu_si256(static_cast<__m256i*>(p), b.low);
        _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, b.high);
    }
    static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

    static __m256i masked(__m256i v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi8(char(mask))); }

    // 32 bits -> 32 bytes that hold `value` or 0.
    static __m256i spread(const uint8_t* p, int value) {
        int32_t bits;
        std::memcpy(&bits, p, 4);
        const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
        const __m256i byte = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), which), bit);
        return masked(_mm256_cmpeq_epi8(byte, bit), value);
    }

    template <int BITS>
    static void codes(const uint8_t* chunk, Bytes (&index)[2]) {
        constexpr Planes at = planes_of(BITS);
        const __m256i zero = _mm256_setzero_si256();
        __m256i part[4] = {zero, zero, zero, zero};
        if constexpr (at.at8 >= 0)
            for (int k = 0; k < 4; ++k) part[k] = load256(chunk + at.at8 + 32 * k);
        if constexpr (at.at4 >= 0)
            for (int k = 0; k < 2; ++k) {
                const __m256i both = load256(chunk + at.at4 + 32 * k);
                part[k] = masked(both, 15);
                part[k + 2] = masked(_mm256_srli_epi16(both, 4), 15);
            }
        if constexpr (at.at2 >= 0) {
            const __m256i all = load256(chunk + at.at2);
            constexpr int up = at.at4 >= 0 ? 4 : 0;
            const __m256i two[4] = {masked(all, 3), masked(_mm256_srli_epi16(all, 2), 3),
                                    masked(_mm256_srli_epi16(all, 4), 3), masked(_mm256_srli_epi16(all, 6), 3)};
            for (int k = 0; k < 4; ++k) part[k] = _mm256_or_si256(part[k], _mm256_slli_epi16(two[k], up));
        }
        if constexpr (at.at1 >= 0)
            for (int k = 0; k < 4; ++k)
                part[k] = _mm256_or_si256(part[k], spread(chunk + at.at1 + 4 * k, 1 << (BITS - 1)));
        index[0] = {part[0], part[1]};
        index[1] = {part[2], part[3]};
    }

    // Tables of 16 entries each; the one whose number is in the code's upper bits answers, the others give 0.
    template <int BITS, int P>
    struct Table {
        static constexpr int slices = BITS > 4 ? 1 << (BITS - 4) : 1;
        __m256i slice[P][slices];
        explicit Table(const waterfill::Table& t) {
            for (int k = 0; k < P; ++k)
                for (int s = 0; s < slices; ++s)
                    slice[k][s] = _mm256_broadcastsi128_si256(
                        _mm_loadu_si128(reinterpret_cast<const __m128i*>(t.bytes[k] + 16 * s)));
        }
        void one(__m256i code, __m256i (&value)[P]) const {
            if constexpr (slices == 1) {
                for (int k = 0; k < P; ++k) value[k] = _mm256_shuffle_epi8(slice[k][0], code);
            } else {
                for (int k = 0; k < P; ++k) value[k] = _mm256_setzero_si256();
                for (int s = 0; s < slices; ++s) {
                    const __m256i other = _mm256_xor_si256(code, _mm256_set1_epi8(char(16 * s)));
                    const __m256i from = _mm256_adds_epu8(other, _mm256_set1_epi8(0x70));  // bit 7 set: not this slice
                    for (int k = 0; k < P; ++k)
                        value[k] = _mm256_or_si256(value[k], _mm256_shuffle_epi8(slice[k][s], from));
                }
            }
        }
        void look_up(const Bytes (&index)[2], Bytes (&value)[2 * P]) const {
            for (int half = 0; half < 2; ++half) {
                __m256i low[P], high[P];
                one(index[half].low, low);
                one(index[half].high, high);
                for (int k = 0; k < P; ++k) value[half * P + k] = {low[k], high[k]};
            }
        }
    };

    // Tables of 16 low and 16 high bytes, each but the first of a chain xored with the one before. Shuffles give 0
    // where bit 7 of a code is set, as it is where a table's first code was taken from a lesser one: so a chain xors
    // all tables up to the code's own, whose entry is what is left. Bit 7 of a code itself chooses between two chains.
    template <int BITS>
    struct WordTable {
        static constexpr int slices = 1 << (BITS - 4), chain = slices < 8 ? slices : 8;
        __m256i low[slices], high[slices];
        explicit WordTable(const waterfill::Table& t) {
            __m256i before = _mm256_setzero_si256();
            for (int s = 0; s < slices; ++s) {
                const __m256i words = load256(t.words + 16 * s);
                const __m256i each = s % chain ? _mm256_xor_si256(words, before) : words;
                low[s] = repeated_bytes(_mm256_and_si256(each, _mm256_set1_epi16(255)));
                high[s] = repeated_bytes(_mm256_srli_epi16(each, 8));
                before = words;
            }
        }
        static __m256i repeated_bytes(__m256i words) {
            return _mm256_broadcastsi128_si256(
                _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
        }
        template <int FIRST>
        void add_chain(__m256i code, __m256i& lows, __m256i& highs) const {
            WF_UNROLL for (int s = FIRST; s < FIRST + chain; ++s) {
                lows = _mm256_xor_si256(lows, _mm256_shuffle_epi8(low[s], code));
                highs = _mm256_xor_si256(highs, _mm256_shuffle_epi8(high[s], code));
                code = _mm256_sub_epi8(code, _mm256_set1_epi8(16));
            }
        }
        void look_up(const Bytes (&index)[2], int16_t* out) const {
            const __m256i codes[4] = {index[0].low, index[0].high, index[1].low, index[1].high};
            WF_UNROLL for (int k = 0; k < 4; ++k) {
                __m256i lows = _mm256_setzero_si256(), highs = lows;
                add_chain<0>(codes[k], lows, highs);
                if constexpr (slices > chain) {
                    __m256i upper_lows = _mm256_setzero_si256(), upper_highs = upper_lows;
                    add_chain<slices - chain>(_mm256_xor_si256(codes[k], _mm256_set1_epi8(-128)), upper_lows,
                                              upper_highs);
                    lows = _mm256_blendv_epi8(lows, upper_lows, codes[k]);
                    highs = _mm256_blendv_epi8(highs, upper_highs, codes[k]);
                }
                const __m256i even = _mm256_unpacklo_epi8(lows, highs), odd = _mm256_unpackhi_epi8(lows, highs);
                store(out + 32 * k,
                      {_mm256_permute2x128_si256(even, odd, 0x20), _mm256_permute2x128_si256(even, odd, 0x31)});
            }
        }
    };

    static Acc start(int32_t correction) { return _mm256_setr_epi32(correction, 0, 0, 0, 0, 0, 0, 0); }
    static __m256i products(__m256i w, __m256i x) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    static Acc dot(Acc acc, Bytes w, const int8_t* x) {
        return _mm256_add_epi32(acc, _mm256_add_epi32(products(w.low, load256(x)), products(w.high, load256(x + 32))));
    }
    template <class Isa>
    static Acc dot_unsigned(Acc acc, Bytes w, const int8_t* x) {  // no sum of two saturates
        const __m256i one = _mm256_set1_epi16(1);
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w.low, load256(x)), one));
        return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w.high, load256(x + 32)), one));
    }
    static Acc dot_words(Acc acc, Bytes w, const int16_t* x) {
        return _mm256_add_epi32(
            acc, _mm256_add_epi32(_mm256_madd_epi16(w.low, load256(x)), _mm256_madd_epi16(w.high, load256(x + 16))));
    }
    static void reduce(const Acc (&acc)[kTile], int32_t (&sum)[kTile]) {
        const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(acc[0], acc[1]), _mm256_hadd_epi32(acc[2], acc[3]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(sum),
                         _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
    }

    struct Floats {
        __m256 low, high;
    };
    static Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store_floats(float* p, Floats f) {
        _mm256_storeu_ps(p, f.low);
        _mm256_storeu_ps(p + 8, f.high);
    }
    static Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
    static Floats subtract(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
    static Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
    static uint32_t less(Floats a, Floats b) {
        const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ));
        return uint32_t(low | _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ)) << 8);
    }
    static Floats fill(float f) { return {_mm256_set1_ps(f), _mm256_set1_ps(f)}; }
    static Floats select(uint32_t mask, Floats set, Floats clear) {
        return {blend(mask, set.low, clear.low), blend(mask >> 8, set.high, clear.high)};
    }
    static __m256 blend(uint32_t mask, __m256 set, __m256 clear) {
        const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(mask)), bits), bits);
        return _mm256_blendv_ps(clear, set, _mm256_castsi256_ps(chosen));
    }
    struct Order {  // element i is taken from i ^ distance
        __m256i within;
        bool halves;
    };
    static Order order(int distance) {
        const __m256i each = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return {_mm256_xor_si256(each, _mm256_set1_epi32(distance & 7)), (distance & 8) != 0};
    }
    static Floats reordered(Floats f, const Order& order) {
        const __m256 low = _mm256_permutevar8x32_ps(f.low, order.within);
        const __m256 high = _mm256_permutevar8x32_ps(f.high, order.within);
        return order.halves ? Floats{high, low} : Floats{low, high};
    }

    typedef uint8_t Octets __attribute__((vector_size(32)));
    typedef int32_t LaneSums __attribute__((vector_size(32)));
    static Octets repeated(const void* p) {
        return Octets(_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p))));
    }
    static Octets look_up(Octets table, Octets index) {
        return Octets(_mm256_shuffle_epi8(__m256i(table), __m256i(index)));
    }
    static Octets from_nibbles(const uint8_t* p) {
        const __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return Octets(masked(_mm256_or_si256(both, _mm256_slli_epi16(both, 4)), 15));
    }
    static LaneSums dot_lanes(LaneSums sums, Octets w, const int8_t* x) {  // of 7 bits, so that no sum of two saturates
        const __m256i pairs = _mm256_maddubs_epi16(__m256i(w), __m256i(repeated(x)));
        return LaneSums(_mm256_add_epi32(__m256i(sums), _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
    }
    static void reduce_lanes(const LaneSums (&sums)[2], int32_t (&whole)[kTile]) {  // of two rows each
        const __m256i pairs = _mm256_hadd_epi32(__m256i(sums[0]), __m256i(sums[1]));
        const __m256i each = _mm256_hadd_epi32(pairs, pairs);  // rows 0 and 2 below, 1 and 3 above
        _mm_storeu_si128(reinterpret_cast<__m128i*>(whole),
                         _mm_unpacklo_epi32(_mm256_castsi256_si128(each), _mm256_extracti128_si256(each, 1)));
    }

    using Shorts = __m256i;
    static Shorts load_shorts(const uint16_t* p) { return load256(p); }
    static void store_shorts(uint16_t* p, Shorts s) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), s); }
    static Shorts min_shorts(Shorts a, Shorts b) { return _mm256_min_epu16(a, b); }
    static Shorts add_shorts(Shorts a, Shorts b) { return _mm256_adds_epu16(a, b); }
    static Shorts subtract_shorts(Shorts a, Shorts b) { return _mm256_subs_epu16(a, b); }
    static uint32_t same_shorts(Shorts a, Shorts b) {
        const __m256i equal = _mm256_cmpeq_epi16(a, b);
        return uint32_t(
            _mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128(equal), _mm256_extracti128_si256(equal, 1))));
    }

    static bool decode_rows(LevelReader* const* readers, const LevelPlace* places, int count, int64_t width,
                            int64_t first, int64_t last) {
        return decode_rows_avx2(readers, places, count, width, first, last);
    }
    static bool decode_symbols(const RansTable& t, int lanes, uint32_t* x, const uint8_t*& at, const uint8_t* end,
                               int64_t count, uint8_t* out) {
        const int64_t done = lanes == kMostLanes ? decode_avx2(t, x, at, end, count, out) : 0;
        return decode_plain(t, lanes, x, at, end, count - done, out + done);
    }
};

}  // namespace

const Functions* avx2_functions() { return Kernels<Avx2>::functions("avx2"); }

}  // namespace waterfill
#else
namespace waterfill {
const Functions* avx2_functions() { return nullptr; }
}  // namespace waterfill
#endif

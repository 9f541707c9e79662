// NEON with the dot product extension (Armv8.2 and every Apple processor): tables of 16 to 64 bytes are one
// instruction, products of signed bytes another.
#include "matrix.hpp"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

#include "kernels.hpp"
#include "plain.hpp"

namespace waterfill {
namespace {

struct Neon : Plain {
    static constexpr int lanes = 4;

    using Bytes = uint8x16x4_t;
    using Acc = int32x4_t;

    static Bytes load(const void* p) {
        const uint8_t* at = static_cast<const uint8_t*>(p);
        return {{vld1q_u8(at), vld1q_u8(at + 16), vld1q_u8(at + 32), vld1q_u8(at + 48)}};
    }
    static void store(void* p, Bytes b) {
        for (int i = 0; i < 4; ++i) vst1q_u8(static_cast<uint8_t*>(p) + 16 * i, b.val[i]);
    }
    static void prefetch(const void* p) { __builtin_prefetch(p); }

    // 16 bits -> 16 bytes that hold `value` or 0.
    static uint8x16_t spread(const uint8_t* p, uint8_t value) {
        const uint8x16_t bits = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
        return vandq_u8(vtstq_u8(vcombine_u8(vdup_n_u8(p[0]), vdup_n_u8(p[1])), bits), vdupq_n_u8(value));
    }

    template <int BITS>
    static void codes(const uint8_t* chunk, Bytes (&index)[2]) {
        constexpr Planes at = planes_of(BITS);
        for (int k = 0; k < 8; ++k) {  // 16 codes each
            uint8x16_t code = vdupq_n_u8(0);
            if constexpr (at.at8 >= 0) code = vld1q_u8(chunk + at.at8 + 16 * k);
            if constexpr (at.at4 >= 0) {
                const uint8x16_t both = vld1q_u8(chunk + at.at4 + 16 * (k % 4));
                code = k < 4 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4);
            }
            if constexpr (at.at2 >= 0) {
                const uint8x16_t all = vld1q_u8(chunk + at.at2 + 16 * (k % 2));
                const uint8x16_t two = vandq_u8(vshlq_u8(all, vdupq_n_s8(int8_t(-2 * (k / 2)))), vdupq_n_u8(3));
                code = vorrq_u8(code, at.at4 >= 0 ? vshlq_n_u8(two, 4) : two);
            }
            if constexpr (at.at1 >= 0) code = vorrq_u8(code, spread(chunk + at.at1 + 2 * k, 1 << (BITS - 1)));
            index[k / 4].val[k % 4] = code;
        }
    }

    // Tables of 64 entries each; vtbx keeps what the tables before it have answered.
    template <int BITS, int P>
    struct Table {
        static constexpr int slices = BITS > 6 ? 1 << (BITS - 6) : 1;
        uint8x16x4_t slice[P][slices];
        explicit Table(const waterfill::Table& t) {
            for (int k = 0; k < P; ++k)
                for (int s = 0; s < slices; ++s) slice[k][s] = load(t.bytes[k] + 64 * s);
        }
        void look_up(const Bytes (&index)[2], Bytes (&value)[2 * P]) const {
            for (int half = 0; half < 2; ++half)
                for (int k = 0; k < P; ++k)
                    for (int i = 0; i < 4; ++i) {
                        const uint8x16_t code = index[half].val[i];
                        uint8x16_t found;
                        if constexpr (BITS <= 4)
                            found = vqtbl1q_u8(slice[k][0].val[0], code);
                        else
                            found = vqtbl4q_u8(slice[k][0], code);
                        for (int s = 1; s < slices; ++s)
                            found = vqtbx4q_u8(found, slice[k][s], vsubq_u8(code, vdupq_n_u8(uint8_t(64 * s))));
                        value[half * P + k].val[i] = found;
                    }
        }
    };

    template <int BITS>
    struct WordTable {
        const int16_t* words;
        explicit WordTable(const waterfill::Table& t) : words(t.words) {}
        void look_up(const Bytes (&index)[2], int16_t* out) const {
            uint8_t code[kChunk];
            store(code, index[0]);
            store(code + 64, index[1]);
            for (int i = 0; i < kChunk; ++i) out[i] = words[code[i]];
        }
    };

    static Acc start(int32_t correction) { return vsetq_lane_s32(correction, vdupq_n_s32(0), 0); }
    static Acc dot(Acc acc, Bytes w, const int8_t* x) {
        for (int i = 0; i < 4; ++i) acc = vdotq_s32(acc, vreinterpretq_s8_u8(w.val[i]), vld1q_s8(x + 16 * i));
        return acc;
    }
    static Acc dot_words(Acc acc, Bytes w, const int16_t* x) {
        for (int i = 0; i < 4; ++i) {
            const int16x8_t a = vreinterpretq_s16_u8(w.val[i]), b = vld1q_s16(x + 8 * i);
            acc = vmlal_high_s16(vmlal_s16(acc, vget_low_s16(a), vget_low_s16(b)), a, b);
        }
        return acc;
    }
    static void reduce(const Acc (&acc)[kTile], int32_t (&sum)[kTile]) {
        vst1q_s32(sum, vpaddq_s32(vpaddq_s32(acc[0], acc[1]), vpaddq_s32(acc[2], acc[3])));
    }

    // Products of signed bytes do for bytes of 7 bits.
    static Octets look_up(Octets table, Octets index) {
        return Octets(vqtbl1q_u8(uint8x16_t(table), vandq_u8(uint8x16_t(index), vdupq_n_u8(15))));
    }
    static Octets from_nibbles(const uint8_t* p) {
        const uint8x8_t both = vld1_u8(p), low = vand_u8(both, vdup_n_u8(15)), high = vshr_n_u8(both, 4);
        return Octets(vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high)));
    }
    static LaneSums dot_lanes(LaneSums sums, Octets w, const int8_t* x) {
        return LaneSums(vdotq_s32(int32x4_t(sums), int8x16_t(w), vld1q_s8(x)));
    }
    static void reduce_lanes(const LaneSums (&sums)[kTile], int32_t (&whole)[kTile]) {
        const Acc rows[kTile] = {Acc(sums[0]), Acc(sums[1]), Acc(sums[2]), Acc(sums[3])};
        reduce(rows, whole);
    }

    struct Shorts {
        uint16x8_t low, high;
    };
    static Shorts load_shorts(const uint16_t* p) { return {vld1q_u16(p), vld1q_u16(p + 8)}; }
    static void store_shorts(uint16_t* p, Shorts s) {
        vst1q_u16(p, s.low);
        vst1q_u16(p + 8, s.high);
    }
    static Shorts min_shorts(Shorts a, Shorts b) { return {vminq_u16(a.low, b.low), vminq_u16(a.high, b.high)}; }
    static Shorts add_shorts(Shorts a, Shorts b) { return {vqaddq_u16(a.low, b.low), vqaddq_u16(a.high, b.high)}; }
    static Shorts subtract_shorts(Shorts a, Shorts b) { return {vqsubq_u16(a.low, b.low), vqsubq_u16(a.high, b.high)}; }
    static uint32_t same_shorts(Shorts a, Shorts b) {
        static constexpr uint16_t bits[8] = {1, 2, 4, 8, 16, 32, 64, 128};
        const uint16x8_t each = vld1q_u16(bits);
        const uint32_t low = vaddvq_u16(vandq_u16(vceqq_u16(a.low, b.low), each));
        return low | uint32_t(vaddvq_u16(vandq_u16(vceqq_u16(a.high, b.high), each))) << 8;
    }

    using Floats = float32x4x4_t;
    template <class Operation>
    static Floats each(Floats a, Floats b, Operation operation) {
        for (int i = 0; i < 4; ++i) a.val[i] = operation(a.val[i], b.val[i]);
        return a;
    }
    static Floats load_floats(const float* p) {
        return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
    }
    static void store_floats(float* p, Floats f) {
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, f.val[i]);
    }
    static Floats add(Floats a, Floats b) {
        return each(a, b, [](float32x4_t u, float32x4_t v) { return vaddq_f32(u, v); });
    }
    static Floats subtract(Floats a, Floats b) {
        return each(a, b, [](float32x4_t u, float32x4_t v) { return vsubq_f32(u, v); });
    }
    static Floats smaller(Floats a, Floats b) {
        return each(a, b, [](float32x4_t u, float32x4_t v) { return vminq_f32(u, v); });
    }
    static uint32_t less(Floats a, Floats b) {
        const uint32x4_t bits = {1, 2, 4, 8};
        uint32_t mask = 0;
        for (int i = 0; i < 4; ++i) mask |= vaddvq_u32(vandq_u32(vcltq_f32(a.val[i], b.val[i]), bits)) << (4 * i);
        return mask;
    }
    static Floats fill(float f) {
        const float32x4_t v = vdupq_n_f32(f);
        return {{v, v, v, v}};
    }
    static Floats select(uint32_t mask, Floats set, Floats clear) { return select_plain<Neon>(mask, set, clear); }
    static Floats reordered(Floats f, Order distance) { return reordered_plain<Neon>(f, distance); }
};

}  // namespace

const Functions* neon_functions() { return Kernels<Neon>::functions("neon"); }

}  // namespace waterfill
#else
namespace waterfill {
const Functions* neon_functions() { return nullptr; }
}  // namespace waterfill
#endif

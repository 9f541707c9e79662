// Portable C++: the definition that the vector code must equal, and the path of machines without it.
#include "kernels.hpp"
#include "plain.hpp"

namespace waterfill {
namespace {

struct Scalar : Plain {
    static constexpr int lanes = 4;

    struct Bytes {
        uint8_t at[64];
    };
    using Acc = int32_t;

    static Bytes load(const void* p) {
        Bytes b;
        std::memcpy(b.at, p, 64);
        return b;
    }
    static void store(void* p, Bytes b) { std::memcpy(p, b.at, 64); }
    static void prefetch(const void*) {}

    template <int BITS>
    static void codes(const uint8_t* chunk, Bytes (&index)[2]) {
        uint16_t code[kChunk];
        chunk_codes(chunk, planes_of(BITS), code);
        for (int i = 0; i < kChunk; ++i) index[i / 64].at[i % 64] = uint8_t(code[i]);
    }

    template <int BITS, int P>
    struct Table {
        const waterfill::Table& t;
        explicit Table(const waterfill::Table& table) : t(table) {}
        void look_up(const Bytes (&index)[2], Bytes (&value)[2 * P]) const {
            for (int half = 0; half < 2; ++half)
                for (int k = 0; k < P; ++k)
                    for (int i = 0; i < 64; ++i) value[half * P + k].at[i] = t.bytes[k][index[half].at[i]];
        }
    };

    template <int BITS>
    struct WordTable {
        const waterfill::Table& t;
        explicit WordTable(const waterfill::Table& table) : t(table) {}
        void look_up(const Bytes (&index)[2], int16_t* out) const {
            for (int i = 0; i < kChunk; ++i) out[i] = t.words[index[i / 64].at[i % 64]];
        }
    };

    static Acc start(int32_t correction) { return correction; }
    static Acc dot(Acc acc, Bytes w, const int8_t* x) {
        for (int i = 0; i < 64; ++i) acc += int32_t(int8_t(w.at[i])) * x[i];
        return acc;
    }
    static Acc dot_words(Acc acc, Bytes w, const int16_t* x) {
        int16_t words[32];
        std::memcpy(words, w.at, 64);
        for (int i = 0; i < 32; ++i) acc += int32_t(words[i]) * x[i];
        return acc;
    }
    static void reduce(const Acc (&acc)[kTile], int32_t (&sum)[kTile]) { std::memcpy(sum, acc, sizeof acc); }

    struct Floats {
        float at[16];
    };
    static Floats load_floats(const float* p) {
        Floats f;
        std::memcpy(f.at, p, sizeof f.at);
        return f;
    }
    static void store_floats(float* p, Floats f) { std::memcpy(p, f.at, sizeof f.at); }
    static Floats add(Floats a, Floats b) {
        for (int i = 0; i < 16; ++i) a.at[i] += b.at[i];
        return a;
    }
    static Floats subtract(Floats a, Floats b) {
        for (int i = 0; i < 16; ++i) a.at[i] -= b.at[i];
        return a;
    }
    static Floats smaller(Floats a, Floats b) {
        for (int i = 0; i < 16; ++i) a.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i];
        return a;
    }
    static uint32_t less(Floats a, Floats b) {
        uint32_t mask = 0;
        for (int i = 0; i < 16; ++i) mask |= uint32_t(a.at[i] < b.at[i]) << i;
        return mask;
    }
    static Floats fill(float f) {
        Floats filled;
        for (float& each : filled.at) each = f;
        return filled;
    }
    static Floats select(uint32_t mask, Floats set, Floats clear) { return select_plain<Scalar>(mask, set, clear); }
    static Floats reordered(Floats f, Order distance) { return reordered_plain<Scalar>(f, distance); }
};

}  // namespace

const Functions* scalar_functions() { return Kernels<Scalar>::functions("scalar"); }

}  // namespace waterfill

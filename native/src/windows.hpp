// From the codes of a bitshift trellis to levels, 128 columns of a row at a time (registers.hpp), in vectors that any
// instruction set has: only the rounded product of fractions is `Isa`'s own.
//
//     words of each lane ──shift──► window s ──· multiplier──► u ──► u (a + b u^8 + c u^16) ──► its upper byte
//
// Levels come out two steps at a time, lane after lane, as the activations then lie (`in_steps`).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "matrix.hpp"
#include "registers.hpp"

namespace waterfill {
namespace {

typedef uint16_t Words __attribute__((vector_size(32)));      // one for each lane
typedef uint8_t Octets __attribute__((vector_size(32)));      // two
typedef uint8_t HalfOctets __attribute__((vector_size(16)));  // one

inline Words words_at(const uint8_t* p) {
    Words w;
    std::memcpy(&w, p, sizeof w);
    return w;
}

inline Words words_of_octets(const void* p) {
    HalfOctets o;
    std::memcpy(&o, p, sizeof o);
    return __builtin_convertvector(o, Words);
}

inline Words words_of_nibbles(const uint8_t* p) {
    uint64_t both, each[2];
    std::memcpy(&both, p, sizeof both);
    each[0] = both & 0x0f0f0f0f0f0f0f0f, each[1] = both >> 4 & 0x0f0f0f0f0f0f0f0f;
    return words_of_octets(each);
}

template <class Isa, int HALVES>
struct Windows {
    static constexpr Registers registers = registers_of(HALVES);
    static constexpr int bytes = window_chunk_bytes(HALVES);

    // Symbols of a register that a word has; and bits.
    static constexpr int symbols(Register r) { return r.bits == 4 ? 4 : kChunkSteps / r.every; }
    static constexpr int width(Register r) { return symbols(r) * r.bits; }

    struct Chunk {
        Words of[3][2];
    };
    struct History {  // of each register the last 16 bits
        Words of[3];
    };

    uint16_t multiplier;
    Words coefficients[3];

    explicit Windows(const Table& t) : multiplier(t.multiplier) {
        for (int i = 0; i < 3; ++i) coefficients[i] = Words{} + uint16_t(t.coefficients[i]);
    }

    static Chunk load(const uint8_t* code) {
        Chunk c;
        for (int i = 0; i < registers.count; ++i) {
            const Register r = registers.of[i];
            if (r.bits == 4) {
                c.of[i][0] = words_at(code), c.of[i][1] = words_at(code + 32), code += 64;
            } else if (r.bits == 2) {
                c.of[i][0] = words_at(code), code += 32;
            } else if (r.every == 1) {
                c.of[i][0] = words_of_octets(code), code += 16;
            } else {
                c.of[i][0] = words_of_nibbles(code), code += 8;
            }
        }
        return c;
    }

    static void remember(History& h, const Chunk& c) {
        for (int i = 0; i < registers.count; ++i) {
            const Register r = registers.of[i];
            if (width(r) == 16)
                h.of[i] = c.of[i][r.bits == 4];
            else
                h.of[i] = h.of[i] << width(r) | c.of[i][0];
        }
    }

    // Window of each lane after step STEP of a chunk.
    template <int STEP>
    static Words window(const History& h, const Chunk& c) {
        Words s = {};
        int shift = 0;
        WF_UNROLL for (int i = 0; i < registers.count; ++i) {
            const Register r = registers.of[i];
            const int each = symbols(r), at = STEP / r.every % each, word = STEP / r.every / each;
            const Words before = word ? c.of[i][word - 1] : h.of[i];
            const int known = r.bits * (at + 1), wanted = r.bits * r.symbols;
            Words part = c.of[i][word] >> (width(r) - known);
            if (known < wanted) part |= before << known;
            if (known < wanted || width(r) - (width(r) - known) > wanted) part &= uint16_t((1 << wanted) - 1);
            s |= part << shift;
            shift += wanted;
        }
        return s;
    }

    // Levels of steps STEP and STEP + 1, those of a lane side by side.
    template <int STEP>
    Octets levels(const History& h, const Chunk& c) const {
        const Words first = level(window<STEP>(h, c)), second = level(window<STEP + 1>(h, c));
        const Octets both = Octets(first >> 8 | (second & uint16_t(0xff00)));
        return Isa::bias ? both ^ uint8_t(Isa::bias) : both;
    }

    // 256 times the level of a window.
    Words level(Words window) const {
        const Words u = window * multiplier, u2 = product(u, u), u4 = product(u2, u2), u8 = product(u4, u4);
        return product(u, coefficients[0] + product(u8, coefficients[1] + product(u8, coefficients[2])));
    }
    static Words product(Words a, Words b) { return Isa::fraction_product(a, b); }

    // A chunk's levels, and what the next one's history is.
    void decode(const uint8_t* code, History& h, typename Isa::Bytes (&value)[2]) const {
        const Chunk c = load(code);
        value[0] = Isa::template join<Isa>(levels<0>(h, c), levels<2>(h, c));
        value[1] = Isa::template join<Isa>(levels<4>(h, c), levels<6>(h, c));
        remember(h, c);
    }

    // What comes before a tile's rows; returns where these begin.
    static const uint8_t* begin(const uint8_t* code, History (&history)[kTile]) {
        for (History& h : history) h = {};
        for (int chunk = 0; chunk < history_chunks(HALVES); ++chunk)
            for (History& h : history) remember(h, load(code)), code += bytes;
        return code;
    }
};

// f(constant) for a rate's constant, twice its bits.
template <class F>
auto by_rate(int halves, const F& f) {
    switch (halves) {
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        case 4: return f(std::integral_constant<int, 4>());
        case 5: return f(std::integral_constant<int, 5>());
        case 6: return f(std::integral_constant<int, 6>());
        case 7: return f(std::integral_constant<int, 7>());
        case 8: return f(std::integral_constant<int, 8>());
        case 9: return f(std::integral_constant<int, 9>());
        default: return f(std::integral_constant<int, 10>());
    }
}

// The column of a chunk whose level is number i of those that come out.
constexpr int column_of_level(int i) { return 16 * (i / 32 * 2 + i % 2) + i % 32 / 2; }

}  // namespace
}  // namespace waterfill

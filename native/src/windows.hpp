// From the codes of a bitshift trellis to levels, 128 columns of some rows at a time (registers.hpp).
//
//     bytes ──shift──► a register's last four bits, after each step ──look up, xor──► hash ──look up, add──► level + 64
//
// All is done in bytes, 16 lanes of each row of a vector, by tables of 16 bytes; only these look-ups and the products
// with activations are `Isa`'s own.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "matrix.hpp"
#include "registers.hpp"

namespace waterfill {
namespace {

template <class Isa, int HALVES>
struct Windows {
    using Octets = typename Isa::Octets;
    static constexpr Registers registers = registers_of(HALVES);
    static constexpr int rows = sizeof(Octets) / kRowLanes;  // of a vector
    static constexpr int vectors = kTile / rows;             // of a tile
    static constexpr int bytes = kTile * window_chunk_bytes(HALVES);

    // Of each register the last four bits after every step of a chunk, in the lower half of a byte; bits above it, but
    // not the highest, may be anything.
    struct Chunk {
        Octets after[registers.count][kChunkSteps];
    };

    // One by one: what is not looked at later then need not be kept, and the rest stays in registers.
    static void copy(const Chunk& from, Chunk& to) {
        WF_UNROLL for (int i = 0; i < registers.count; ++i) {
            WF_UNROLL for (int step = 0; step < kChunkSteps; ++step) to.after[i][step] = from.after[i][step];
        }
    }

    Octets hash[3], high, low;

    explicit Windows(const Table& t) : high(Isa::repeated(t.levels[0])), low(Isa::repeated(t.levels[1])) {
        for (int i = 0; i < 3; ++i) hash[i] = Isa::repeated(t.hash[i]);
    }

    // Bits of neighbouring bytes come along, which `mask` then clears.
    template <int BY>
    static Octets shifted(Octets o, int mask) {
        typedef uint16_t Pairs __attribute__((vector_size(sizeof(Octets))));
        return Octets(Pairs(o) >> BY) & uint8_t(mask);
    }
    // Of bytes whose upper half is clear, if not of all of them.
    template <int BY>
    static Octets raised(Octets o) {
        typedef uint16_t Pairs __attribute__((vector_size(sizeof(Octets))));
        return Octets(Pairs(o) << BY);
    }

    // Vector number `vector` of a tile's chunk, given the chunk before.
    WF_INLINE static Chunk read(const uint8_t* code, int vector, const Chunk& before) {
        Chunk now;
        WF_UNROLL for (int i = 0; i < registers.count; ++i) {
            const Register r = registers.of[i];
            const uint8_t* from = code + vector * int(sizeof(Octets)) / r.every;
            read_register(r, from, before.after[i][kChunkSteps - 1], now.after[i]);
            code += kTile * register_chunk_bytes(r);
        }
        return now;
    }

    WF_INLINE static void read_register(Register r, const uint8_t* from, Octets last, Octets (&after)[kChunkSteps]) {
        if (r.every == 2) {
            const Octets four = Isa::from_nibbles(from), eight = raised<4>(last) | four;
            after[0] = after[1] = shifted<3>(eight, 15), after[2] = after[3] = shifted<2>(eight, 15);
            after[4] = after[5] = shifted<1>(eight, 15), after[6] = after[7] = four;
        } else if (r.bits == 1) {
            const Octets eight = loaded<Octets>(from), first = shifted<4>(eight, 15), middle = raised<4>(last) | first;
            after[0] = shifted<3>(middle, 15), after[1] = shifted<2>(middle, 15), after[2] = shifted<1>(middle, 15);
            after[3] = first, after[4] = shifted<3>(eight, 15), after[5] = shifted<2>(eight, 15);
            after[6] = shifted<1>(eight, 15), after[7] = eight & uint8_t(15);
        } else if (r.bits == 2) {
            WF_UNROLL for (int step = 0; step < kChunkSteps; step += 4) {
                const Octets four = loaded<Octets>(from + step * kTile * kRowLanes / 4);
                after[step] = raised<2>(step ? after[step - 1] : last) | shifted<6>(four, 3);
                after[step + 1] = shifted<4>(four, 15), after[step + 2] = shifted<2>(four, 15);
                after[step + 3] = four & uint8_t(15);
            }
        } else {
            WF_UNROLL for (int step = 0; step < kChunkSteps; step += 2) {
                const Octets two = loaded<Octets>(from + step * kTile * kRowLanes / 2);
                after[step] = shifted<4>(two, 15), after[step + 1] = two & uint8_t(15);
            }
        }
    }

    // Levels after a step, with 64 added.
    WF_INLINE Octets level(const Chunk& before, const Chunk& now, int step) const {
        Octets hashed = {};
        int table = 0;
        WF_UNROLL for (int i = 0; i < registers.count; ++i) {
            const Register r = registers.of[i];
            WF_UNROLL for (int bits = 0; bits < r.bits * r.symbols; bits += 4) {
                const int at = step - bits / r.bits;
                hashed ^= Isa::look_up(hash[table++], at < 0 ? before.after[i][kChunkSteps + at] : now.after[i][at]);
            }
        }
        return Isa::look_up(high, shifted<4>(hashed, 15)) + Isa::look_up(low, hashed & uint8_t(15));
    }

    // What comes before a tile's rows; returns where these begin.
    static const uint8_t* begin(const uint8_t* code, Chunk (&reached)[vectors]) {
        constexpr int chunks = history_chunks(HALVES);
        for (int v = 0; v < vectors; ++v) {
            Chunk before;
            WF_UNROLL for (int i = 0; i < registers.count; ++i) before.after[i][kChunkSteps - 1] = Octets{};
            WF_UNROLL for (int chunk = 0; chunk < chunks; ++chunk) copy(read(code + chunk * bytes, v, before), before);
            copy(before, reached[v]);
        }
        return code + chunks * bytes;
    }

    using Sums = typename Isa::LaneSums;

    // Adds levels + 64 times each of some tokens' activations from `column` on, over some chunks from `code` on and
    // STEPS steps of one more, for the rows of a vector. `reached` moves on with the chunks.
    template <int TOKENS, int STEPS>
    void multiply(const uint8_t* code, int64_t chunks, int vector, Chunk& reached, const int8_t* const (&x)[TOKENS],
                  int64_t column, Sums (&sums)[TOKENS]) const {
        Chunk before;
        copy(reached, before);
        for (int64_t end = column + chunks * kChunk; column < end; column += kChunk, code += bytes) {
            for (int line = 0; line < bytes && vector == 0; line += 64) Isa::prefetch(code + kAhead + line);
            const Chunk now = read(code, vector, before);
            add<kChunkSteps>(before, now, x, column, sums);
            copy(now, before);
        }
        if constexpr (STEPS > 0) add<STEPS>(before, read(code, vector, before), x, column, sums);
        copy(before, reached);
    }

    template <int STEPS, int TOKENS>
    WF_INLINE void add(const Chunk& before, const Chunk& now, const int8_t* const (&x)[TOKENS], int64_t column,
                       Sums (&sums)[TOKENS]) const {
        WF_UNROLL for (int step = 0; step < STEPS; ++step) {
            const Octets each = level(before, now, step);
            for (int t = 0; t < TOKENS; ++t) sums[t] = Isa::dot_lanes(sums[t], each, x[t] + column + step * kRowLanes);
        }
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

}  // namespace
}  // namespace waterfill

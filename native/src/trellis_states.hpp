// The search of trellis_search.hpp for one lane alone: here the states lie side by side in registers, not the lanes.
//
// A register has a place for each of its states, and they keep them: a state that comes from 2a or 2(a ^ h1), or from
// the odd numbers after these, takes the place of the first. What is where then changes from step to step by a linear
// map over GF(2), whose powers come round again; so do the distance between the two places that a state is reached
// from, and which places have odd numbers. Sums, comparisons and their order are those of the other search, bit by bit.
#pragma once

#include <cstdint>

#include "coding.hpp"
#include "trellis_search.hpp"

namespace waterfill {
namespace {

constexpr int kLeastRegisterStates = 16;

inline uint32_t parity(uint32_t bits) { return uint32_t(__builtin_parity(bits)); }

// Of places 0 to 15, a bit each: the parity of a place's bits under `rule`.
inline uint32_t places_of(uint32_t rule) {
    static constexpr uint16_t bit[4] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00};
    uint32_t mask = 0;
    for (int i = 0; i < 4; ++i) mask ^= rule >> i & 1 ? bit[i] : 0;
    return mask;
}

// How one step of the search goes. A rule says by the parity of what it has in common with a place.
struct PlaceStep {
    uint8_t other;  // distance of the two places that a state comes from
    uint8_t odd;    // rule: its state's number is odd, so that it takes the union of the negatives
    uint8_t later;  // rule: its state has the larger number of the two, and loses a tie
};

// Steps until everything is where it was, and where states are before each of them.
struct PlaceCycle {
    int bits, period = 0;
    PlaceStep steps[kMostStates];
    uint8_t columns[kMostStates][8];  // places of the states 1, 2, 4, …

    explicit PlaceCycle(const TrellisCode& code) : bits(__builtin_ctz(unsigned(code.states))) {
        const int top = bits - 1, apart = 2 * code.h1, highest = 31 - __builtin_clz(unsigned(apart));
        uint8_t column[8], row[8];  // of the map from states to places; of the one back
        for (int i = 0; i < bits; ++i) column[i] = row[i] = uint8_t(1 << i);
        do {
            for (int i = 0; i < bits; ++i) columns[period][i] = column[i];
            steps[period++] = {uint8_t(place(column, apart)), row[0], row[highest]};
            const uint8_t last = place(column, ((code.h0 ^ (1 << top)) << 1) | 1), first = row[0];
            for (int i = 0; i < top; ++i) column[i] = column[i + 1], row[i] = row[i + 1];
            column[top] = last, row[top] = 0;
            for (int i = 0; i < bits; ++i) row[i] ^= code.h0 >> i & 1 ? first : 0;
        } while (period < kMostStates && !home(column));
    }
    // Where a state is before step t.
    int of(int state, int64_t t) const { return place(columns[t % period], state); }

   private:
    uint8_t place(const uint8_t* column, int state) const {
        uint8_t at = 0;
        for (int i = 0; i < bits; ++i) at ^= state >> i & 1 ? column[i] : 0;
        return at;
    }
    bool home(const uint8_t* column) const {
        for (int i = 0; i < bits; ++i)
            if (column[i] != 1 << i) return false;
        return true;
    }
};

// Bytes of scratch: a bit per step and state, and four candidates per step.
inline int64_t lane_search_bytes(int states, int64_t steps) {
    return (steps + kSearchLanes) * (states / 8 + 4 * int64_t(sizeof(int16_t)));
}

template <class Isa>
struct LaneSearch {
    using Floats = typename Isa::Floats;

    static void run(const TrellisCode& code, int lanes, int lane, int64_t count, const float* x, int least, int most,
                    uint8_t* scratch, int16_t* out) {
        const PlaceCycle places(code);
        switch (code.states / kSearchLanes) {
            case 1: return walk<1>(code, places, lanes, lane, count / lanes, x, least, most, scratch, out);
            case 2: return walk<2>(code, places, lanes, lane, count / lanes, x, least, most, scratch, out);
            case 4: return walk<4>(code, places, lanes, lane, count / lanes, x, least, most, scratch, out);
            case 8: return walk<8>(code, places, lanes, lane, count / lanes, x, least, most, scratch, out);
            default: return walk<16>(code, places, lanes, lane, count / lanes, x, least, most, scratch, out);
        }
    }

    template <int Registers>
    static void walk(const TrellisCode& code, const PlaceCycle& places, int lanes, int lane, int64_t steps,
                     const float* x, int least, int most, uint8_t* scratch, int16_t* out) {
        int16_t* found = reinterpret_cast<int16_t*>(scratch);                                 // [16 steps][4][16]
        uint16_t* choices = reinterpret_cast<uint16_t*>(found + 4 * (steps + kSearchLanes));  // [steps][registers]
        Floats metric[Registers];
        alignas(64) float at[kMostStates];
        for (int s = 0; s < code.states; ++s) at[s] = s ? 1e30f : 0.0f;
        for (int r = 0; r < Registers; ++r) metric[r] = Isa::load_floats(at + r * kSearchLanes);
        int phase = 0;
        for (int64_t begin = 0; begin < steps; begin += kSearchLanes) {
            alignas(64) float target[kSearchLanes] = {}, cost[4][kSearchLanes];
            const int some = int(steps - begin < kSearchLanes ? steps - begin : kSearchLanes);
            for (int i = 0; i < some; ++i) target[i] = x[(begin + i) * lanes + lane];
            Search<Isa>::candidates(target, least, most, cost, found + 4 * begin);
            for (int i = 0; i < some; ++i) {
                const int64_t t = begin + i;
                uint16_t* choice = choices + t * Registers;
                if (t % kRenormalise == 0 && t > kRenormalise)
                    step<Registers, true>(places.steps[phase], cost, i, metric, choice);
                else
                    step<Registers, false>(places.steps[phase], cost, i, metric, choice);
                phase = phase + 1 == places.period ? 0 : phase + 1;
            }
        }
        for (int r = 0; r < Registers; ++r) Isa::store_floats(at + r * kSearchLanes, metric[r]);
        int place = places.of(0, steps);
        float best = at[place];
        for (int s = 1; s < code.states; ++s)
            if (const int here = places.of(s, steps); at[here] < best) best = at[here], place = here;
        for (int64_t t = steps - 1; t >= 0; --t) {
            phase = phase ? phase - 1 : places.period - 1;
            const PlaceStep& step = places.steps[phase];
            const int way = choices[t * Registers + place / kSearchLanes] >> (place % kSearchLanes) & 1;
            const int k = int(parity(uint32_t(place) & step.odd)) + 2 * way;
            const int p = 4 * found[(t / kSearchLanes * 4 + k) * kSearchLanes + t % kSearchLanes] + 1;
            out[t * lanes + lane] = int16_t(k & 1 ? -p : p);
            place ^= way ? step.other : 0;
        }
    }

    template <int Registers, bool Renormalise>
    static void step(const PlaceStep& step, const float (&cost)[4][kSearchLanes], int i, Floats (&metric)[Registers],
                     uint16_t* choice) {
        const uint32_t odd = places_of(step.odd), later = places_of(step.later);
        const Floats even0 = Isa::fill(cost[0][i]), odd0 = Isa::fill(cost[1][i]);
        const Floats even1 = Isa::fill(cost[2][i]), odd1 = Isa::fill(cost[3][i]);
        // As places of a register are, or the other way round.
        const Floats stay[2] = {Isa::select(odd, odd0, even0), Isa::select(odd, even0, odd0)};
        const Floats come[2] = {Isa::select(odd, odd1, even1), Isa::select(odd, even1, odd1)};
        const typename Isa::Order order = Isa::order(step.other % kSearchLanes);
        const int from = step.other / kSearchLanes;
        Floats next[Registers];
        for (int r = 0; r < Registers; ++r) {
            const uint32_t first = uint32_t(r * kSearchLanes), turned = parity(first & step.odd);
            const uint32_t larger = later ^ (parity(first & step.later) ? 0xffffu : 0u);
            const Floats a = Isa::add(metric[r], stay[turned]);
            const Floats b = Isa::add(Isa::reordered(metric[r ^ from], order), come[turned]);
            choice[r] = uint16_t(Isa::less(b, a) | (~Isa::less(a, b) & larger));
            next[r] = Isa::smaller(b, a);
        }
        if (Renormalise) {
            alignas(64) float zero[kSearchLanes];
            Isa::store_floats(zero, metric[0]);
            for (int r = 0; r < Registers; ++r) next[r] = Isa::subtract(next[r], Isa::fill(zero[0]));
        }
        for (int r = 0; r < Registers; ++r) metric[r] = next[r];
    }
};

}  // namespace
}  // namespace waterfill

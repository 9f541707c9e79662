// The Viterbi algorithm of the trellis code: the path of levels nearest to a sequence, for 16 lanes side by side.
//
// No rate appears. With the code length of a Gaussian, a quadratic function of the level, the sum of squared error and
// weighted rate is the squared error of a shorter target: the caller shrinks x instead (docs/design.md §4).
#pragma once

#include <cstdint>
#include <cstring>

#include "coding.hpp"
#include "layout.hpp"

namespace waterfill {
namespace {

constexpr int kSearchLanes = 16;
constexpr int kMostStates = 256;
constexpr int64_t kRenormalise = 64;  // steps after which metrics are made small again

// Bytes of scratch for `steps` steps: a bit per step, state and lane, and four candidates per step and lane.
inline int64_t search_bytes(int states, int64_t steps) {
    return steps * (states * int64_t(sizeof(uint16_t)) + 4 * kSearchLanes * int64_t(sizeof(int16_t)));
}

// `Isa::Floats` holds 16 floats.
template <class Isa>
struct Search {
    using Floats = typename Isa::Floats;

    // Nearest level of each subset (z0, z1) to x, and its squared distance.
    static void candidates(const float* x, int least, int most, float (&cost)[4][kSearchLanes], int16_t* found) {
        constexpr float round = 12582912.0f;  // 1.5 * 2^23
        for (int subset = 0; subset < 4; ++subset) {
            const int z0 = subset & 1, parity = (subset >> 1) ^ z0;
            // j = 2i + parity; p = 8i + 4 parity + 1
            const float sign = z0 ? -1.0f : 1.0f, origin = float(4 * parity + 1);
            const float low = float(-floor_half(parity - least)), high = float(floor_half(most - parity));
            for (int lane = 0; lane < kSearchLanes; ++lane) {
                const float target = sign * x[lane] - origin;
                float i = (target * 0.125f + round) - round;
                i = i < low ? low : i > high ? high : i;
                const float error = target - 8.0f * i;
                cost[subset][lane] = error * error;
                found[subset * kSearchLanes + lane] = int16_t(2 * int(i) + parity);
            }
        }
    }
    static int floor_half(int n) { return n >= 0 ? n / 2 : -((1 - n) / 2); }

    static void run(const TrellisCode& code, int lanes, int64_t count, const float* x, int least, int most,
                    uint8_t* scratch, int16_t* out) {
        const int64_t steps = count / lanes;
        const int states = code.states;
        if (states == 1) {
            for (int64_t i = 0; i < count; ++i) out[i] = int16_t(4 * scalar(x[i], least, most));
            return;
        }
        uint16_t* choices = reinterpret_cast<uint16_t*>(scratch);  // [steps][states], a bit per lane
        int16_t* found = reinterpret_cast<int16_t*>(scratch + steps * states * int64_t(sizeof(uint16_t)));
        // State n is reached from two states; which, and through which subset.
        int from[kMostStates][2], subset[kMostStates][2], ways[kMostStates] = {};
        for (int s = 0; s < states; ++s)
            for (int z1 = 0; z1 < 2; ++z1) {
                const int z0 = s & 1, n = (s >> 1) ^ (z0 ? code.h0 : 0) ^ (z1 ? code.h1 : 0);
                from[n][ways[n]] = s, subset[n][ways[n]] = z0 + 2 * z1, ++ways[n];
            }
        alignas(64) float metric[2][kMostStates][kSearchLanes];
        for (int first = 0; first < lanes; first += kSearchLanes) {
            const int width = lanes - first < kSearchLanes ? lanes - first : kSearchLanes;
            for (int s = 0; s < states; ++s)
                for (int lane = 0; lane < kSearchLanes; ++lane) metric[0][s][lane] = s ? 1e30f : 0.0f;
            for (int64_t t = 0; t < steps; ++t) {
                alignas(64) float target[kSearchLanes] = {}, cost[4][kSearchLanes];
                std::memcpy(target, x + t * lanes + first, size_t(width) * sizeof(float));
                candidates(target, least, most, cost, found + t * 4 * kSearchLanes);
                auto& now = metric[t & 1];
                auto& next = metric[(t & 1) ^ 1];
                Floats c[4];
                for (int k = 0; k < 4; ++k) c[k] = Isa::load_floats(cost[k]);
                const Floats base = Isa::load_floats(now[0]);
                const bool renormalise = t % kRenormalise == 0 && t > kRenormalise;
                uint16_t* choice = choices + t * states;
                for (int n = 0; n < states; ++n) {
                    const Floats a = Isa::add(Isa::load_floats(now[from[n][0]]), c[subset[n][0]]);
                    const Floats b = Isa::add(Isa::load_floats(now[from[n][1]]), c[subset[n][1]]);
                    choice[n] = uint16_t(Isa::less(b, a));
                    const Floats least_cost = Isa::smaller(b, a);
                    Isa::store_floats(next[n], renormalise ? Isa::subtract(least_cost, base) : least_cost);
                }
            }
            for (int lane = 0; lane < width; ++lane) {
                int state = 0;
                for (int s = 1; s < states; ++s)
                    if (metric[steps & 1][s][lane] < metric[steps & 1][state][lane]) state = s;
                for (int64_t t = steps - 1; t >= 0; --t) {
                    const int way = choices[t * states + state] >> lane & 1;
                    const int k = subset[state][way], p = 4 * found[(t * 4 + k) * kSearchLanes + lane] + 1;
                    out[t * lanes + first + lane] = int16_t(k & 1 ? -p : p);
                    state = from[state][way];
                }
            }
        }
    }

    // One state: the nearest multiple of 4.
    static int scalar(float x, int least, int most) {
        constexpr float round = 12582912.0f;
        const int j = int((x * 0.25f + round) - round);
        return j < least ? least : j > most ? most : j;
    }
};

}  // namespace
}  // namespace waterfill

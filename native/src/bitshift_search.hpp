// The Viterbi algorithm of the bitshift trellis (waterfill/codecs/bitshift/code.py): the path of windows whose levels
// come nearest to a sequence, for 16 sequences side by side.
//
// States come in groups that all follow each of as many others, its ways. What is found of a group's new states takes
// the places of those that it was found from, so that one array of metrics does. What is where then comes round again
// after a few steps: the registers of a window are turned, not shifted.
//
// Metrics are whole numbers of 16 bits that stop at the largest, which no path that matters comes near to.
#pragma once

#include <cstdint>
#include <cstring>

#include "bitshift_places.hpp"
#include "coding.hpp"
#include "layout.hpp"
#include "trellis_search.hpp"

namespace waterfill {
namespace {

constexpr uint16_t kMostMetric = 0xffff;
constexpr float kMostCost = 16384.0f;
constexpr int64_t kLower = 32;  // steps after which the least metric is made 0 again

// `Isa::Shorts` holds 16 unsigned numbers of 16 bits.
template <class Isa>
struct WindowSearch {
    using Shorts = typename Isa::Shorts;

    static void run(const WindowCode& code, int64_t steps, const float* x, const uint16_t* start, uint8_t* scratch,
                    uint16_t* out) {
        uint16_t* metric = reinterpret_cast<uint16_t*>(scratch);  // [windows][lanes]
        uint16_t* choices = metric + kMetrics * kSearchLanes;     // [steps][windows], a bit per lane
        std::memset(metric, 0xff, kMetrics * kSearchLanes * sizeof(uint16_t));
        for (int lane = 0; lane < kSearchLanes; ++lane)
            metric[code.steps[0].states[start[lane]] * kSearchLanes + lane] = 0;
        alignas(64) uint16_t cost[256][kSearchLanes];
        for (int64_t t = 0; t < steps; ++t) {
            if (t % kLower == 0 && t) lower(metric);
            costs(code, x + t * kSearchLanes, cost);
            const WindowStep& s = code.steps[t % code.cycle];
            uint16_t* choice = choices + t * kWindows;
            switch (s.ways) {
                case 2: step<2>(s, cost, metric, choice); break;
                case 4: step<4>(s, cost, metric, choice); break;
                case 8: step<8>(s, cost, metric, choice); break;
                case 16: step<16>(s, cost, metric, choice); break;
                default: step<32>(s, cost, metric, choice);
            }
        }
        walk_back(code, steps, metric, choices, out);
    }

    static void costs(const WindowCode& code, const float* x, uint16_t (&cost)[256][kSearchLanes]) {
        for (int i = 0; i < code.count; ++i)
            for (int lane = 0; lane < kSearchLanes; ++lane) {
                const float error = x[lane] - code.level[i], exact = error * error * code.unit + 0.5f;
                cost[i][lane] = uint16_t(int32_t(exact < kMostCost ? exact : kMostCost));
            }
    }

    static void lower(uint16_t* metric) {
        Shorts least_metric = Isa::load_shorts(metric);
        for (int s = 1; s < kWindows; ++s)
            least_metric = Isa::min_shorts(least_metric, Isa::load_shorts(metric + place_of(s) * kSearchLanes));
        for (int s = 0; s < kWindows; ++s) {
            uint16_t* at = metric + place_of(s) * kSearchLanes;
            Isa::store_shorts(at, Isa::subtract_shorts(Isa::load_shorts(at), least_metric));
        }
    }

    template <int WAYS>
    static void step(const WindowStep& s, const uint16_t (&cost)[256][kSearchLanes], uint16_t* metric,
                     uint16_t* choice) {
        const uint16_t* places = s.places;
        const uint8_t* level = s.level;
        for (int group = 0; group < kWindows; group += WAYS, places += WAYS, level += WAYS, choice += WAYS) {
            const Shorts best = best_of<WAYS>(metric, places, choice, 1);
            WF_UNROLL for (int w = 0; w < WAYS; ++w) Isa::store_shorts(
                metric + places[w] * kSearchLanes, Isa::add_shorts(best, Isa::load_shorts(cost[level[w]])));
        }
    }

    // Which way is best is found as in a knock-out, whose games are numbered from the last one, 1, back: 2n and 2n + 1
    // come before n. Of equals the first wins.
    template <int WAYS>
    static Shorts best_of(const uint16_t* metric, const uint16_t* places, uint16_t* choice, int game) {
        if constexpr (WAYS == 1) {
            return Isa::load_shorts(metric + places[0] * kSearchLanes);
        } else {
            const Shorts first = best_of<WAYS / 2>(metric, places, choice, 2 * game);
            const Shorts second = best_of<WAYS / 2>(metric, places + WAYS / 2, choice, 2 * game + 1);
            const Shorts best = Isa::min_shorts(first, second);
            choice[game] = uint16_t(Isa::same_shorts(first, best));
            return best;
        }
    }

    // All lanes side by side, since each waits for what the step before says.
    static void walk_back(const WindowCode& code, int64_t steps, const uint16_t* metric, const uint16_t* choices,
                          uint16_t* out) {
        const uint16_t* at = code.steps[steps % code.cycle].states;
        uint16_t now[kSearchLanes] = {}, best[kSearchLanes];
        std::memcpy(best, metric + at[0] * kSearchLanes, sizeof best);
        for (int s = 1; s < kWindows; ++s)
            for (int lane = 0; lane < kSearchLanes; ++lane) {
                const uint16_t here = metric[at[s] * kSearchLanes + lane];
                now[lane] = here < best[lane] ? uint16_t(s) : now[lane];
                best[lane] = here < best[lane] ? here : best[lane];
            }
        for (int64_t t = steps - 1; t >= 0; --t) {
            std::memcpy(out + t * kSearchLanes, now, sizeof now);
            const WindowStep& s = code.steps[t % code.cycle];
            for (int lane = 0; lane < kSearchLanes; ++lane) {
                const int group = s.group[now[lane]];
                const uint16_t* choice = choices + t * kWindows + group;
                int game = 1;
                while (game < s.ways) game = 2 * game + 1 - (choice[game] >> lane & 1);
                now[lane] = s.before[group + game - s.ways];
            }
        }
    }
};

}  // namespace
}  // namespace waterfill

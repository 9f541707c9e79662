#include "bitshift.hpp"

#include <algorithm>
#include <utility>

#include "bitshift_places.hpp"
#include "trellis_search.hpp"

namespace waterfill {
namespace {

constexpr int kMostKinds = 2;
constexpr size_t kMostCycle = 64;

bool each_once(const uint16_t* states) {
    std::vector<bool> seen(kWindows, false);
    for (int i = 0; i < kWindows; ++i) {
        if (states[i] >= kWindows || seen[states[i]]) return false;
        seen[states[i]] = true;
    }
    return true;
}

bool possible(const uint16_t* before, const uint16_t* after, const int* ways, int kinds) {
    if (kinds < 1 || kinds > kMostKinds) return false;
    for (int kind = 0; kind < kinds; ++kind) {
        const int w = ways[kind];
        if (w < 2 || w > kMostWays || (w & (w - 1))) return false;
        if (!each_once(before + kind * kWindows) || !each_once(after + kind * kWindows)) return false;
    }
    return true;
}

// Levels that there are, and which of them each state has.
std::vector<uint8_t> number_levels(const int8_t* levels, std::vector<float>& values) {
    std::vector<int8_t> distinct(levels, levels + kWindows);
    std::sort(distinct.begin(), distinct.end());
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    values.assign(distinct.begin(), distinct.end());
    std::vector<uint8_t> number;
    for (int s = 0; s < kWindows; ++s)
        number.push_back(uint8_t(std::lower_bound(distinct.begin(), distinct.end(), levels[s]) - distinct.begin()));
    return number;
}

template <class Number>
const Number* keep(std::vector<std::vector<Number>>& lists, std::vector<Number> list) {
    lists.push_back(std::move(list));
    return lists.back().data();
}

// A step from where states are now: groups in the order of their places, which is also that in memory.
WindowStep step_from(WindowTables& t, const std::vector<uint16_t>& now, const uint16_t* before, const uint16_t* after,
                     int ways, const std::vector<uint8_t>& number) {
    std::vector<int> order;
    for (int at = 0; at < kWindows; at += ways) order.push_back(at);
    std::sort(order.begin(), order.end(), [&](int a, int b) { return now[before[a]] < now[before[b]]; });
    std::vector<uint16_t> places, group(kWindows), from;
    std::vector<uint8_t> level;
    for (const int at : order) {
        const uint16_t begin = uint16_t(places.size());
        for (int i = at; i < at + ways; ++i) {
            places.push_back(now[before[i]]);
            from.push_back(before[i]);
            level.push_back(number[after[i]]);
            group[after[i]] = begin;
        }
    }
    return {ways,
            keep(t.lists, std::move(places)),
            keep(t.lists, std::move(group)),
            keep(t.bytes, std::move(level)),
            keep(t.lists, std::move(from)),
            keep(t.lists, now)};
}

}  // namespace

std::unique_ptr<WindowTables> window_tables(const int8_t* levels, float unit, const uint16_t* before,
                                            const uint16_t* after, const int* ways, int kinds) {
    if (!possible(before, after, ways, kinds) || !(unit > 0)) return nullptr;
    auto t = std::make_unique<WindowTables>();
    const std::vector<uint8_t> number = number_levels(levels, t->levels);
    std::vector<uint16_t> home(kWindows), now(kWindows), next(kWindows);
    for (int s = 0; s < kWindows; ++s) home[size_t(s)] = uint16_t(place_of(s));
    now = home;
    do {
        if (t->steps.size() == kMostCycle) return nullptr;
        const int kind = int(t->steps.size()) % kinds;
        const uint16_t *from = before + kind * kWindows, *to = after + kind * kWindows;
        t->steps.push_back(step_from(*t, now, from, to, ways[kind], number));
        for (int i = 0; i < kWindows; ++i) next[to[i]] = now[from[i]];
        now = next;
    } while (int(t->steps.size()) % kinds || now != home);
    t->code = {int(t->steps.size()), int(t->levels.size()), unit, t->steps.data(), t->levels.data()};
    return t;
}

int64_t window_search_bytes(int64_t steps) {
    return (kMetrics * kSearchLanes + steps * kWindows) * int64_t(sizeof(uint16_t));
}

}  // namespace waterfill

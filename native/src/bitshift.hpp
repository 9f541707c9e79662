// What the search of the bitshift trellis is given, made once for a call from lists of states.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "coding.hpp"

namespace waterfill {

struct WindowTables {
    WindowCode code;
    std::vector<WindowStep> steps;
    std::vector<std::vector<uint16_t>> lists;
    std::vector<std::vector<uint8_t>> bytes;
    std::vector<float> levels;
};

// For each of `kinds` kinds of steps: groups of ways[kind] states, `before` and after, both [kinds][kWindows]; null
// where they are not each all states once, or do not come round again soon.
std::unique_ptr<WindowTables> window_tables(const int8_t* levels, float unit, const uint16_t* before,
                                            const uint16_t* after, const int* ways, int kinds);

// Bytes of scratch for so many steps.
int64_t window_search_bytes(int64_t steps);

}  // namespace waterfill

// Where the metrics of the bitshift trellis lie, in vectors of 16 lanes.
#pragma once

#include "coding.hpp"

namespace waterfill {
namespace {

constexpr int kPagePlaces = 128;  // 4 KiB
constexpr int kMetrics = kWindows + 2 * (kWindows / kPagePlaces);

// Of state s at the beginning. States that are far apart are looked at together, and each page is a line further on
// than the one before, or all of them would have the same few lines of a cache to share.
constexpr int place_of(int s) { return s + 2 * (s / kPagePlaces); }

}  // namespace
}  // namespace waterfill

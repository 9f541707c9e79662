// Streams of narrow levels, from words to rows in the kernels' layout in one pass over them, several side by side: a
// step of one stream waits for the one before it, and the others fill the pause.
//
// `Table` is what one stream is decoded with, `Table::Lanes` what its steps change: states of 32 lanes, which a step
// takes one symbol of each further.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "coding.hpp"
#include "layout.hpp"

namespace waterfill {
namespace {

// The last words of a stream, where more may be read than there are.
struct LevelTail {
    static constexpr int64_t kMost = 2 * kChunk;  // bytes of words that a chunk's steps take
    uint8_t words[2 * kMost];
    const uint8_t* end;
    bool used = false, overrun = false;

    explicit LevelTail(const LevelReader& r) : end(r.end) {}

    // Where to read a chunk's words.
    const uint8_t* prepared(const uint8_t* at) {
        if (end - at >= kMost) return at;
        if (used) {
            overrun = overrun || at > end;  // damaged; what follows is thrown away
            return overrun ? words : at;
        }
        const int64_t left = end - at;
        std::memset(words, 0, sizeof words);
        std::memcpy(words, at, size_t(left));
        used = true, end = words + left;
        return words;
    }

    void leave(LevelReader& r, const uint8_t* at) const {
        r.good = !overrun && at <= end;
        if (r.good) r.at = r.end - (end - at);
    }
};

template <class Table, int N>
void decode_rows_of(LevelReader* const* readers, const LevelPlace* places, int64_t width, int64_t first, int64_t last) {
    const typename Table::Code code(readers[0]->walk.code);
    auto each = [](auto&& make) {
        if constexpr (N == 1) return std::array{make(0)};
        if constexpr (N == 2) return std::array{make(0), make(1)};
        if constexpr (N == 3) return std::array{make(0), make(1), make(2)};
        if constexpr (N == 4) return std::array{make(0), make(1), make(2), make(3)};
    };
    const auto tables = each([&](int i) { return Table(*readers[i], uint8_t(places[i].flip)); });
    auto lanes = each([&](int i) { return typename Table::Lanes(*readers[i]); });
    auto tails = each([&](int i) { return LevelTail(*readers[i]); });
    for (int64_t row = first; row < last; ++row) {
        uint8_t* out[N];
        for (int i = 0; i < N; ++i)
            out[i] = places[i].codes + row / kTile * places[i].tile + row % kTile * places[i].row;
        for (int64_t column = 0; column < width; column += kChunk) {
            for (int i = 0; i < N; ++i) lanes[i].at = tails[i].prepared(lanes[i].at);
            const int64_t filled = least(kChunk, width - column);
            for (int64_t at = 0; at < filled; at += kMostLanes)
#pragma GCC unroll 4
                for (int i = 0; i < N; ++i) lanes[i].step(tables[i], code, out[i] + at);
            for (int i = 0; i < N; ++i) {
                if (places[i].padded && filled < kChunk)
                    std::memset(out[i] + filled, places[i].flip, size_t(kChunk - filled));
                out[i] += places[i].chunk;
            }
        }
    }
    for (int i = 0; i < N; ++i) {
        lanes[i].leave(*readers[i]);
        tails[i].leave(*readers[i], lanes[i].at);
        readers[i]->left -= (last - first) * width;
    }
}

template <class Table>
void decode_rows_with(LevelReader* const* readers, const LevelPlace* places, int count, int64_t width, int64_t first,
                      int64_t last) {
    static_assert(kTogether == 4);
    switch (count) {
        case 1: return decode_rows_of<Table, 1>(readers, places, width, first, last);
        case 2: return decode_rows_of<Table, 2>(readers, places, width, first, last);
        case 3: return decode_rows_of<Table, 3>(readers, places, width, first, last);
        default: return decode_rows_of<Table, 4>(readers, places, width, first, last);
    }
}

// Whether steps end with rows, and levels are 4j + 1.
inline bool steps_fit(const LevelReader& r, int64_t width) {
    return r.lanes == kMostLanes && width % kMostLanes == 0 && !r.walk.levels;
}

}  // namespace
}  // namespace waterfill

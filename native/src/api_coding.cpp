// The exported functions of entropy coding: checks, and division of the work among threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "../include/waterfill_native.h"
#include "bitshift.hpp"
#include "bitstream.hpp"
#include "isa.hpp"
#include "layout.hpp"
#include "lossless.hpp"
#include "pool.hpp"
#include "product.hpp"
#include "rans.hpp"
#include "sound.hpp"
#include "trellis_search.hpp"
#include "trellis_states.hpp"

using namespace waterfill;

namespace {

constexpr int kFewLanes = 8;                   // that are searched one by one, by several threads
constexpr int64_t kMostWindowSteps = 1 << 14;  // of one search, which takes 8 KiB for each

bool lanes_are(int lanes, int64_t count) {
    return lanes >= 1 && lanes <= kMostLanes && !(lanes & (lanes - 1)) && count >= 0 && count % lanes == 0;
}

uint32_t little_endian(const uint8_t* p) {
    return uint32_t(p[0]) | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24;
}

bool zeros(const uint8_t* from, const uint8_t* to) {
    return std::all_of(from, to, [](uint8_t byte) { return byte == 0; });
}

}  // namespace

int64_t wf_rans_encode(const uint8_t* symbols, int64_t count, int lanes, const uint16_t* frequencies, uint8_t* out,
                       int64_t capacity) {
    return lanes_are(lanes, count) ? rans_encode(symbols, count, lanes, frequencies, out, capacity) : -1;
}

int wf_rans_decode(int isa, const uint8_t* in, int64_t bytes, int lanes, const uint16_t* frequencies, int64_t count,
                   uint8_t* out) {
    const Functions* f = functions(isa);
    RansTable table;
    if (!f || !lanes_are(lanes, count) || bytes < 0 || !make_table(frequencies, table)) return -1;
    return rans_decode(*f, in, bytes, lanes, table, count, out) ? 0 : -2;
}

int wf_trellis_search(int isa, int states, const float* x, int64_t count, int lanes, int least, int most,
                      int16_t* out) {
    const Functions* f = functions(isa);
    const TrellisCode* code = trellis_code(states);
    if (!f || !code || !lanes_are(lanes, count) || least > -1 || most < 1 || least < -512 || most > 511) return -1;
    if (!count) return 0;
    const int64_t steps = count / lanes;
    if (states < kLeastRegisterStates || lanes > kFewLanes) {
        f->search(*code, lanes, count, x, least, most, scratch(kDecoded, search_bytes(states, steps)), out);
        return 0;
    }
    parallel(lanes, [&](int64_t lane) {
        uint8_t* memory = scratch(kDecoded, lane_search_bytes(states, steps));
        f->search_lane(*code, lanes, int(lane), count, x, least, most, memory, out);
    });
    return 0;
}

int wf_bitshift_search(int isa, const int8_t* levels, float unit, const uint16_t* before, const uint16_t* after,
                       const int* ways, int kinds, const float* x, const uint16_t* start, int64_t blocks, int64_t steps,
                       uint16_t* windows) {
    const Functions* f = functions(isa);
    if (!f || blocks < 0 || steps < 0 || steps > kMostWindowSteps) return -1;
    const auto tables = window_tables(levels, unit, before, after, ways, kinds);
    if (!tables || std::any_of(start, start + blocks * kSearchLanes, [](uint16_t s) { return s >= kWindows; }))
        return -1;
    parallel(blocks, [&](int64_t block) {
        const int64_t at = block * steps * kSearchLanes;
        uint8_t* memory = scratch(kDecoded, window_search_bytes(steps));
        f->search_windows(tables->code, steps, x + at, start + block * kSearchLanes, memory, windows + at);
    });
    return 0;
}

int64_t wf_trellis_decode(int isa, int states, int wide, const uint8_t* arena, int64_t bytes, int64_t rows,
                          int64_t width, uint8_t* codes, uint16_t* scales) {
    const Functions* f = functions(isa);
    if (!f || !trellis_code(states) || !possible(rows, width)) return -1;
    const BitstreamShape shape{rows, width, states, wide != 0};
    const int64_t streams = stream_count(shape), each = stream_rows(width), groups = groups_of(width);
    if (bytes < 4 * streams) return -2;
    std::atomic<int64_t> failed{INT64_MAX};
    const int64_t row_bytes = width * (wide ? 2 : 1);
    auto part = [&](int64_t i) -> BitstreamPart {
        const int64_t from = i ? little_endian(arena + 4 * (i - 1)) : 4 * streams, to = little_endian(arena + 4 * i);
        const bool inside =
            from >= 4 * streams && from <= to && to <= bytes && (i + 1 < streams || zeros(arena + to, arena + bytes));
        return {least(each, rows - i * each), arena + (inside ? from : 0), inside ? to - from : 0,
                scales + i * each * groups, in_rows(shape, codes + i * each * row_bytes)};
    };
    parallel(ceil_div(streams, kTogether), [&](int64_t share) {
        const int64_t first = share * kTogether;
        const int count = int(least(kTogether, streams - first));
        BitstreamPart parts[kTogether] = {};
        bool good[kTogether];
        for (int i = 0; i < count; ++i) parts[i] = part(first + i);
        read_streams(*f, shape, parts, count, good);
        for (int i = 0; i < count; ++i)
            if (!good[i]) lower(failed, first + i);
    });
    return failed == INT64_MAX ? 0 : -3 - failed.load();
}

int64_t wf_lossless_capacity(int item_bytes) { return exact_capacity(item_bytes, kStreamElements); }

int wf_lossless_encode(int item_bytes, const uint8_t* numbers, int64_t count, uint8_t* out, int64_t capacity,
                       int64_t* sizes) {
    if ((item_bytes != 2 && item_bytes != 4) || count < 0 || capacity < wf_lossless_capacity(item_bytes)) return -1;
    std::atomic<bool> good{true};
    parallel(ceil_div(count, kStreamElements), [&](int64_t i) {
        const int64_t first = i * kStreamElements, part = least(kStreamElements, count - first);
        sizes[i] = encode_exact(numbers + item_bytes * first, item_bytes, part, out + i * capacity);
        if (sizes[i] < 0) good = false;
    });
    return good ? 0 : -2;
}

int64_t wf_lossless_decode(int isa, int item_bytes, const uint8_t* streams, int64_t bytes, const uint32_t* sizes,
                           int64_t count, uint8_t* numbers) {
    const Functions* f = functions(isa);
    if (!f || (item_bytes != 2 && item_bytes != 4) || count < 0) return -1;
    const int64_t parts = ceil_div(count, kStreamElements);
    std::vector<int64_t> starts(size_t(parts) + 1);
    for (int64_t i = 0; i < parts; ++i) starts[size_t(i) + 1] = starts[size_t(i)] + sizes[i];
    if (starts.back() > bytes) return -2;
    std::atomic<int64_t> failed{INT64_MAX};
    parallel(parts, [&](int64_t i) {
        const int64_t first = i * kStreamElements, part = least(kStreamElements, count - first);
        if (!decode_exact(*f, streams + starts[size_t(i)], sizes[i], item_bytes, part, numbers + item_bytes * first))
            lower(failed, i);
    });
    return failed == INT64_MAX ? 0 : -3 - failed.load();
}

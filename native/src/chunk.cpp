// Chunks of matrices as they come from storage: decoded part by part into memory that stays in the cache, and multiplied
// there.
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../include/waterfill_native.h"
#include "arrange.hpp"
#include "isa.hpp"
#include "layout.hpp"
#include "pool.hpp"
#include "product.hpp"
#include "stream.hpp"

using namespace waterfill;

struct wf_activations {
    std::vector<uint8_t> memory;
    Prepared view;
    Form form;
};

namespace {

constexpr int64_t kPartWeights = 1 << 18;  // of codes; streams are parts themselves

int64_t part_rows(const wf_chunk& c) { return c.states ? stream_rows(c.width) : kTile * most(1, kPartWeights / (kTile * c.width)); }

int64_t parts_of(const wf_chunk& c) { return ceil_div(c.rows, part_rows(c)); }

int64_t rows_of(const wf_chunk& c, int64_t part) { return least(part_rows(c), c.rows - part * part_rows(c)); }

StreamShape shape_of(const wf_chunk& c) { return {c.rows, c.width, c.states, c.wide != 0}; }

// Scales [rows][groups] -> the kernels' layout.
void arrange_scales(const uint16_t* row_scales, int64_t rows, int64_t groups, uint16_t* scales) {
    for (int64_t row = 0; row < tiles_of(rows) * kTile; ++row)
        for (int64_t g = 0; g < groups; ++g)
            scales[(row / kTile * groups + g) * kTile + row % kTile] = row < rows ? row_scales[row * groups + g] : uint16_t(0);
}

bool sound(const Functions* f, const wf_chunk* c) {
    return f && c->table && c->rows > 0 && c->width > 0 && (!c->states || (trellis_code(c->states) && c->ends)) &&
           c->word_bytes <= 7;
}

// Every part of a chunk that is not in the kernels' layout -> that layout, where place(part, number, codes, scales) says,
// and then work(part, codes, scales). Parts that a thread has at the same time have different numbers. The first part that
// is damaged, or 0; adds the time of decoding, of all threads.
template <class Place, class Work>
int64_t each_part(const Functions& f, const wf_chunk& c, const Place& place, const Work& work,
                  std::atomic<int64_t>& decoding_ns) {
    const int64_t each = part_rows(c), groups = groups_of(c.width);
    if (!c.states) {
        const StoredRows stored{c.table, c.rows, c.width, c.data, c.scales, c.word_indices, c.word_bytes, c.row_bytes};
        parallel(parts_of(c), [&](int64_t i) {
            const auto start = std::chrono::steady_clock::now();
            uint8_t* codes;
            uint16_t* scales;
            place(i, 0, codes, scales);
            arrange_tiles(f, stored, i * each / kTile, ceil_div(i * each + rows_of(c, i), kTile), codes, scales);
            decoding_ns += elapsed_ns(start);
            work(i, codes, scales);
        });
        return 0;
    }
    std::atomic<int64_t> failed{INT64_MAX};
    auto row_scales = [&](int together) {
        return reinterpret_cast<uint16_t*>(scratch(kIndices, 2 * kTogether * each * groups)) + together * each * groups;
    };
    auto part = [&](int64_t i, int together) -> StreamPart {
        const int64_t from = i ? c.ends[i - 1] : 0, to = c.ends[i];
        uint8_t* codes;
        uint16_t* scales;
        place(i, together, codes, scales);
        return {rows_of(c, i), c.data + from, most(0, to - from), row_scales(together),
                in_tiles(shape_of(c), codes, c.table->view.bias)};
    };
    each_stream(f, shape_of(c), parts_of(c), part, [&](int64_t i, int together, bool good) {
        if (!good) return lower(failed, i);
        uint8_t* codes;
        uint16_t* scales;
        place(i, together, codes, scales);
        arrange_scales(row_scales(together), rows_of(c, i), groups, scales);
        work(i, codes, scales);
    }, decoding_ns);
    return failed == INT64_MAX ? 0 : -3 - failed.load();
}

uint64_t checksum(const uint8_t* data, int64_t bytes) {
    constexpr int kLanes = 8;  // multiplications overlap
    constexpr uint64_t kFactor = 0x9e3779b97f4a7c15u;
    uint64_t lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = kFactor * uint64_t(2 * i + 1);
    auto mix = [](uint64_t state, uint64_t word) {
        state = (state ^ word) * kFactor;
        return state ^ state >> 29;
    };
    uint64_t word;
    int64_t at = 0;
    for (; at + 8 * kLanes <= bytes; at += 8 * kLanes)
        for (int i = 0; i < kLanes; ++i) {
            std::memcpy(&word, data + at + 8 * i, 8);
            lane[i] = mix(lane[i], word);
        }
    uint64_t sum = uint64_t(bytes);
    for (; at < bytes; at += 8) {
        word = 0;
        std::memcpy(&word, data + at, size_t(least(8, bytes - at)));
        sum = mix(sum, word);
    }
    for (int i = 0; i < kLanes; ++i) sum = mix(sum, lane[i]);
    return sum;
}

}  // namespace

wf_activations* wf_activations_new(int isa, const wf_table* table, const void* x, int dtype, int64_t tokens, int64_t width) {
    const Functions* f = functions(isa);
    if (!f || tokens < 1 || width < 1 || dtype < 0 || dtype > 2) return nullptr;
    std::unique_ptr<wf_activations> made(new (std::nothrow) wf_activations);
    if (!made) return nullptr;
    made->form = form_of(*f, table->view);
    const int64_t data = tokens * padded_width(width) * made->form.precision / 8, parts = tokens * groups_of(width);
    made->memory.resize(size_t(data + 8 * parts + 128));
    uint8_t* at = made->memory.data();
    at += (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64;
    auto* scales = reinterpret_cast<float*>(at + (data + 63) / 64 * 64);
    made->view = quantise(*f, rotated(*f, x, dtype, tokens, width), tokens, width, made->form, at, scales,
                          reinterpret_cast<int32_t*>(scales + parts));
    return made.release();
}

void wf_activations_free(wf_activations* x) { delete x; }

int64_t wf_chunk_multiply(int isa, const wf_chunk* chunk, const wf_activations* x, int dtype, void* y, int64_t stride,
                          int64_t* nanoseconds) {
    const Functions* f = functions(isa);
    const wf_chunk& c = *chunk;
    if (!sound(f, chunk) || dtype < 0 || dtype > 2 || x->view.padded != padded_width(c.width)) return -1;
    if (!(x->form == form_of(*f, c.table->view))) return -2;
    const int64_t tile_bytes = tile_code_bytes(c.table->view, c.width), groups = groups_of(c.width),
                  tokens = x->view.tokens;
    const int64_t each = part_rows(c);
    std::atomic<int64_t> decoding{0}, multiplying{0};
    auto multiply = [&](int64_t part, const uint8_t* codes, const uint16_t* scales) {
        const auto start = std::chrono::steady_clock::now();
        const int64_t first = part * each, rows = rows_of(c, part);
        const Matrix m{rows, c.width, c.step, c.unit, &c.table->view, codes, scales};
        float* sums = scratch_floats(kPartSums, tokens * rows);
        f->multiply(m, x->view, 0, tiles_of(rows), sums, scratch(kDecoded, f->scratch_bytes(m, x->view)));
        for (int64_t t = 0; t < tokens; ++t) from_float(sums + t * rows, dtype, t * stride + first, rows, y);
        multiplying += elapsed_ns(start);
    };
    const int64_t code_bytes = tiles_of(each) * tile_bytes, scale_count = tiles_of(each) * groups * kTile;
    const int together = c.states ? int(least(kTogether, parts_of(c))) : 1;
    auto place = [&](int64_t, int number, uint8_t*& codes, uint16_t*& scales) {
        codes = scratch(kPartCodes, together * code_bytes) + number * code_bytes;
        scales = reinterpret_cast<uint16_t*>(scratch(kPartScales, together * 2 * scale_count)) + number * scale_count;
    };
    int64_t status = 0;
    if (!c.states && !c.row_bytes)
        parallel(parts_of(c), [&](int64_t part) {
            const int64_t tile = part * each / kTile;
            multiply(part, c.data + tile * tile_bytes, c.scales + tile * groups * kTile);
        });
    else
        status = each_part(*f, c, place, multiply, decoding);
    nanoseconds[0] += decoding, nanoseconds[1] += multiplying;
    return status;
}

int64_t wf_chunk_decode(int isa, const wf_chunk* chunk, uint8_t* codes, uint16_t* scales) {
    const Functions* f = functions(isa);
    const wf_chunk& c = *chunk;
    if (!sound(f, chunk) || (!c.states && !c.row_bytes)) return -1;
    const int64_t tile_bytes = tile_code_bytes(c.table->view, c.width), groups = groups_of(c.width);
    prefer_huge_pages(codes, tiles_of(c.rows) * tile_bytes);
    auto place = [&](int64_t part, int, uint8_t*& part_codes, uint16_t*& part_scales) {
        const int64_t tile = part * part_rows(c) / kTile;
        part_codes = codes + tile * tile_bytes, part_scales = scales + tile * groups * kTile;
    };
    std::atomic<int64_t> nanoseconds{0};
    return each_part(*f, c, place, [](int64_t, const uint8_t*, const uint16_t*) {}, nanoseconds);
}

int wf_checksums(const uint8_t* data, const uint32_t* ends, int64_t count, uint64_t* sums) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t from = i ? ends[i - 1] : 0;
        if (ends[i] < from) return -1;
        sums[i] = checksum(data + from, ends[i] - from);
    }
    return 0;
}

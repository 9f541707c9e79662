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

int64_t elapsed_ns(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
}

// Levels [rows][width] and scales [rows][groups] -> the kernels' layout.
template <class Level>
void arrange_levels(const Level* levels, const uint16_t* row_scales, int64_t rows, int64_t width, int bias, uint8_t* codes,
                    uint16_t* scales) {
    constexpr int64_t kSize = sizeof(Level);
    const int64_t chunks = chunks_per_row(width, 1), groups = groups_of(width);
    const uint8_t flip = kSize == 1 ? uint8_t(bias) : uint8_t(0);  // adding 128 turns the upper bit over
    for (int64_t row = 0; row < tiles_of(rows) * kTile; ++row) {
        uint8_t* tile = codes + row / kTile * chunks * kTile * kChunk * kSize;
        for (int64_t g = 0; g < groups; ++g)
            scales[(row / kTile * groups + g) * kTile + row % kTile] = row < rows ? row_scales[row * groups + g] : uint16_t(0);
        for (int64_t c = 0; c < chunks; ++c) {
            uint8_t* to = tile + (c * kTile + row % kTile) * kChunk * kSize;
            const int64_t filled = row < rows ? least(kChunk, width - c * kChunk) * kSize : 0;
            const uint8_t* from = reinterpret_cast<const uint8_t*>(levels + row * width + c * kChunk);
            if (filled == kChunk * kSize) {
                for (int64_t i = 0; i < kChunk * kSize; ++i) to[i] = from[i] ^ flip;
                continue;
            }
            for (int64_t i = 0; i < filled; ++i) to[i] = from[i] ^ flip;
            std::memset(to + filled, row < rows ? flip : 0, size_t(kChunk * kSize - filled));
        }
    }
}

bool decode_streamed(const Functions& f, const wf_chunk& c, int64_t part, int64_t rows, uint8_t* codes, uint16_t* scales) {
    const StreamShape shape{c.rows, c.width, c.states, c.wide != 0};
    int lanes;
    uint8_t* levels = scratch(kLevels, padded_count(rows * c.width, &lanes) * (c.wide ? 2 : 1));
    auto* row_scales = reinterpret_cast<uint16_t*>(scratch(kIndices, rows * groups_of(c.width) * 2));
    const int64_t from = part ? c.ends[part - 1] : 0, to = c.ends[part];
    if (from > to || !decode_stream(f, shape, rows, c.data + from, to - from, levels, row_scales)) return false;
    const int bias = c.table->view.bias;
    if (c.wide)
        arrange_levels(reinterpret_cast<const int16_t*>(levels), row_scales, rows, c.width, bias, codes, scales);
    else
        arrange_levels(reinterpret_cast<const int8_t*>(levels), row_scales, rows, c.width, bias, codes, scales);
    return true;
}

// Rows [first, first + rows) of a chunk that is not in the kernels' layout -> that layout.
bool decode_part(const Functions& f, const wf_chunk& c, int64_t part, int64_t first, int64_t rows, uint8_t* codes,
                 uint16_t* scales) {
    if (c.states) return decode_streamed(f, c, part, rows, codes, scales);
    const StoredRows stored{c.table, c.rows, c.width, c.data, c.scales, c.word_indices, c.word_bytes, c.row_bytes};
    arrange_tiles(f, stored, first / kTile, ceil_div(first + rows, kTile), codes, scales);
    return true;
}

bool sound(const Functions* f, const wf_chunk* c) {
    return f && c->table && c->rows > 0 && c->width > 0 && (!c->states || (trellis_code(c->states) && c->ends)) &&
           c->word_bytes <= 7;
}

// work(part, first row, rows) -> whether it is sound; the number of the first part that is not, or 0.
template <class Work>
int64_t each_part(const wf_chunk& c, const Work& work) {
    const int64_t each = part_rows(c);
    std::atomic<int64_t> failed{INT64_MAX};
    parallel(ceil_div(c.rows, each), [&](int64_t i) {
        if (!work(i, i * each, least(each, c.rows - i * each))) lower(failed, i);
    });
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
    const bool arranged = !c.states && !c.row_bytes;
    std::atomic<int64_t> decoding{0}, multiplying{0};
    const int64_t status = each_part(c, [&](int64_t part, int64_t first, int64_t rows) {
        const auto start = std::chrono::steady_clock::now();
        const int64_t tile = first / kTile, tiles = tiles_of(rows);
        Matrix m{rows, c.width, c.step, c.unit, &c.table->view, nullptr, nullptr};
        if (arranged) {
            m.codes = c.data + tile * tile_bytes, m.scales = c.scales + tile * groups * kTile;
        } else {
            uint8_t* codes = scratch(kPartCodes, tiles * tile_bytes);
            auto* scales = reinterpret_cast<uint16_t*>(scratch(kPartScales, tiles * groups * kTile * 2));
            if (!decode_part(*f, c, part, first, rows, codes, scales)) return false;
            m.codes = codes, m.scales = scales;
        }
        const int64_t decoded = elapsed_ns(start);
        float* sums = scratch_floats(kPartSums, tokens * rows);
        f->multiply(m, x->view, 0, tiles, sums, scratch(kDecoded, f->scratch_bytes(m, x->view)));
        for (int64_t t = 0; t < tokens; ++t) from_float(sums + t * rows, dtype, t * stride + first, rows, y);
        decoding += decoded, multiplying += elapsed_ns(start) - decoded;
        return true;
    });
    nanoseconds[0] += decoding, nanoseconds[1] += multiplying;
    return status;
}

int64_t wf_chunk_decode(int isa, const wf_chunk* chunk, uint8_t* codes, uint16_t* scales) {
    const Functions* f = functions(isa);
    const wf_chunk& c = *chunk;
    if (!sound(f, chunk) || (!c.states && !c.row_bytes)) return -1;
    const int64_t tile_bytes = tile_code_bytes(c.table->view, c.width), groups = groups_of(c.width);
    prefer_huge_pages(codes, tiles_of(c.rows) * tile_bytes);
    return each_part(c, [&](int64_t part, int64_t first, int64_t rows) {
        const int64_t tile = first / kTile;
        return decode_part(*f, c, part, first, rows, codes + tile * tile_bytes, scales + tile * groups * kTile);
    });
}

int wf_checksums(const uint8_t* data, const uint32_t* ends, int64_t count, uint64_t* sums) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t from = i ? ends[i - 1] : 0;
        if (ends[i] < from) return -1;
        sums[i] = checksum(data + from, ends[i] - from);
    }
    return 0;
}

#include "chunk.hpp"

#include "arrange.hpp"
#include "pool.hpp"
#include "product.hpp"
#include "sound.hpp"

namespace waterfill {
namespace {

BitstreamShape shape_of(const wf_chunk& c) { return {c.rows, c.width, c.states, c.wide != 0}; }

StoredRows stored_rows(const wf_chunk& c) {
    return {c.table, c.rows, c.width, c.data, c.scales, c.word_indices, c.word_bytes, c.row_bytes};
}

bool levels_of(const Table& t, bool wide) { return t.direct && t.bits == (wide ? 16 : 8); }

// Scales [rows][groups] -> the kernels' layout.
void arrange_scales(const uint16_t* row_scales, int64_t rows, int64_t groups, uint16_t* scales) {
    for (int64_t row = 0; row < tiles_of(rows) * kTile; ++row)
        for (int64_t g = 0; g < groups; ++g)
            scales[(row / kTile * groups + g) * kTile + row % kTile] =
                row < rows ? row_scales[row * groups + g] : uint16_t(0);
}

}  // namespace

bool sound(const Functions* f, const wf_chunk& c) {
    if (!f || !c.table || !possible(c.rows, c.width) || !possible(c.part_rows, c.width) || c.part_rows % kTile)
        return false;
    if ((c.states || c.sums) && !(c.ends && c.parts == parts_of(c) && holds_parts(c.ends, c.parts, c.data_bytes)))
        return false;
    if (arranged(c)) return holds_arranged(c.table, c.rows, c.width, c.data, c.data_bytes, c.scales, c.scales_count);
    if (!c.states) return holds_stored(stored_rows(c), c.data_bytes, c.scales_count);
    return c.data && trellis_code(c.states) && c.part_rows == stream_rows(c.width) && levels_of(c.table->view, c.wide);
}

int64_t parts_of(const wf_chunk& c) { return ceil_div(c.rows, c.part_rows); }

int64_t rows_of(const wf_chunk& c, int64_t part) { return least(c.part_rows, c.rows - part * c.part_rows); }

void decode_parts(const Functions& f, const wf_chunk& c, int64_t first, int count, const PartPlace* places,
                  bool* good) {
    const int64_t each = c.part_rows, groups = groups_of(c.width);
    if (!c.states) {
        const StoredRows stored = stored_rows(c);
        for (int i = 0; i < count; ++i) {
            const int64_t row = (first + i) * each;
            arrange_tiles(f, stored, row / kTile, ceil_div(row + rows_of(c, first + i), kTile), places[i].codes,
                          places[i].scales);
            good[i] = true;
        }
        return;
    }
    auto* row_scales = reinterpret_cast<uint16_t*>(scratch(kIndices, 2 * kTogether * each * groups));
    BitstreamPart parts[kTogether] = {};
    for (int i = 0; i < count; ++i) {
        const int64_t part = first + i, from = part ? c.ends[part - 1] : 0, to = c.ends[part];
        parts[i] = {rows_of(c, part), c.data + from, to - from, row_scales + i * each * groups,
                    in_tiles(shape_of(c), places[i].codes, c.table->view.bias)};
    }
    read_streams(f, shape_of(c), parts, count, good);
    for (int i = 0; i < count; ++i)
        if (good[i]) arrange_scales(parts[i].scales, parts[i].rows, groups, places[i].scales);
}

uint64_t checksum_of(const Functions& f, const uint8_t* data, const uint32_t* ends, int64_t part) {
    const uint32_t from = part ? ends[part - 1] : 0;
    const uint64_t sum = f.checksum(data + from, int64_t(ends[part]) - from);
    return sum ? sum : 1;
}

void decode_chunk(const Functions& f, const wf_chunk& c, uint8_t* codes, uint16_t* scales,
                  std::atomic<int64_t>& least_flaw) {
    const int64_t tile_bytes = tile_code_bytes(c.table->view, c.width), groups = groups_of(c.width);
    prefer_huge_pages(codes, tiles_of(c.rows) * tile_bytes);
    parallel(ceil_div(parts_of(c), kTogether), [&](int64_t share) {
        const int64_t first = share * kTogether;
        const int count = int(least(kTogether, parts_of(c) - first));
        PartPlace places[kTogether] = {};
        bool good[kTogether];
        for (int i = 0; i < count; ++i) {
            const int64_t tile = (first + i) * c.part_rows / kTile;
            places[i] = {codes + tile * tile_bytes, scales + tile * groups * kTile};
        }
        decode_parts(f, c, first, count, places, good);
        for (int i = 0; i < count; ++i)
            if (!good[i]) lower(least_flaw, flaw_number(0, first + i, false));
    });
}

int flaw_status(int64_t least_flaw, wf_flaw* flaw) {
    if (least_flaw == kNoFlaw) return 0;
    *flaw = {least_flaw >> 32, (least_flaw & UINT32_MAX) >> 1, int(least_flaw & 1)};
    return WF_FLAWED;
}

}  // namespace waterfill

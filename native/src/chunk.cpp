#include "chunk.hpp"

#include "arrange.hpp"
#include "half.hpp"
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

bool nested(const wf_chunk& c) { return c.states && c.gains; }

// Streams of all stages, and a table of levels that their sums are rounded to.
bool holds_stages(const wf_chunk& c) {
    if (c.stage_count < 0 || c.stage_count >= kMostStages || (c.stage_count && !c.stages)) return false;
    for (int64_t i = 0; i < c.stage_count; ++i) {
        const wf_stage& s = c.stages[i];
        if (!s.data || s.parts != c.parts || !holds_parts(s.ends, s.parts, s.data_bytes)) return false;
    }
    return levels_of(c.table->view, false) || levels_of(c.table->view, true);
}

wf_stage stage_of(const wf_chunk& c, int64_t i) {
    return i < c.stage_count ? c.stages[i] : wf_stage{c.data, c.ends, c.data_bytes, c.parts, c.wide};
}

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
    const bool streams = c.data && trellis_code(c.states) && c.part_rows == stream_rows(c.width);
    return streams && (nested(c) ? holds_stages(c) : levels_of(c.table->view, c.wide));
}

int64_t parts_of(const wf_chunk& c) { return ceil_div(c.rows, c.part_rows); }

int64_t rows_of(const wf_chunk& c, int64_t part) { return least(c.part_rows, c.rows - part * c.part_rows); }

namespace {

// The rows of a part that all stages have decoded: added up, and brought into the kernels' layout.
bool add_stages(const Functions& f, const wf_chunk& c, int64_t part, const StageRow* first_rows, int count,
                const PartPlace& place) {
    const int64_t rows = rows_of(c, part), width = c.width, groups = groups_of(width);
    const int bits = c.table->view.bits, item = bits / 8;
    const float gain = half_to_float(c.gains[part]);
    float* sums = scratch_floats(kStageRow, width);
    uint8_t* codes = scratch(kStageCodes, rows * width * item);
    auto* scales = reinterpret_cast<uint16_t*>(scratch(kIndices, 2 * rows * groups));
    for (int64_t row = 0; row < rows; ++row) {
        StageRow here[kMostStages];
        for (int i = 0; i < count; ++i) {
            here[i] = first_rows[i];
            here[i].codes += row * width * (here[i].wide ? 2 : 1), here[i].scales += row * groups;
        }
        if (!f.sum_stages(here, count, gain, width, bits, sums, codes + row * width * item, scales + row * groups))
            return false;
    }
    const StoredRows stored{c.table, rows, width, codes, scales, 0, 0, width * item};
    arrange_tiles(f, stored, 0, tiles_of(rows), place.codes, place.scales);
    return true;
}

void decode_nested(const Functions& f, const wf_chunk& c, int64_t first, int count, const PartPlace* places,
                   bool* good) {
    const int64_t each = c.part_rows, weights = each * c.width, groups = groups_of(c.width);
    const int stages = int(c.stage_count) + 1;
    uint8_t* codes = scratch(kStages, 2 * stages * kTogether * weights);
    auto* scales = reinterpret_cast<uint16_t*>(scratch(kStageScales, 2 * stages * kTogether * each * groups));
    StageRow rows[kTogether][kMostStages];
    for (int i = 0; i < count; ++i) good[i] = true;
    for (int s = 0; s < stages; ++s) {
        const wf_stage stage = stage_of(c, s);
        const BitstreamShape shape{c.rows, c.width, c.states, stage.wide != 0};
        BitstreamPart parts[kTogether] = {};
        bool sound[kTogether];
        for (int i = 0; i < count; ++i) {
            const int64_t part = first + i, from = part ? stage.ends[part - 1] : 0, at = s * kTogether + i;
            rows[i][s] = {codes + 2 * at * weights, scales + at * each * groups, shape.wide};
            parts[i] = {rows_of(c, part), stage.data + from, stage.ends[part] - from, scales + at * each * groups,
                        in_rows(shape, codes + 2 * at * weights)};
        }
        read_streams(f, shape, parts, count, sound);
        for (int i = 0; i < count; ++i) good[i] = good[i] && sound[i];
    }
    for (int i = 0; i < count; ++i) good[i] = good[i] && add_stages(f, c, first + i, rows[i], stages, places[i]);
}

}  // namespace

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
    if (nested(c)) return decode_nested(f, c, first, count, places, good);
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

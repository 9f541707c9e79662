// The exported functions but for chunks and entropy coding: instruction sets, threads, tables, products, layers.
#include <algorithm>
#include <cstring>

#include "../include/waterfill_native.h"
#include "arrange.hpp"
#include "isa.hpp"
#include "layer.hpp"
#include "layout.hpp"
#include "matrix.hpp"
#include "pool.hpp"
#include "product.hpp"
#include "sound.hpp"
#include "table.hpp"

using namespace waterfill;

const char* wf_header(void) { return WF_HEADER; }

int64_t wf_sizeof(const char* structure) {
    const struct {
        const char* name;
        size_t bytes;
    } all[] = {{"wf_matrix", sizeof(wf_matrix)},     {"wf_vector", sizeof(wf_vector)}, {"wf_layer", sizeof(wf_layer)},
               {"wf_sequence", sizeof(wf_sequence)}, {"wf_chunk", sizeof(wf_chunk)},   {"wf_task", sizeof(wf_task)},
               {"wf_flaw", sizeof(wf_flaw)},         {"wf_coded", sizeof(wf_coded)},   {"wf_coding", sizeof(wf_coding)},
               {"wf_stage", sizeof(wf_stage)}};
    for (const auto& [name, bytes] : all)
        if (!std::strcmp(name, structure)) return int64_t(bytes);
    return -1;
}

const char* wf_isa(int isa) { return isa_name(isa); }

int wf_usable(int isa) { return isa_usable(isa); }

int wf_set_threads(int count) {
    set_threads(count);
    return 0;
}

int wf_set_team(void* gomp_parallel) {
    set_team(gomp_parallel);
    return 0;
}

int wf_rotate(int isa, float* x, int64_t rows, int64_t width, int inverse) {
    const Functions* f = functions(isa);
    if (!f || rows < 0 || width < 1) return -1;
    each_row(rows, width, [&](int64_t r) { f->rotate(x + r * width, width, inverse != 0); });
    return 0;
}

wf_table* wf_table_new(int isa, int p, int n, int precision, const int16_t* units, const float* points) {
    const Functions* f = functions(isa);
    return f ? new_table(*f, p, n, precision, units, points) : nullptr;
}

void wf_table_free(wf_table* table) { delete table; }

wf_table* wf_window_table_new(int isa, int halves, const uint8_t* hash, const int8_t* levels) {
    const Functions* f = functions(isa);
    return f ? new_window_table(halves, hash, levels) : nullptr;
}

int64_t wf_codes_bytes(const wf_table* table, int64_t rows, int64_t width) {
    return table && possible(rows, width) ? tiles_of(rows) * tile_code_bytes(table->view, width) : -1;
}

int64_t wf_scales_count(int64_t rows, int64_t width) {
    return possible(rows, width) ? tiles_of(rows) * kTile * groups_of(width) : -1;
}

int wf_arrange(int isa, const wf_matrix* stored, int word_indices, int word_bytes, int64_t row_bytes, uint8_t* codes,
               uint16_t* scales) {
    const Functions* f = functions(isa);
    const int64_t rows = stored->rows, width = stored->width;
    const StoredRows m{stored->table, rows, width, stored->codes, stored->scales, word_indices, word_bytes, row_bytes};
    if (!f || !holds_stored(m, stored->codes_bytes, stored->scales_count)) return -1;
    const int64_t tiles = tiles_of(rows), groups = groups_of(width), tile_bytes = tile_code_bytes(m.table->view, width);
    prefer_huge_pages(codes, tiles * tile_bytes);
    const int64_t per_task = most(1, kTaskWeights / (kTile * width));
    parallel(ceil_div(tiles, per_task), [&](int64_t task) {
        const int64_t first = task * per_task;
        arrange_tiles(*f, m, first, least(tiles, first + per_task), codes + first * tile_bytes,
                      scales + first * kTile * groups);
    });
    return 0;
}

int wf_matmul(int isa, const wf_matrix* const* matrices, int count, const void* x, int dtype, int64_t tokens,
              void* const* y) {
    const Functions* f = functions(isa);
    if (!f || count < 1 || tokens < 0 || dtype < 0 || dtype > 2) return -1;
    if (tokens == 0) return 0;
    for (int i = 0; i < count; ++i)
        if (!sound(*matrices[i]) || matrices[i]->width != matrices[0]->width) return -2;
    products(*f, matrices, count, x, dtype, tokens, y);
    return 0;
}

int wf_matmul_float(int isa, const wf_matrix* matrix, const void* x, int dtype, int64_t tokens, float* y) {
    const Functions* f = functions(isa);
    if (!f || tokens < 0 || dtype < 0 || dtype > 2 || !sound(*matrix)) return -1;
    const Matrix m = view(*matrix);
    const float* rows = rotated(*f, x, dtype, tokens, m.width);
    each_row(m.rows, m.width, [&](int64_t r) {
        float* weights = scratch_floats(kDecoded, m.width);
        f->decode_row(m, r, weights);
        for (int64_t t = 0; t < tokens; ++t) y[t * m.rows + r] = f->dot(rows + t * m.width, weights, m.width);
    });
    return 0;
}

int wf_release_memory(void) {
    release_scratch();
    return 0;
}

int wf_run_layers(int isa, const wf_layer* layers, int count, const wf_sequence* sequences, int64_t texts,
                  float* hidden, int64_t tokens, int tables, const float* cosine, const float* sine,
                  wf_vector final_norm, float* out, wf_product product, void* context) {
    const Functions* f = functions(isa);
    if (!f || count < 1 || texts < 1 || tokens < 0) return -1;
    for (int i = 0; i < count; ++i)
        if (!sound(layers[i], product != nullptr) || layers[i].hidden != layers[0].hidden ||
            layers[i].head_dim != layers[0].head_dim || layers[i].rotary >= tables)
            return -2;
    if (!holds(final_norm, layers[0].hidden)) return -2;
    if (!holds_texts(sequences, texts, tokens, layers, count)) return -3;
    const Pass pass{sequences, texts, tokens, cosine, sine, product, context};
    for (int i = 0; i < count; ++i)
        if (const int status = run_layer(*f, layers[i], i, pass, hidden)) return status;
    normalise(*f, hidden, tokens, layers[0].hidden, final_norm.numbers, layers[0].dtype, layers[0].epsilon, out);
    return 0;
}

int wf_decode_layer(int isa, const wf_layer* layer, const void* in, const void* cosine, const void* sine, void* keys,
                    void* values, int64_t capacity, int64_t position, void* out) {
    const Functions* f = functions(isa);
    const wf_layer& l = *layer;
    if (!f || position < 0 || position >= capacity) return -1;
    if (!sound(l, false) || l.cache_dtype != l.dtype || l.rotary) return -2;
    float* memory = scratch_floats(kToken, l.hidden + 2 * l.head_dim);
    float *x = memory, *c = x + l.hidden, *s = c + l.head_dim;
    to_float(in, l.dtype, 0, l.hidden, x);
    to_float(cosine, l.dtype, 0, l.head_dim, c);
    to_float(sine, l.dtype, 0, l.head_dim, s);
    const wf_sequence text{1, position, capacity, &keys, &values, 1, 0, nullptr};
    run_layer(*f, l, 0, {&text, 1, 1, c, s, nullptr, nullptr}, x);
    from_float(x, l.dtype, 0, l.hidden, out);
    return 0;
}

int wf_rows(int isa, const wf_matrix* matrix, const int64_t* ids, int64_t count, int in_rotated_basis, float* out) {
    const Functions* f = functions(isa);
    if (!f || count < 0 || !sound(*matrix)) return -1;
    const Matrix m = view(*matrix);
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= m.rows) return -2;
    each_row(count, m.width, [&](int64_t i) {
        f->decode_row(m, ids[i], out + i * m.width);
        if (!in_rotated_basis) f->rotate(out + i * m.width, m.width, true);
    });
    return 0;
}

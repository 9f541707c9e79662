// The exported functions: choice of instruction set, checks, tables and layouts.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../include/waterfill_native.h"
#include "arrange.hpp"
#include "half.hpp"
#include "isa.hpp"
#include "layout.hpp"
#include "layer.hpp"
#include "matrix.hpp"
#include "pool.hpp"
#include "product.hpp"
#include "sound.hpp"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

using namespace waterfill;

namespace {

struct Isa {
    const char* name;
    const Functions* (*functions)();
};

const Isa kIsas[] = {
    {"avx512vbmi", avx512vbmi_functions}, {"avx512", avx512_functions}, {"avx2", avx2_functions},
    {"neon", neon_functions},             {"scalar", scalar_functions},
};
constexpr int kIsaCount = int(sizeof kIsas / sizeof kIsas[0]);

bool machine_has(int isa) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    if (isa == 0) return avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
    if (isa == 1) return avx512;
    if (isa == 2) return avx2;
#elif defined(__aarch64__) && defined(__APPLE__)
    if (isa == 3) return true;
#elif defined(__aarch64__) && defined(__linux__)
    if (isa == 3) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
    return isa == kIsaCount - 1;
}

void fill(wf_table& t, int p, int n, int precision, const int16_t* units, const float* points, int bias) {
    Table& v = t.view;
    v = {p, n, bits_of(n), precision, bias, 1, nullptr, {}, nullptr, nullptr, false};
    while (v.entry < p * precision / 8) v.entry *= 2;
    const int rounded = 1 << v.bits, period = std::max(256, rounded), size = precision / 8;
    t.entries.resize(size_t(period) * size_t(v.entry) + 8);
    for (int i = 0; i < period; ++i)
        for (int k = 0; k < p; ++k) {
            const int value = units[std::min(i % rounded, n - 1) * p + k] + v.bias;
            uint8_t* to = t.entries.data() + i * v.entry + k * size;
            to[0] = uint8_t(value);
            if (size == 2) to[1] = uint8_t(value >> 8);
        }
    v.entries = t.entries.data();
    for (int k = 0; k < p && n <= 256 && precision == 8; ++k) {
        t.bytes[k].resize(256);
        for (int i = 0; i < 256; ++i) t.bytes[k][size_t(i)] = t.entries[size_t(i * v.entry + k)];
        v.bytes[k] = t.bytes[k].data();
    }
    if (p == 1 && n <= 256 && precision == 16) {
        t.words.resize(256);
        std::memcpy(t.words.data(), v.entries, 512);
        v.words = t.words.data();
    }
    t.points.assign(points, points + size_t(n) * size_t(p));
    v.points = t.points.data();
}

// Levels that are their own codes, less half their number: there is no table.
bool is_direct(int p, int n, int precision) { return p == 1 && n == 1 << precision; }

void fill_direct(wf_table& t, int precision, int bias) {
    t.view = {1, 1 << precision, precision, precision, bias, precision / 8, nullptr, {}, nullptr, nullptr, true};
}

// A scalar grid as one of pairs: two codes side by side index it, so that each byte that is loaded and shifted serves
// twice as many weights.
void fill_with_pairs(wf_table& t, int n, const int16_t* units, const float* points, int bias) {
    const int bits = bits_of(n), count = 1 << 2 * bits;
    std::vector<int16_t> pair_units;
    std::vector<float> pair_points;
    for (int code = 0; code < count; ++code)
        for (int k = 0; k < 2; ++k) {
            const int one = std::min(code >> k * bits & ((1 << bits) - 1), n - 1);
            pair_units.push_back(units[one]);
            pair_points.push_back(points[one]);
        }
    fill(t, 2, count, 8, pair_units.data(), pair_points.data(), bias);
    t.paired = n;
}

}  // namespace

const Functions* waterfill::functions(int isa) { return isa >= 0 && isa < kIsaCount ? kIsas[isa].functions() : nullptr; }

int wf_version(void) { return WF_VERSION; }

const char* wf_isa(int isa) { return isa >= 0 && isa < kIsaCount ? kIsas[isa].name : nullptr; }

int wf_usable(int isa) { return isa >= 0 && isa < kIsaCount && machine_has(isa) && functions(isa); }

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
    if (!f || p < 1 || p > 4 || n < 2 || (precision != 8 && precision != 16)) return nullptr;
    const bool direct = is_direct(p, n, precision);
    if (n > 4096 && !direct) return nullptr;
    std::unique_ptr<wf_table> made(new (std::nothrow) wf_table);
    if (!made) return nullptr;
    if (direct)
        fill_direct(*made, precision, precision == 8 ? f->bias : 0);
    else if (p == 1 && precision == 8 && bits_of(n) <= f->pair_bits)
        fill_with_pairs(*made, n, units, points, f->bias);
    else
        fill(*made, p, n, precision, units, points, precision == 8 ? f->bias : 0);
    return made.release();
}

void wf_table_free(wf_table* table) { delete table; }

int64_t wf_codes_bytes(int p, int n, int64_t rows, int64_t width) {
    if (p < 1 || p > 4 || n < 2 || n > 1 << 16 || !possible(rows, width)) return -1;
    const int bits = bits_of(n);
    int64_t bytes = chunks_per_row(width, p) * planes_of(bits).bytes;
    if (p == 1 && bits <= kMostPairBits) bytes = std::max(bytes, chunks_per_row(width, 2) * planes_of(2 * bits).bytes);
    return tiles_of(rows) * kTile * bytes;
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
        arrange_tiles(*f, m, first, least(tiles, first + per_task), codes + first * tile_bytes, scales + first * kTile * groups);
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

int wf_run_layers(int isa, const wf_layer* layers, int count, const wf_sequence* sequences, int64_t texts, float* hidden,
                  int64_t tokens, const float* cosine, const float* sine, wf_vector final_norm, float* out,
                  wf_product product, void* context) {
    const Functions* f = functions(isa);
    if (!f || count < 1 || texts < 1 || tokens < 0) return -1;
    for (int i = 0; i < count; ++i)
        if (!sound(layers[i], product != nullptr) || layers[i].hidden != layers[0].hidden) return -2;
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
    if (!sound(l, false) || l.cache_dtype != l.dtype) return -2;
    float* memory = scratch_floats(kToken, l.hidden + 2 * l.head_dim);
    float *x = memory, *c = x + l.hidden, *s = c + l.head_dim;
    to_float(in, l.dtype, 0, l.hidden, x);
    to_float(cosine, l.dtype, 0, l.head_dim, c);
    to_float(sine, l.dtype, 0, l.head_dim, s);
    const wf_sequence text{1, position, capacity, &keys, &values, 1, 0};
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

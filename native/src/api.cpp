// The exported functions: choice of instruction set, memory, division of work among threads.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../include/waterfill_native.h"
#include "half.hpp"
#include "layout.hpp"
#include "matrix.hpp"
#include "pool.hpp"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

using namespace waterfill;

struct wf_table {
    Table view;
    std::vector<uint8_t> entries, bytes[2];
    std::vector<int16_t> words;
    std::vector<float> points;
};

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
    if (isa == 0) return avx512 && __builtin_cpu_supports("avx512vbmi");
    if (isa == 1) return avx512;
    if (isa == 2) return avx2;
#elif defined(__aarch64__) && defined(__APPLE__)
    if (isa == 3) return true;
#elif defined(__aarch64__) && defined(__linux__)
    if (isa == 3) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
    return isa == kIsaCount - 1;
}

const Functions* functions(int isa) { return isa >= 0 && isa < kIsaCount ? kIsas[isa].functions() : nullptr; }

Matrix view(const wf_matrix& m) {
    return {m.rows, m.width, m.step, m.unit, &m.table->view, m.codes, m.scales};
}

// Scratch that a thread keeps, since allocating a megabyte for every product would cost more than a small product.
uint8_t* scratch(int slot, int64_t bytes) {
    thread_local std::vector<uint8_t> kept[6];
    auto& memory = kept[slot];
    if (int64_t(memory.size()) < bytes + 64) memory.resize(size_t(bytes + 64));
    uint8_t* p = memory.data();
    return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64;
}

void to_float(const void* x, int dtype, int64_t from, int64_t count, float* out) {
    if (dtype == WF_FLOAT32) {
        std::memcpy(out, static_cast<const float*>(x) + from, size_t(count) * sizeof(float));
        return;
    }
    const uint16_t* half = static_cast<const uint16_t*>(x) + from;
    for (int64_t i = 0; i < count; ++i) out[i] = dtype == WF_BFLOAT16 ? bfloat_to_float(half[i]) : half_to_float(half[i]);
}

// Few rows are not worth waking a thread for.
void each_row(int64_t rows, int64_t width, const std::function<void(int64_t)>& work) {
    const int64_t block = std::max<int64_t>(1, (1 << 15) / width);
    parallel(ceil_div(rows, block), [&](int64_t i) {
        for (int64_t r = i * block; r < std::min(rows, (i + 1) * block); ++r) work(r);
    });
}

const float* rotated(const Functions& f, const void* x, int dtype, int64_t tokens, int64_t width) {
    float* rows = reinterpret_cast<float*>(scratch(0, tokens * width * int64_t(sizeof(float))));
    each_row(tokens, width, [&](int64_t t) {
        to_float(x, dtype, t * width, width, rows + t * width);
        f.rotate(rows + t * width, width, false);
    });
    return rows;
}

// A form of the activations: which order of columns, how many bits. Matrices that share it share the work.
struct Form {
    bool planar;
    int precision, bias;
    bool operator==(const Form& o) const { return planar == o.planar && precision == o.precision && bias == o.bias; }
};

Form form_of(const Functions& f, const Table& t) { return {f.planar(t), t.precision, t.bias}; }

Prepared prepare(const Functions& f, const float* rows, int64_t tokens, int64_t width, Form form) {
    const int64_t padded = padded_width(width), groups = groups_of(width);
    uint8_t* data = scratch(1, tokens * padded * form.precision / 8);
    float* scales = reinterpret_cast<float*>(scratch(2, tokens * groups * 4));
    int32_t* corrections = reinterpret_cast<int32_t*>(scratch(3, tokens * groups * 4));
    each_row(tokens, width, [&](int64_t t) {
        f.quantise(rows + t * width, width, form.planar, form.precision, form.bias,
                   data + t * padded * form.precision / 8, scales + t * groups, corrections + t * groups);
    });
    return {tokens, groups, padded, data, scales, corrections};
}

constexpr int64_t kTaskWeights = 1 << 17;  // about 4 us of one thread
constexpr int64_t kTaskTiles = 8;          // what a gemm decodes together

void multiply(const Functions& f, const Matrix& m, const Prepared& x, float* y) {
    const int64_t tiles = tiles_of(m.rows);
    int64_t block = std::max<int64_t>(1, kTaskWeights / (kTile * m.width * std::max<int64_t>(1, x.tokens / 4)));
    block = ceil_div(block, kTaskTiles) * kTaskTiles;
    const int64_t bytes = f.scratch_bytes(m, x);
    parallel(ceil_div(tiles, block), [&](int64_t i) {
        f.multiply(m, x, i * block, std::min(tiles, (i + 1) * block), y, scratch(4, bytes));
    });
}

void unpack_row(const uint8_t* row, int64_t count, int n, int word_indices, int word_bytes, int64_t row_bytes,
                uint16_t* out) {
    if (!word_indices) {
        const int bits = bits_of(n);
        const uint32_t mask = (1u << bits) - 1;
        uint64_t held = 0;
        int have = 0;
        for (int64_t i = 0; i < count; ++i) {
            while (have < bits) held |= uint64_t(*row++) << have, have += 8;
            out[i] = uint16_t(std::min<uint32_t>(uint32_t(held) & mask, uint32_t(n) - 1));
            held >>= bits, have -= bits;
        }
        return;
    }
    const uint8_t* end = row + row_bytes;
    for (int64_t i = 0; i < count; i += word_indices, row += word_bytes) {
        uint64_t word = 0;
        std::memcpy(&word, row, size_t(std::min<int64_t>(word_bytes, end - row)));
        for (int64_t k = i; k < std::min<int64_t>(count, i + word_indices); ++k, word /= uint64_t(n))
            out[k] = uint16_t(word % uint64_t(n));
    }
}

}  // namespace

int wf_version(void) { return WF_VERSION; }

const char* wf_isa(int isa) { return isa >= 0 && isa < kIsaCount ? kIsas[isa].name : nullptr; }

int wf_usable(int isa) { return functions(isa) && machine_has(isa); }

int wf_set_threads(int count) {
    set_threads(count);
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
    if (!f || p < 1 || p > 4 || n < 2 || n > 4096 || (precision != 8 && precision != 16)) return nullptr;
    std::unique_ptr<wf_table> made(new (std::nothrow) wf_table);
    if (!made) return nullptr;
    wf_table& t = *made;
    Table& v = t.view;
    v = {p, n, bits_of(n), precision, precision == 8 ? f->bias : 0, 1, nullptr, {nullptr, nullptr}, nullptr, nullptr};
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
    for (int k = 0; k < p && p <= 2 && n <= 256 && precision == 8; ++k) {
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
    return made.release();
}

void wf_table_free(wf_table* table) { delete table; }

int64_t wf_codes_bytes(int p, int n, int64_t rows, int64_t width) {
    return tiles_of(rows) * kTile * chunks_per_row(width, p) * planes_of(bits_of(n)).bytes;
}

int64_t wf_scales_count(int64_t rows, int64_t width) { return tiles_of(rows) * kTile * groups_of(width); }

int wf_arrange(int isa, const wf_matrix* stored, int word_indices, int word_bytes, int64_t row_bytes, uint8_t* codes,
               uint16_t* scales) {
    const Functions* f = functions(isa);
    if (!f || word_bytes > 7) return -1;
    const Table& t = stored->table->view;
    const int64_t rows = stored->rows, width = stored->width, groups = groups_of(width);
    const int64_t count = codes_per_row(width, t.p), chunks = chunks_per_row(width, t.p);
    const Planes planes = planes_of(t.bits);
    const bool reorder = f->planar(t) && t.p == 1;
    const int64_t per_task = std::max<int64_t>(1, kTaskWeights / (kTile * width));
    parallel(ceil_div(tiles_of(rows), per_task), [&](int64_t task) {
        auto* index = reinterpret_cast<uint16_t*>(scratch(5, chunks * kChunk * 2));
        for (int64_t tile = task * per_task; tile < std::min(tiles_of(rows), (task + 1) * per_task); ++tile) {
            uint8_t* out = codes + tile * chunks * kTile * planes.bytes;
            std::memset(out, 0, size_t(chunks * kTile * planes.bytes));
            for (int r = 0; r < kTile; ++r) {
                const int64_t row = tile * kTile + r;
                for (int64_t g = 0; g < groups; ++g)
                    scales[(tile * groups + g) * kTile + r] = row < rows ? stored->scales[row * groups + g] : uint16_t(0);
                if (row >= rows) continue;
                unpack_row(stored->codes + row * row_bytes, count, t.n, word_indices, word_bytes, row_bytes, index);
                for (int64_t i = 0; i < chunks * kChunk; ++i) {
                    const int64_t from = reorder ? planar_column(i) : i;
                    if (from < count)
                        put_code(out + (i / kChunk * kTile + r) * planes.bytes, planes, int(i % kChunk), index[from]);
                }
            }
        }
    });
    return 0;
}

int wf_matmul(int isa, const wf_matrix* const* matrices, int count, const void* x, int dtype, int64_t tokens,
              float* const* y) {
    const Functions* f = functions(isa);
    if (!f || count < 1 || tokens < 0 || dtype < 0 || dtype > 2) return -1;
    if (tokens == 0) return 0;
    const int64_t width = matrices[0]->width;
    const float* rows = rotated(*f, x, dtype, tokens, width);
    std::vector<bool> done(size_t(count), false);
    for (int first = 0; first < count; ++first) {
        if (done[size_t(first)]) continue;
        const Form form = form_of(*f, matrices[first]->table->view);
        const Prepared prepared = prepare(*f, rows, tokens, width, form);
        for (int i = first; i < count; ++i) {
            if (matrices[i]->width != width) return -2;
            if (done[size_t(i)] || !(form_of(*f, matrices[i]->table->view) == form)) continue;
            multiply(*f, view(*matrices[i]), prepared, y[i]);
            done[size_t(i)] = true;
        }
    }
    return 0;
}

int wf_matmul_float(int isa, const wf_matrix* matrix, const void* x, int dtype, int64_t tokens, float* y) {
    const Functions* f = functions(isa);
    if (!f || tokens < 0 || dtype < 0 || dtype > 2) return -1;
    const Matrix m = view(*matrix);
    const float* rows = rotated(*f, x, dtype, tokens, m.width);
    each_row(m.rows, m.width, [&](int64_t r) {
        float* weights = reinterpret_cast<float*>(scratch(4, m.width * int64_t(sizeof(float))));
        f->decode_row(m, r, weights);
        for (int64_t t = 0; t < tokens; ++t) y[t * m.rows + r] = f->dot(rows + t * m.width, weights, m.width);
    });
    return 0;
}

int wf_rows(int isa, const wf_matrix* matrix, const int64_t* ids, int64_t count, int in_rotated_basis, float* out) {
    const Functions* f = functions(isa);
    if (!f || count < 0) return -1;
    const Matrix m = view(*matrix);
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= m.rows) return -2;
    each_row(count, m.width, [&](int64_t i) {
        f->decode_row(m, ids[i], out + i * m.width);
        if (!in_rotated_basis) f->rotate(out + i * m.width, m.width, true);
    });
    return 0;
}

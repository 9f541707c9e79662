#include "product.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "arrange.hpp"
#include "half.hpp"
#include "layout.hpp"
#include "pool.hpp"

namespace waterfill {
namespace {

constexpr int64_t kUnitTiles = 8;  // of work: what a gemm decodes together
constexpr int64_t kRowTaskNumbers = 1 << 15;

Prepared prepare(const Functions& f, const float* rows, int64_t tokens, int64_t width, Form form) {
    const int64_t padded = padded_width(width), groups = groups_of(width);
    uint8_t* data = scratch(kIntegers, tokens * padded * form.precision / 8);
    float* scales = scratch_floats(kIntegerScales, tokens * groups);
    int32_t* corrections = reinterpret_cast<int32_t*>(scratch(kCorrections, tokens * groups * 4));
    return quantise(f, rows, tokens, width, form, data, scales, corrections);
}

struct Part {  // of the work: one matrix
    Matrix matrix;
    float* sums;  // [tokens][rows]
    void* y;      // the same memory where y is of floats
    int64_t first_unit;
};

void multiply_units(const Functions& f, const Part& part, int64_t first, int64_t last, int dtype, const Prepared& x) {
    const int64_t first_tile = first * kUnitTiles, last_tile = std::min(last * kUnitTiles, tiles_of(part.matrix.rows));
    uint8_t* memory = scratch(kDecoded, f.scratch_bytes(part.matrix, x));
    f.multiply(part.matrix, x, first_tile, last_tile, part.sums, memory);
    if (dtype == WF_FLOAT32) return;
    const int64_t from = first_tile * kTile, count = std::min(last_tile * kTile, part.matrix.rows) - from;
    for (int64_t t = 0; t < x.tokens; ++t) {
        const int64_t at = t * part.matrix.rows + from;
        from_float(part.sums + at, dtype, at, count, part.y);
    }
}

// Brings the beginning of what a thread is about to multiply into its cache, until it may begin.
void fetch_ahead(const Part& part, int64_t unit, const std::atomic<bool>& ready) {
    constexpr int64_t kMostBytes = 1 << 17, kLine = 64, kLinesAtOnce = 16;
    const int64_t tile = tile_code_bytes(*part.matrix.table, part.matrix.width), from = unit * kUnitTiles * tile;
    const int64_t bytes = least(kMostBytes, tiles_of(part.matrix.rows) * tile - from);
    for (int64_t at = 0; at < bytes && !ready.load(std::memory_order_acquire); at += kLine * kLinesAtOnce)
        for (int64_t line = 0; line < kLinesAtOnce; ++line)
            __builtin_prefetch(part.matrix.codes + from + at + line * kLine, 0, 2);
    while (!ready.load(std::memory_order_acquire)) relax();
}

// All matrices together: several small ones wake the threads once. Threads take a share of what is left, large ones
// first: each reads long streams, as the memory's latency is paid in full where one starts, and all end together. One
// thread prepares the activations, for which the others wait.
template <class Prepare>
void multiply(const Functions& f, const std::vector<const wf_matrix*>& matrices, const std::vector<void*>& y, int dtype,
              int64_t tokens, const Prepare& prepare) {
    std::vector<Part> parts;
    int64_t units = 0, rows = 0;
    for (const wf_matrix* m : matrices) rows += m->rows;
    float* sums = dtype == WF_FLOAT32 ? nullptr : scratch_floats(kSums, rows * tokens);
    for (size_t i = 0; i < matrices.size(); ++i) {
        const Matrix m = view(*matrices[i]);
        parts.push_back({m, sums ? sums : static_cast<float*>(y[i]), y[i], units});
        if (sums) sums += m.rows * tokens;
        units += ceil_div(tiles_of(m.rows), kUnitTiles);
    }
    const int64_t unit_weights = kUnitTiles * kTile * matrices[0]->width * std::max<int64_t>(1, tokens / 4);
    const int64_t least_units = std::max<int64_t>(1, kTaskWeights / unit_weights);
    std::atomic<int64_t> next{0};
    std::atomic<bool> ready{false};
    Prepared x;
    const int workers = int(std::min<int64_t>(threads(), ceil_div(units, least_units)));
    parallel(workers, [&](int64_t worker) {  // the first is taken before any other, so that nobody waits for nothing
        if (worker == 0) {
            x = prepare();
            ready.store(true, std::memory_order_release);
        }
        for (int64_t first = next.load(); first < units;) {
            const int64_t last = std::min(units, first + std::max(least_units, (units - first) / (2 * workers)));
            if (!next.compare_exchange_weak(first, last)) continue;
            for (size_t i = 0; i < parts.size(); ++i) {
                const int64_t end = i + 1 < parts.size() ? parts[i + 1].first_unit : units, start = parts[i].first_unit;
                const int64_t a = std::max(first, start), b = std::min(last, end);
                if (a >= b) continue;
                if (!ready.load(std::memory_order_acquire)) fetch_ahead(parts[i], a - start, ready);
                multiply_units(f, parts[i], a - start, b - start, dtype, x);
            }
            first = next.load();
        }
    });
}

}  // namespace

Form form_of(const Functions& f, const Table& t) { return {f.order(t), t.precision, t.bias}; }

Prepared quantise(const Functions& f, const float* rows, int64_t tokens, int64_t width, Form form, uint8_t* data,
                  float* scales, int32_t* corrections) {
    const int64_t padded = padded_width(width), groups = groups_of(width);
    each_row(tokens, width, [&](int64_t t) {
        f.quantise(rows + t * width, width, form.order, form.precision, form.bias,
                   data + t * padded * form.precision / 8, scales + t * groups, corrections + t * groups);
    });
    return {tokens, groups, padded, data, scales, corrections};
}

Matrix view(const wf_matrix& m) { return {m.rows, m.width, m.step, m.unit, &m.table->view, m.codes, m.scales}; }

namespace {
thread_local std::vector<uint8_t> kept[kScratchSlots];
}

uint8_t* scratch(Scratch slot, int64_t bytes) {
    auto& memory = kept[slot];
    if (int64_t(memory.size()) < bytes + 64) memory.resize(size_t(bytes + 64));
    uint8_t* p = memory.data();
    return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64;
}

void release_scratch() {
    for (auto& memory : kept) std::vector<uint8_t>().swap(memory);
}

void prefer_huge_pages([[maybe_unused]] uint8_t* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kPage = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes)) / kPage * kPage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // no harm where refused
#endif
}

void to_float(const void* x, int dtype, int64_t from, int64_t count, float* out) {
    if (dtype == WF_FLOAT32) {
        std::memcpy(out, static_cast<const float*>(x) + from, size_t(count) * sizeof(float));
        return;
    }
    const uint16_t* half = static_cast<const uint16_t*>(x) + from;
    if (dtype == WF_BFLOAT16)
        for (int64_t i = 0; i < count; ++i) out[i] = bfloat_to_float(half[i]);
    else
        for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(half[i]);
}

void from_float(const float* x, int dtype, int64_t to, int64_t count, void* out) {
    if (dtype == WF_FLOAT32) {
        std::memcpy(static_cast<float*>(out) + to, x, size_t(count) * sizeof(float));
        return;
    }
    uint16_t* half = static_cast<uint16_t*>(out) + to;
    if (dtype == WF_BFLOAT16)
        for (int64_t i = 0; i < count; ++i) half[i] = float_to_bfloat(x[i]);
    else
        for (int64_t i = 0; i < count; ++i) half[i] = float_to_half(x[i]);
}

int64_t each_row_tasks(int64_t rows, int64_t width) {
    return ceil_div(rows, std::max<int64_t>(1, kRowTaskNumbers / width));
}

void each_row(int64_t rows, int64_t width, const std::function<void(int64_t)>& work) {
    const int64_t block = std::max<int64_t>(1, kRowTaskNumbers / width);
    parallel(each_row_tasks(rows, width), [&](int64_t i) {
        for (int64_t r = i * block; r < std::min(rows, (i + 1) * block); ++r) work(r);
    });
}

const float* rotated(const Functions& f, const void* x, int dtype, int64_t tokens, int64_t width) {
    float* rows = scratch_floats(kRotated, tokens * width);
    each_row(tokens, width, [&](int64_t t) {
        to_float(x, dtype, t * width, width, rows + t * width);
        f.rotate(rows + t * width, width, false);
    });
    return rows;
}

void products(const Functions& f, const wf_matrix* const* matrices, int count, const void* x, int dtype, int64_t tokens,
              void* const* y) {
    const int64_t width = matrices[0]->width;
    std::vector<bool> done(size_t(count), false);
    const float* rows = nullptr;  // rotated once for all forms
    const bool alone = each_row_tasks(tokens, width) == 1;
    for (int first = 0; first < count; ++first) {
        if (done[size_t(first)]) continue;
        const Form form = form_of(f, matrices[first]->table->view);
        std::vector<const wf_matrix*> same;
        std::vector<void*> results;
        for (int i = first; i < count; ++i) {
            if (done[size_t(i)] || !(form_of(f, matrices[i]->table->view) == form)) continue;
            same.push_back(matrices[i]);
            results.push_back(y[i]);
            done[size_t(i)] = true;
        }
        auto prepared = [&] {
            if (!rows) rows = rotated(f, x, dtype, tokens, width);
            return prepare(f, rows, tokens, width, form);
        };
        if (alone) {
            multiply(f, same, results, dtype, tokens, prepared);
        } else {  // several threads prepare, before several multiply
            const Prepared all = prepared();
            multiply(f, same, results, dtype, tokens, [&] { return all; });
        }
    }
}

}  // namespace waterfill

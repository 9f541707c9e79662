// What the comparisons share: random numbers, matrices that one instruction set has arranged, and expectations that
// count failures. compare_main.cpp runs them all; each of compare_*.cpp holds one subject.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../include/waterfill_native.h"

extern std::mt19937 rng;
extern int failures;

void expect(bool holds, const std::string& what);

struct Grid {
    int p, n, precision;
    int digits = 0, word_bytes = 0;  // of radix words, or bit fields
};

struct Arranged {
    wf_table* table;
    std::vector<uint8_t> codes;
    std::vector<uint16_t> scales;
    wf_matrix matrix;

    Arranged(int isa, const Grid& g, int64_t rows, int64_t width, const std::vector<int16_t>& units,
             const std::vector<float>& points, const std::vector<uint8_t>& stored, const std::vector<uint16_t>& factors,
             int64_t row_bytes)
        : Arranged(isa, wf_table_new(isa, g.p, g.n, g.precision, units.data(), points.data()), g, rows, width, stored,
                   factors, row_bytes) {}
    Arranged(int isa, wf_table* made, const Grid& g, int64_t rows, int64_t width, const std::vector<uint8_t>& stored,
             const std::vector<uint16_t>& factors, int64_t row_bytes)
        : table(made),
          codes(size_t(wf_codes_bytes(table, rows, width))),
          scales(size_t(wf_scales_count(rows, width))),
          matrix{rows,
                 width,
                 0.01f,
                 1.0f,
                 table,
                 stored.data(),
                 factors.data(),
                 int64_t(stored.size()),
                 int64_t(factors.size())} {
        if (wf_arrange(isa, &matrix, g.digits, g.word_bytes, row_bytes, codes.data(), scales.data())) std::abort();
        matrix.codes = codes.data(), matrix.codes_bytes = int64_t(codes.size());
        matrix.scales = scales.data(), matrix.scales_count = int64_t(scales.size());
    }
    ~Arranged() { wf_table_free(table); }
    Arranged(const Arranged&) = delete;
};

inline int64_t stream_rows(int64_t width) { return std::max<int64_t>(1, (1 << 18) / (4 * width)) * 4; }

inline int64_t groups_of(int64_t width) { return width < 1536 ? 1 : (width + 512) / 1024; }

// A chunk's product is that of the matrix, in columns of a wider result.
void expect_product(int isa, const wf_chunk& chunk, const std::vector<float>& x, int64_t tokens,
                    const std::vector<float>& y, const std::string& name);

// A matrix or a chunk that asks for more than there is, in any of its fields, is refused.
void expect_lies_refused(int isa, const wf_matrix& sound, const std::string& name);
void expect_lies_refused(int isa, const wf_chunk& sound, const std::string& name);

// A stream of `rows` x `width` random symbols, written by hand with its table: docs/format.md.
std::vector<uint8_t> stream_of(int64_t rows, int64_t width, int lanes, int symbols, bool wide, bool levels);

// Products, rows and chunks of a random matrix, as stored and as arranged.
void compare_matrices(int isa, int scalar, const Grid& g, int64_t rows, int64_t width);

// The same of a matrix that two instruction sets have arranged.
void compare_arranged(int isa, int scalar, const Arranged& a, const Arranged& b, const Grid& g,
                      const std::vector<uint8_t>& stored, const std::vector<uint16_t>& factors, int64_t row_bytes,
                      const std::string& name);

// The same of random codes of a bitshift trellis of `halves` / 2 bits; its search; and tables that are refused.
void compare_windows(int isa, int scalar, int halves, int64_t rows, int64_t width);
void compare_window_search(int isa, int scalar);
void expect_window_tables_refused(int isa);

// Decoder layers of numbers of `dtype`, with a cache, in every way that they can be run.
void compare_layers(int isa, int scalar, int dtype, bool biases);

// Attention to coded keys and values.
void compare_coded(int isa, int scalar);

// Streams that are whole, cut short or damaged: the same result, or refused by both, without a read beyond the bytes.
void compare_streams(int isa, int scalar);

// A matrix of so many streams that threads take several at a time: whole, and with one of them damaged.
void compare_many_streams(int isa, int scalar, int64_t width, int most_symbols);

// A matrix of streams as tasks of a few streams each: the product is that of the levels, damage has its place.
void compare_tasks(int isa, int64_t width);

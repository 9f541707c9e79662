// Products of packed matrices with activations: preparation, memory, and division of the work among threads.
#pragma once

#include <cstdint>
#include <functional>

#include "../include/waterfill_native.h"
#include "matrix.hpp"
#include "table.hpp"

namespace waterfill {

Matrix view(const wf_matrix& m);

// y[i] = x W_i^T for matrices of one width, x [tokens][width] and y[i] [tokens][rows_i] of `dtype`. The rotation of x
// is shared, and its integers among matrices of the same form.
void products(const Functions& f, const wf_matrix* const* matrices, int count, const void* x, int dtype, int64_t tokens,
              void* const* y);

// x rotated, [tokens][width], in memory that the next call reuses.
const float* rotated(const Functions& f, const void* x, int dtype, int64_t tokens, int64_t width);

// A form of the activations: which order of columns, how many bits. Matrices that share it share the work.
struct Form {
    int order, precision, bias;
    bool operator==(const Form& o) const { return order == o.order && precision == o.precision && bias == o.bias; }
};

Form form_of(const Functions& f, const Table& t);

// Rotated rows [tokens][width] -> integers, in memory of the caller's as `Prepared` says.
Prepared quantise(const Functions& f, const float* rows, int64_t tokens, int64_t width, Form form, uint8_t* data,
                  float* scales, int32_t* corrections);

// `count` numbers of a WF_ dtype to floats, starting at number `from`.
void to_float(const void* x, int dtype, int64_t from, int64_t count, float* out);

// `count` floats to numbers of a WF_ dtype, beginning with number `to`.
void from_float(const float* x, int dtype, int64_t to, int64_t count, void* out);

// Memory that a thread keeps, 64-byte aligned, since allocating a megabyte would cost more than a small product.
enum Scratch {
    kRotated,
    kIntegers,
    kIntegerScales,
    kCorrections,
    kDecoded,
    kIndices,
    kSums,
    kToken,
    kLayer,
    kConstants,
    kScores,
    kQueryWords,
    kSymbols,
    kLevels,
    kPartCodes,
    kPartScales,
    kPartSums,
    kStages,
    kStageScales,
    kStageRow,
    kStageCodes,
    kScratchSlots
};
uint8_t* scratch(Scratch slot, int64_t bytes);
void release_scratch();

// A stream through pages of 4 KiB looks up an address every fraction of a microsecond.
void prefer_huge_pages(uint8_t* memory, int64_t bytes);
inline float* scratch_floats(Scratch slot, int64_t count) {
    return reinterpret_cast<float*>(scratch(slot, count * int64_t(sizeof(float))));
}

// work(r) for each row; few rows are not worth waking a thread for.
void each_row(int64_t rows, int64_t width, const std::function<void(int64_t)>& work);
int64_t each_row_tasks(int64_t rows, int64_t width);  // 1: in the calling thread

constexpr int64_t kTaskWeights = 1 << 17;  // about 4 us of one thread

}  // namespace waterfill

// Whether the memory that a caller gives holds what the shapes beside it say: sizes come from files, which may lie.
// Checked once per call; nothing behind these checks asks again.
#pragma once

#include <cstdint>

#include "arrange.hpp"
#include "product.hpp"

namespace waterfill {

// A matrix as large as memory can hold, with which no size computed from its shape overflows.
bool possible(int64_t rows, int64_t width);

// Codes and scales in the kernels' layout.
bool holds_arranged(const wf_table* table, int64_t rows, int64_t width, const void* codes, int64_t codes_bytes,
                    const void* scales, int64_t scales_count);

// Codes and scales as an artifact has them, row by row: arrange.hpp.
bool holds_stored(const StoredRows& m, int64_t codes_bytes, int64_t scales_count);

// Parts that end in order, within so many bytes.
bool holds_parts(const uint32_t* ends, int64_t parts, int64_t bytes);

// A matrix in the kernels' layout.
bool sound(const wf_matrix& m);

// A layer whose matrices and vectors fit one another; with `shapes_only` its matrices are not in memory.
bool sound(const wf_layer& layer, bool shapes_only);

bool holds(const wf_vector& v, int64_t count);

// Texts with room for their next tokens, `tokens` in all, in memory that is as large as they say and each one's own.
bool holds_texts(const wf_sequence* texts, int64_t count, int64_t tokens, const wf_layer* layers, int layer_count);

}  // namespace waterfill

// Grids as integer tables, in the memory that a `Table` points to.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.hpp"

struct wf_table {
    waterfill::Table view;
    std::vector<uint8_t> entries, bytes[4];
    std::vector<int16_t> words;
    std::vector<float> points;
    int paired = 0;  // points of the grid of scalars that was made one of pairs, or 0
};

namespace waterfill {

// What wf_table_new is to; null where there can be none, or no memory for it.
wf_table* new_table(const Functions& f, int p, int n, int precision, const int16_t* units, const float* points);

// The same of wf_window_table_new.
wf_table* new_window_table(int halves, const uint8_t* hash, const int8_t* levels);

}  // namespace waterfill

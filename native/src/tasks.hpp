// Products of chunks that arrive one after another: what wf_multiply_chunks and wf_activations_new do.
#pragma once

#include <cstdint>
#include <vector>

#include "../include/waterfill_native.h"
#include "product.hpp"

struct wf_activations {
    std::vector<uint8_t> memory;
    waterfill::Prepared view;
    waterfill::Form form;
};

namespace waterfill {

// Null when out of memory.
wf_activations* new_activations(const Functions& f, const Table& table, const void* x, int dtype, int64_t tokens,
                                int64_t width);

// Returns 0, WF_ENDED, WF_FLAWED, or a negative number for tasks that cannot be.
int run_tasks(const Functions& f, const wf_task* tasks, int64_t count, int dtype, wf_ready ready, void* context,
              int64_t* nanoseconds, wf_flaw* flaw);

}  // namespace waterfill

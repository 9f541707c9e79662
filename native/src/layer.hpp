// One decoder layer of the Llama kind for one token, in one call.
#pragma once

#include "product.hpp"

namespace waterfill {

void decode_layer(const Functions& f, const wf_layer& layer, const void* in, const void* cosine, const void* sine,
                  void* keys, void* values, int64_t capacity, int64_t position, void* out);

}  // namespace waterfill

// Attention of a layer for all texts of a pass: new keys and values are put to those that are there, then every head of
// every text by itself.
#pragma once

#include "layer.hpp"

namespace waterfill {

// q and mixed [tokens][heads * head_dim], k and v [tokens][kv_heads * head_dim], of all texts; of those that are coded,
// k and v are rounded to the layer's cache_dtype.
void attention(const Functions& f, const wf_layer& layer, int number, const Pass& pass, const float* q, float* k,
               float* v, float* mixed);

}  // namespace waterfill

// Decoder layers of the Llama kind for consecutive tokens of one or several texts.
#pragma once

#include "product.hpp"

namespace waterfill {

// What all layers of a pass share.
struct Pass {
    const wf_sequence* sequences;  // one after the other, [texts]
    int64_t texts, tokens;         // tokens of all
    const float *cosine, *sine;    // [tables][tokens][head_dim]
    wf_product product;            // or null, where matrices are in memory
    void* context;
};

// hidden [tokens][hidden] in place. Whatever `product` returns other than 0 ends the layer and is returned.
int run_layer(const Functions& f, const wf_layer& layer, int number, const Pass& pass, float* hidden);

// RMS norm of each row [width], with a weight of `dtype`.
void normalise(const Functions& f, const float* x, int64_t rows, int64_t width, const void* weight, int dtype,
               float epsilon, float* y);

}  // namespace waterfill

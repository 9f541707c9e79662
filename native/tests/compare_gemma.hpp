// What layers may have beside those of a Llama: norms of what is added, GELU, a window, another rotary table.
#pragma once

#include <cstdint>
#include <vector>

#include "../include/waterfill_native.h"

// The same matrices with all of that but the table. The window is shorter than what attention reads at once.
inline wf_layer with_options(wf_layer layer) {
    layer.o_norm = layer.input_norm;
    layer.down_norm = layer.post_norm;
    layer.window = 3;
    layer.activation = WF_GELU_TANH;
    return layer;
}

// Two tokens through one layer, with so many equal rotary tables: hidden states, or nothing where that is refused.
inline std::vector<float> two_tokens(int isa, const wf_layer& layer, int tables) {
    const int64_t d = layer.head_dim, cache = layer.kv_heads * 2 * d;
    std::vector<float> x(size_t(2 * layer.hidden)), out(x.size()), keys(static_cast<size_t>(cache)), values(keys);
    for (size_t i = 0; i < x.size(); ++i) x[i] = float(int(i * 7 % 11) - 5);
    std::vector<float> cosine(size_t(2 * 2 * d), 0.6f), sine(size_t(2 * 2 * d), 0.8f);
    void *k = keys.data(), *v = values.data();
    const wf_sequence text{2, 0, 2, &k, &v, 1, cache * (layer.cache_dtype == WF_FLOAT32 ? 4 : 2)};
    const int status = wf_run_layers(isa, &layer, 1, &text, 1, x.data(), 2, tables, cosine.data(), sine.data(),
                                     layer.input_norm, out.data(), nullptr, nullptr);
    return status ? std::vector<float>{} : out;
}

// `expect(bool, const char*)`.
template <class Expect>
void expect_options(int isa, const wf_layer& layer, Expect expect) {
    wf_layer second = layer;
    second.rotary = 1;
    const auto plain = two_tokens(isa, layer, 1);
    expect(!plain.empty() && plain == two_tokens(isa, second, 2), "layers, the second table");
    expect(two_tokens(isa, second, 1).empty(), "layers, a table that is not there");
    expect(two_tokens(isa, layer, 0).empty(), "layers, no table");
    wf_layer options = with_options(layer);
    options.activation = WF_SILU;
    expect(two_tokens(isa, with_options(layer), 1) != two_tokens(isa, options, 1), "layers, an activation that counts");
    wf_layer lies[] = {layer, layer, layer, layer};
    lies[0].window = -1, lies[1].rotary = -1, lies[2].activation = 2, lies[3].activation = -1;
    for (const auto& lie : lies) expect(two_tokens(isa, lie, 1).empty(), "layers, an option that cannot be");
}

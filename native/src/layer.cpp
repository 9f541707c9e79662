#include "layer.hpp"

#include <algorithm>

#include "attention.hpp"
#include "layout.hpp"
#include "pool.hpp"

namespace waterfill {
namespace {

void add(const float* x, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] += x[i];
}

const float* floats(const void* x, int dtype, int64_t count) {  // in memory that the next call of the thread reuses
    float* out = scratch_floats(kConstants, count);
    to_float(x, dtype, 0, count, out);
    return out;
}

// [tokens][heads][head_dim]: normalised where the model does that, then rotated by position (half against half).
void place(const Functions& f, const wf_layer& layer, const wf_vector& norm, const Pass& pass, int64_t count,
           float* heads) {
    const int64_t d = layer.head_dim, half = d / 2;
    const float* weight = norm.numbers ? floats(norm.numbers, layer.dtype, d) : nullptr;
    const int64_t table = layer.rotary * pass.tokens * d;
    for (int64_t t = 0; t < pass.tokens; ++t) {
        const float *cosine = pass.cosine + table + t * d, *sine = pass.sine + table + t * d;
        for (int64_t h = 0; h < count; ++h, heads += d) {
            if (weight) f.rms_norm(heads, weight, layer.epsilon, d, heads);
            for (int64_t i = 0; i < half; ++i) {
                const float a = heads[i], b = heads[half + i];
                heads[i] = a * cosine[i] - b * sine[i];
                heads[half + i] = b * cosine[half + i] + a * sine[half + i];
            }
        }
    }
}

// The layer's matrices in order; those of one product are consecutive.
enum { kQ, kK, kV, kO, kGate, kUp, kDown };

}  // namespace

void normalise(const Functions& f, const float* x, int64_t rows, int64_t width, const void* weight, int dtype,
               float epsilon, float* y) {
    const float* w = floats(weight, dtype, width);
    each_row(rows, width, [&](int64_t r) { f.rms_norm(x + r * width, w, epsilon, width, y + r * width); });
}

int run_layer(const Functions& f, const wf_layer& layer, int number, const Pass& pass, float* x) {
    const int64_t tokens = pass.tokens, hidden = layer.hidden, inner = layer.gate->rows;
    const int64_t q_size = layer.heads * layer.head_dim, kv_size = layer.kv_heads * layer.head_dim;
    float* memory = scratch_floats(kLayer, tokens * (hidden + 2 * q_size + 2 * kv_size + 2 * inner));
    auto take = [&](int64_t count) { return memory += tokens * count, memory - tokens * count; };
    float *y = take(hidden), *q = take(q_size), *mixed = take(q_size), *k = take(kv_size), *v = take(kv_size),
          *gate = take(inner), *up = take(inner);
    const wf_matrix* const matrices[] = {layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down};
    auto multiply = [&](int first, int count, const float* in, std::initializer_list<float*> out) {
        if (pass.product) {
            int status = WF_UNANSWERED;
            pass.product(pass.context, number, first, count, in, tokens, out.begin(), &status);
            return status;
        }
        void* results[3] = {};
        std::copy(out.begin(), out.end(), results);
        products(f, matrices + first, count, in, WF_FLOAT32, tokens, results);
        return 0;
    };
    auto add_bias = [&](const wf_vector& bias, float* to) {
        if (!bias.numbers) return;
        const float* numbers = floats(bias.numbers, layer.dtype, bias.count);
        for (int64_t t = 0; t < tokens; ++t) add(numbers, bias.count, to + t * bias.count);
    };
    auto add_to_x = [&](const wf_vector& norm) {  // y, normalised where the model does that
        if (norm.numbers) normalise(f, y, tokens, hidden, norm.numbers, layer.dtype, layer.epsilon, y);
        add(y, tokens * hidden, x);
    };

    normalise(f, x, tokens, hidden, layer.input_norm.numbers, layer.dtype, layer.epsilon, y);
    if (const int status = multiply(kQ, 3, y, {q, k, v})) return status;
    add_bias(layer.q_bias, q);
    add_bias(layer.k_bias, k);
    add_bias(layer.v_bias, v);
    place(f, layer, layer.q_norm, pass, layer.heads, q);
    place(f, layer, layer.k_norm, pass, layer.kv_heads, k);
    attention(f, layer, number, pass, q, k, v, mixed);
    if (const int status = multiply(kO, 1, mixed, {y})) return status;
    add_bias(layer.o_bias, y);
    add_to_x(layer.o_norm);

    normalise(f, x, tokens, hidden, layer.post_norm.numbers, layer.dtype, layer.epsilon, y);
    if (const int status = multiply(kGate, 2, y, {gate, up})) return status;
    const auto gated = layer.activation == WF_SILU ? f.swiglu : f.geglu;
    each_row(tokens, inner, [&](int64_t t) { gated(gate + t * inner, up + t * inner, inner, gate + t * inner); });
    if (const int status = multiply(kDown, 1, gate, {y})) return status;
    add_to_x(layer.down_norm);
    return 0;
}

}  // namespace waterfill

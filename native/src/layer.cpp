#include "layer.hpp"

#include <algorithm>

#include "pool.hpp"

namespace waterfill {
namespace {

void add(const float* x, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] += x[i];
}

void product(const Functions& f, std::initializer_list<const wf_matrix*> matrices, const float* x,
             std::initializer_list<void*> y) {
    products(f, matrices.begin(), int(matrices.size()), x, WF_FLOAT32, 1, y.begin());
}

// Heads [count][head_dim]: normalised where the model does that, then rotated by position (half against half).
void place(const Functions& f, const wf_layer& layer, const float* norm, const float* cosine, const float* sine,
           int64_t count, float* heads) {
    const int64_t d = layer.head_dim, half = d / 2;
    for (int64_t h = 0; h < count; ++h, heads += d) {
        if (norm) f.rms_norm(heads, norm, layer.epsilon, d, heads);
        for (int64_t i = 0; i < half; ++i) {
            const float a = heads[i], b = heads[half + i];
            heads[i] = a * cosine[i] - b * sine[i];
            heads[half + i] = b * cosine[half + i] + a * sine[half + i];
        }
    }
}

}  // namespace

void decode_layer(const Functions& f, const wf_layer& layer, const void* in, const void* cosine, const void* sine,
                  void* keys, void* values, int64_t capacity, int64_t position, void* out) {
    const int64_t hidden = layer.hidden, inner = layer.gate->rows, d = layer.head_dim;
    const int64_t q_size = layer.heads * d, kv_size = layer.kv_heads * d, number = layer.dtype == WF_FLOAT32 ? 4 : 2;
    const int64_t constant_size = std::max({hidden, q_size, kv_size});
    float* memory = scratch_floats(kLayer, constant_size + 2 * hidden + 2 * q_size + 2 * kv_size + 3 * inner + 2 * d);
    auto take = [&memory](int64_t count) { return memory += count, memory - count; };
    float *constant = take(constant_size), *x = take(hidden), *y = take(hidden), *q = take(q_size),
          *mixed = take(q_size), *k = take(kv_size), *v = take(kv_size), *gate = take(inner), *up = take(inner),
          *active = take(inner), *c = take(d), *s = take(d);
    auto floats = [&](const void* of, int64_t count) {  // one at a time
        to_float(of, layer.dtype, 0, count, constant);
        return constant;
    };
    auto add_bias = [&](const void* bias, int64_t count, float* to) {
        if (bias) add(floats(bias, count), count, to);
    };
    to_float(in, layer.dtype, 0, hidden, x);
    to_float(cosine, layer.dtype, 0, d, c);
    to_float(sine, layer.dtype, 0, d, s);

    f.rms_norm(x, floats(layer.input_norm, hidden), layer.epsilon, hidden, y);
    product(f, {layer.q, layer.k, layer.v}, y, {q, k, v});
    add_bias(layer.q_bias, q_size, q);
    add_bias(layer.k_bias, kv_size, k);
    add_bias(layer.v_bias, kv_size, v);
    place(f, layer, layer.q_norm ? floats(layer.q_norm, d) : nullptr, c, s, layer.heads, q);
    place(f, layer, layer.k_norm ? floats(layer.k_norm, d) : nullptr, c, s, layer.kv_heads, k);

    const int64_t shared = layer.heads / layer.kv_heads, positions = position + 1;
    auto* key_bytes = static_cast<uint8_t*>(keys);
    auto* value_bytes = static_cast<uint8_t*>(values);
    auto one_head = [&](int64_t h) {
        const int64_t head = h * capacity * d * number, at = head + position * d * number;
        from_float(k + h * d, layer.dtype, 0, d, key_bytes + at);
        from_float(v + h * d, layer.dtype, 0, d, value_bytes + at);
        const Attention attention{d, shared, positions, layer.scaling, layer.dtype != WF_FLOAT32, key_bytes + head,
                                  value_bytes + head, q + h * shared * d, mixed + h * shared * d};
        f.attend(attention, scratch_floats(kScores, shared * positions));
    };
    if (positions * q_size < (1 << 16))  // not worth waking a thread
        for (int64_t h = 0; h < layer.kv_heads; ++h) one_head(h);
    else
        parallel(layer.kv_heads, one_head);
    product(f, {layer.o}, mixed, {y});
    add_bias(layer.o_bias, hidden, y);
    add(y, hidden, x);

    f.rms_norm(x, floats(layer.post_norm, hidden), layer.epsilon, hidden, y);
    product(f, {layer.gate, layer.up}, y, {gate, up});
    f.swiglu(gate, up, inner, active);
    product(f, {layer.down}, active, {y});
    add(y, hidden, x);
    from_float(x, layer.dtype, 0, hidden, out);
}

}  // namespace waterfill

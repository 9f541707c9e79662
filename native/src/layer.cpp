#include "layer.hpp"

#include <algorithm>

#include "layout.hpp"
#include "pool.hpp"

namespace waterfill {
namespace {

constexpr int64_t kAttentionTokens = 8;  // of one task: they share the conversion of keys and values

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
    for (int64_t t = 0; t < pass.tokens; ++t) {
        const float *cosine = pass.cosine + t * d, *sine = pass.sine + t * d;
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

void attention(const Functions& f, const wf_layer& layer, const Pass& pass, const float* q, const float* k,
               const float* v, void* keys, void* values, float* mixed) {
    const int64_t d = layer.head_dim, shared = layer.heads / layer.kv_heads,
                  number = layer.cache_dtype == WF_FLOAT32 ? 4 : 2;
    const int64_t q_size = layer.heads * d, kv_size = layer.kv_heads * d, positions = pass.position + pass.tokens;
    auto head = [&](void* cache, int64_t h) { return static_cast<uint8_t*>(cache) + h * pass.capacity * d * number; };
    for (int64_t h = 0; h < layer.kv_heads; ++h)
        for (int64_t t = 0; t < pass.tokens; ++t) {
            const int64_t from = t * kv_size + h * d, to = (pass.position + t) * d;
            from_float(k + from, layer.cache_dtype, to, d, head(keys, h));
            from_float(v + from, layer.cache_dtype, to, d, head(values, h));
        }
    const int64_t blocks = ceil_div(pass.tokens, kAttentionTokens);
    auto task = [&](int64_t i) {
        const int64_t h = i % layer.kv_heads, first = i / layer.kv_heads * kAttentionTokens;
        const int64_t tokens = least(kAttentionTokens, pass.tokens - first), at = first * q_size + h * shared * d;
        const Attention one{d,
                            shared,
                            tokens,
                            pass.position + first + 1,
                            q_size,
                            layer.scaling,
                            layer.cache_dtype != WF_FLOAT32,
                            head(keys, h),
                            head(values, h),
                            q + at,
                            mixed + at};
        f.attend(one, scratch_floats(kScores, tokens * shared * (one.positions + tokens - 1)));
    };
    if (positions * pass.tokens * q_size < (1 << 16))  // not worth waking a thread
        for (int64_t i = 0; i < layer.kv_heads * blocks; ++i) task(i);
    else
        parallel(layer.kv_heads * blocks, task);
}

// The layer's matrices in order; those of one product are consecutive.
enum { kQ, kK, kV, kO, kGate, kUp, kDown };

}  // namespace

void normalise(const Functions& f, const float* x, int64_t rows, int64_t width, const void* weight, int dtype,
               float epsilon, float* y) {
    const float* w = floats(weight, dtype, width);
    each_row(rows, width, [&](int64_t r) { f.rms_norm(x + r * width, w, epsilon, width, y + r * width); });
}

int run_layer(const Functions& f, const wf_layer& layer, int number, const Pass& pass, float* x, void* keys,
              void* values) {
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

    normalise(f, x, tokens, hidden, layer.input_norm.numbers, layer.dtype, layer.epsilon, y);
    if (const int status = multiply(kQ, 3, y, {q, k, v})) return status;
    add_bias(layer.q_bias, q);
    add_bias(layer.k_bias, k);
    add_bias(layer.v_bias, v);
    place(f, layer, layer.q_norm, pass, layer.heads, q);
    place(f, layer, layer.k_norm, pass, layer.kv_heads, k);
    attention(f, layer, pass, q, k, v, keys, values, mixed);
    if (const int status = multiply(kO, 1, mixed, {y})) return status;
    add_bias(layer.o_bias, y);
    add(y, tokens * hidden, x);

    normalise(f, x, tokens, hidden, layer.post_norm.numbers, layer.dtype, layer.epsilon, y);
    if (const int status = multiply(kGate, 2, y, {gate, up})) return status;
    each_row(tokens, inner, [&](int64_t t) { f.swiglu(gate + t * inner, up + t * inner, inner, gate + t * inner); });
    if (const int status = multiply(kDown, 1, gate, {y})) return status;
    add(y, tokens * hidden, x);
    return 0;
}

}  // namespace waterfill

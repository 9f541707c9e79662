#include "layer.hpp"

#include <algorithm>
#include <vector>

#include "layout.hpp"
#include "pool.hpp"

namespace waterfill {
namespace {

constexpr int64_t kAttentionTokens = 8;            // of one task: they share the conversion of keys and values
constexpr int64_t kEverything = int64_t(1) << 48;  // more positions than there are

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

struct Keep {  // of keys and values of one layer and text: where those of a head lie
    const wf_layer& layer;
    const wf_sequence& text;
    int number;
    int64_t offset(int64_t h, int64_t position) const {
        return (h * text.capacity + position) * layer.head_dim * (layer.cache_dtype == WF_FLOAT32 ? 4 : 2);
    }
    void* keys(int64_t h, int64_t from = 0) const { return static_cast<uint8_t*>(text.keys[number]) + offset(h, from); }
    void* values(int64_t h, int64_t from = 0) const {
        return static_cast<uint8_t*>(text.values[number]) + offset(h, from);
    }
};

// New tokens' k and v [tokens][kv_heads][head_dim] behind those of a text that are there.
void append(const Keep& keep, const float* k, const float* v) {
    const int64_t d = keep.layer.head_dim, size = keep.layer.kv_heads * d;
    for (int64_t h = 0; h < keep.layer.kv_heads; ++h)
        for (int64_t t = 0; t < keep.text.tokens; ++t) {
            const int64_t from = t * size + h * d, to = (keep.text.position + t) * d;
            from_float(k + from, keep.layer.cache_dtype, to, d, keep.keys(h));
            from_float(v + from, keep.layer.cache_dtype, to, d, keep.values(h));
        }
}

// A head of a text's keys and values with some of its tokens, whose queries begin at token `start` of the pass.
void attend(const Functions& f, const Keep& keep, int64_t h, int64_t first, int64_t start, const float* q,
            float* mixed) {
    const wf_layer& layer = keep.layer;
    const int64_t d = layer.head_dim, shared = layer.heads / layer.kv_heads, q_size = layer.heads * d;
    const int64_t tokens = least(kAttentionTokens, keep.text.tokens - first),
                  at = (start + first) * q_size + h * shared * d;
    const int64_t window = layer.window ? least(layer.window, kEverything) : kEverything;
    const int64_t seen = keep.text.position + first + 1, from = most(0, seen - window);  // by the first token
    const Attention one{d,
                        shared,
                        tokens,
                        seen - from,
                        window,
                        q_size,
                        layer.scaling,
                        layer.cache_dtype != WF_FLOAT32,
                        keep.keys(h, from),
                        keep.values(h, from),
                        q + at,
                        mixed + at};
    f.attend(one, scratch_floats(kScores, tokens * shared * (one.positions + tokens - 1)));
}

// Every text by itself; the tasks of all are shared among the threads together.
void attention(const Functions& f, const wf_layer& layer, int number, const Pass& pass, const float* q, const float* k,
               const float* v, float* mixed) {
    const int64_t q_size = layer.heads * layer.head_dim, kv_size = layer.kv_heads * layer.head_dim;
    struct Task {
        int64_t text, start, head, first;
    };
    std::vector<Task> tasks;
    int64_t start = 0, work = 0;
    for (int64_t i = 0; i < pass.texts; start += pass.sequences[i++].tokens) {
        const wf_sequence& text = pass.sequences[i];
        append({layer, text, number}, k + start * kv_size, v + start * kv_size);
        for (int64_t first = 0; first < text.tokens; first += kAttentionTokens)
            for (int64_t h = 0; h < layer.kv_heads; ++h) tasks.push_back({i, start, h, first});
        work += (text.position + text.tokens) * text.tokens * q_size;
    }
    auto task = [&](int64_t i) {
        const Task& t = tasks[size_t(i)];
        attend(f, {layer, pass.sequences[t.text], number}, t.head, t.first, t.start, q, mixed);
    };
    if (work < (1 << 16))  // not worth waking a thread
        for (int64_t i = 0; i < int64_t(tasks.size()); ++i) task(i);
    else
        parallel(int64_t(tasks.size()), task);
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

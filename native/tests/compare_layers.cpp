// Decoder layers: token by token, in one pass, with products elsewhere, several texts together; lies are refused.
#include "compare.hpp"
#include "compare_gemma.hpp"

#include <cstring>

namespace {

// The products of `run_layers`, as a caller with matrices elsewhere computes them.
struct Elsewhere {
    int isa;
    const wf_layer* layer;
};

void multiply_elsewhere(void* context, int, int first, int count, const float* x, int64_t tokens, float* const* y,
                        int* status) {
    const auto& own = *static_cast<const Elsewhere*>(context);
    void* results[3] = {};
    for (int i = 0; i < count; ++i) results[i] = y[i];
    *status = wf_matmul(own.isa, &own.layer->q + first, count, x, WF_FLOAT32, tokens, results);
}

// Two layers, which share their weights, and thirteen tokens: in one pass, one by one, and with products elsewhere.
void expect_same_in_one_pass(int isa, const wf_layer& layer) {
    constexpr int64_t tokens = 13, before = 5, capacity = before + tokens;
    const int64_t number = layer.cache_dtype == WF_FLOAT32 ? 4 : 2;
    const wf_layer layers[] = {layer, layer};
    const int64_t hidden = layer.hidden, d = layer.head_dim, cache = layer.kv_heads * capacity * d;
    auto numbers = [](int64_t count) {
        std::vector<float> x(static_cast<size_t>(count));
        for (auto& v : x) v = float(int32_t(rng())) * 4.6e-10f;
        return x;
    };
    const auto start = numbers(tokens * hidden), cosine = numbers(tokens * d), sine = numbers(tokens * d);
    std::vector<float> filled = numbers(4 * cache);
    for (auto& v : filled) std::memset(reinterpret_cast<char*>(&v), 0, 2);  // two halves that are numbers
    const Elsewhere elsewhere{isa, &layer};
    std::vector<float> expected;
    for (int way = 0; way < 3; ++way) {
        auto x = start, memory = filled, out = numbers(tokens * hidden);
        void *keys[] = {memory.data(), memory.data() + cache},
             *values[] = {memory.data() + 2 * cache, memory.data() + 3 * cache};
        const int64_t each = way == 0 ? 1 : tokens;
        for (int64_t t = 0; t < tokens; t += each) {
            const wf_sequence text{each, before + t, capacity, keys, values, 2, cache * number};
            if (wf_run_layers(isa, layers, 2, &text, 1, x.data() + t * hidden, each, 1, cosine.data() + t * d,
                              sine.data() + t * d, layer.input_norm, out.data() + t * hidden,
                              way == 2 ? multiply_elsewhere : nullptr, const_cast<Elsewhere*>(&elsewhere)))
                std::abort();
        }
        out.insert(out.end(), memory.begin(), memory.end());
        if (way == 0) expected = out;
        expect(!std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)),
               std::string(wf_isa(isa)) + " layers, way " + std::to_string(way));
    }
    void *keys[] = {filled.data(), filled.data() + cache},
         *values[] = {filled.data() + 2 * cache, filled.data() + 3 * cache};
    const wf_sequence sound{2, 0, capacity, keys, values, 2, cache * number};
    auto refused_texts = [&](std::vector<wf_sequence> texts, int64_t rows) {
        return wf_run_layers(isa, layers, 2, texts.data(), int64_t(texts.size()), filled.data(), rows, 1, cosine.data(),
                             sine.data(), layer.input_norm, filled.data(), nullptr, nullptr) < 0;
    };
    auto refused = [&](const wf_layer& other, wf_vector final_norm, int64_t position) {
        const wf_layer both[] = {layer, other};
        wf_sequence text = sound;
        text.position = position;
        return wf_run_layers(isa, both, 2, &text, 1, filled.data(), 2, 1, cosine.data(), sine.data(), final_norm,
                             filled.data(), nullptr, nullptr) < 0;
    };
    expect(refused(layer, layer.input_norm, capacity - 1), "layers, a cache with room for one");
    expect(refused(layer, layer.input_norm, -1), "layers, a position before the first");
    expect(refused_texts({sound, sound}, 4), "layers, two texts in one memory");
    expect(refused_texts({sound}, 3) && refused_texts({sound}, 1), "layers, another number of tokens");
    for (int64_t wf_sequence::* field : {&wf_sequence::tokens, &wf_sequence::layers, &wf_sequence::bytes}) {
        wf_sequence lie = sound;
        lie.*field -= 1;
        expect(refused_texts({lie}, 2), "layers, a text that lies");
    }
    wf_sequence vast = sound;
    vast.tokens = vast.capacity = INT64_MAX;
    expect(refused_texts({vast}, 2) && refused_texts({vast}, INT64_MAX), "layers, a text beyond all memory");
    expect(refused_texts({}, 0), "layers, no text");
    const wf_vector short_norm{layer.input_norm.numbers, hidden - 1};
    expect(refused(layer, short_norm, 0), "layers, a short last norm");
    for (int i = 0; i < 10; ++i) {
        wf_layer lie = layer;
        wf_vector& vector = (&lie.input_norm)[i];
        if (!vector.numbers) continue;
        vector.count -= 1;
        expect(refused(lie, layer.input_norm, 0), "layers, a short vector " + std::to_string(i));
    }
    wf_matrix small = *layer.down;
    small.codes_bytes = small.codes_bytes / 2 - 1;
    wf_layer lie = layer;
    lie.down = &small;
    expect(refused(lie, layer.input_norm, 0), "layers, a small matrix");
}

// Three texts in one pass, of other lengths and behind other positions, beside one after another.
void expect_same_together(int isa, const wf_layer& layer) {
    constexpr int64_t counts[] = {9, 1, 3}, before[] = {0, 21, 4}, tokens = 13, capacity = 24;
    const int64_t hidden = layer.hidden, d = layer.head_dim, cache = layer.kv_heads * capacity * d;
    auto numbers = [](int64_t count) {
        std::vector<float> x(static_cast<size_t>(count));
        for (auto& v : x) v = float(int32_t(rng())) * 4.6e-10f;
        for (auto& v : x) std::memset(reinterpret_cast<char*>(&v), 0, 2);
        return x;
    };
    const auto start = numbers(tokens * hidden), cosine = numbers(tokens * d), sine = numbers(tokens * d);
    const auto filled = numbers(6 * cache);
    std::vector<float> results[2];
    for (auto& found : results) {
        auto x = start, memory = filled, out = numbers(tokens * hidden);
        void *keys[3], *values[3];
        std::vector<wf_sequence> texts;
        for (int i = 0; i < 3; ++i) {
            keys[i] = memory.data() + 2 * i * cache, values[i] = memory.data() + (2 * i + 1) * cache;
            texts.push_back({counts[i], before[i], capacity, keys + i, values + i, 1,
                             cache * (layer.cache_dtype == WF_FLOAT32 ? 4 : 2)});
        }
        const bool together = &found == results;
        for (int64_t i = 0, at = 0; i < (together ? 1 : 3); at += counts[i++])
            if (wf_run_layers(isa, &layer, 1, &texts[size_t(i)], together ? 3 : 1, x.data() + at * hidden,
                              together ? tokens : counts[i], 1, cosine.data() + at * d, sine.data() + at * d,
                              layer.input_norm, out.data() + at * hidden, nullptr, nullptr))
                std::abort();
        found = out;
        found.insert(found.end(), memory.begin(), memory.end());
    }
    expect(!std::memcmp(results[0].data(), results[1].data(), results[0].size() * sizeof(float)),
           std::string(wf_isa(isa)) + " layers, texts together");
}

// A decoder layer with eight random matrices' worth of memory, on one instruction set; returns hidden states and cache.
std::vector<float> layer_on(int isa, int dtype, bool biases) {
    std::mt19937 own(7);
    auto numbers = [&](size_t count, float by) {  // of `dtype`, in the memory of floats
        std::vector<float> x(count);
        for (auto& v : x) v = float(int32_t(own())) * 4.6e-10f * by;
        if (dtype == WF_BFLOAT16) {
            std::vector<uint16_t> half(count);
            for (size_t i = 0; i < count; ++i) std::memcpy(&half[i], reinterpret_cast<char*>(&x[i]) + 2, 2);
            std::memcpy(x.data(), half.data(), 2 * count);
        }
        return x;
    };
    constexpr int64_t hidden = 172, heads = 6, kv_heads = 2, d = 20, inner = 300, capacity = 40, position = 37;
    const Grid grid{1, 16, 8};
    std::vector<int16_t> units(16);
    std::vector<float> points(16);
    for (int i = 0; i < 16; ++i) units[size_t(i)] = int16_t(15 * i - 112), points[size_t(i)] = float(units[size_t(i)]);
    const int64_t shapes[7][2] = {{heads * d, hidden}, {kv_heads * d, hidden}, {kv_heads * d, hidden},
                                  {hidden, heads * d}, {inner, hidden},        {inner, hidden},
                                  {hidden, inner}};
    std::vector<Arranged*> kept;
    for (const auto& shape : shapes) {
        const int64_t row_bytes = (shape[1] + 1) / 2;
        std::vector<uint8_t> stored(size_t(shape[0] * row_bytes));
        for (auto& byte : stored) byte = uint8_t(own());
        const std::vector<uint16_t> factors(size_t(shape[0]), 0x2400);
        kept.push_back(new Arranged(isa, grid, shape[0], shape[1], units, points, stored, factors, row_bytes));
    }
    auto input_norm = numbers(hidden, 1), post_norm = numbers(hidden, 1), head_norm = numbers(d, 1),
         bias = numbers(300, 1);
    auto in = numbers(hidden, 1), cosine = numbers(d, 1), sine = numbers(d, 1), out = numbers(hidden, 1);
    auto keys = numbers(kv_heads * capacity * d, 1), values = numbers(kv_heads * capacity * d, 1);
    auto vector = [](const std::vector<float>& x, int64_t count) { return wf_vector{x.data(), count}; };
    auto maybe = [&](const std::vector<float>& x, int64_t count) {
        return biases ? vector(x, count) : wf_vector{nullptr, 0};
    };
    const wf_vector norm = maybe(head_norm, d), q_bias = maybe(bias, heads * d), kv_bias = maybe(bias, kv_heads * d);
    const wf_layer layer{hidden,
                         heads,
                         kv_heads,
                         d,
                         1e-5f,
                         0.2f,
                         dtype,
                         dtype,
                         &kept[0]->matrix,
                         &kept[1]->matrix,
                         &kept[2]->matrix,
                         &kept[3]->matrix,
                         &kept[4]->matrix,
                         &kept[5]->matrix,
                         &kept[6]->matrix,
                         vector(input_norm, hidden),
                         vector(post_norm, hidden),
                         norm,
                         norm,
                         q_bias,
                         kv_bias,
                         kv_bias,
                         maybe(bias, hidden)};
    if (wf_decode_layer(isa, &layer, in.data(), cosine.data(), sine.data(), keys.data(), values.data(), capacity,
                        position, out.data()))
        std::abort();
    if (!wf_decode_layer(isa, &layer, in.data(), cosine.data(), sine.data(), keys.data(), values.data(), capacity,
                         capacity, out.data()))
        std::abort();  // the cache is full
    expect_same_in_one_pass(isa, layer);
    expect_same_together(isa, layer);
    const wf_layer options = with_options(layer);
    expect_same_in_one_pass(isa, options);
    expect_same_together(isa, options);
    expect_options(isa, layer, [](bool good, const char* what) { expect(good, what); });
    auto more = out;
    if (wf_decode_layer(isa, &options, in.data(), cosine.data(), sine.data(), keys.data(), values.data(), capacity,
                        position, more.data()))
        std::abort();
    out.insert(out.end(), more.begin(), more.end());
    for (auto* x : kept) delete x;
    out.insert(out.end(), keys.begin(), keys.end());
    out.insert(out.end(), values.begin(), values.end());
    return out;
}

}  // namespace

void compare_layers(int isa, int scalar, int dtype, bool biases) {
    const auto x = layer_on(isa, dtype, biases), y = layer_on(scalar, dtype, biases);
    expect(!std::memcmp(x.data(), y.data(), x.size() * sizeof(float)), "layer " + std::to_string(dtype));
}

// Every instruction set of this machine against the scalar code, to the bit: products, rows and rotations of random
// matrices in shapes chosen to hit every remainder. Run under the sanitizers and, for NEON, under qemu.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../include/waterfill_native.h"
#include "compare_gemma.hpp"

namespace {

std::mt19937 rng(1);
int failures = 0;

void expect(bool holds, const std::string& what) {
    if (holds) return;
    std::fprintf(stderr, "differs: %s\n", what.c_str());
    ++failures;
}

int bits_of(int n) {
    int bits = 0;
    while ((1 << bits) < n) ++bits;
    return bits;
}

struct Grid {
    int p, n, precision;
    int digits = 0, word_bytes = 0;  // of radix words, or bit fields
};

int64_t row_bytes_of(const Grid& g, int64_t width) {
    const int64_t count = (width + g.p - 1) / g.p;
    if (!g.digits) return (count * bits_of(g.n) + 7) / 8;
    uint64_t most = 1;  // of the last word, which takes the bytes that it needs
    for (int64_t i = 0; i < count % g.digits; ++i) most *= uint64_t(g.n);
    int64_t bytes = count / g.digits * g.word_bytes;
    for (--most; most; most >>= 8) ++bytes;
    return bytes;
}

struct Arranged {
    wf_table* table;
    std::vector<uint8_t> codes;
    std::vector<uint16_t> scales;
    wf_matrix matrix;

    Arranged(int isa, const Grid& g, int64_t rows, int64_t width, const std::vector<int16_t>& units,
             const std::vector<float>& points, const std::vector<uint8_t>& stored, const std::vector<uint16_t>& factors,
             int64_t row_bytes)
        : table(wf_table_new(isa, g.p, g.n, g.precision, units.data(), points.data())),
          codes(size_t(wf_codes_bytes(g.p, g.n, rows, width))),
          scales(size_t(wf_scales_count(rows, width))),
          matrix{rows,
                 width,
                 0.01f,
                 1.0f,
                 table,
                 stored.data(),
                 factors.data(),
                 int64_t(stored.size()),
                 int64_t(factors.size())} {
        if (wf_arrange(isa, &matrix, g.digits, g.word_bytes, row_bytes, codes.data(), scales.data())) std::abort();
        matrix.codes = codes.data(), matrix.codes_bytes = int64_t(codes.size());
        matrix.scales = scales.data(), matrix.scales_count = int64_t(scales.size());
    }
    ~Arranged() { wf_table_free(table); }
    Arranged(const Arranged&) = delete;
};

int64_t stream_rows(int64_t width) { return std::max<int64_t>(1, (1 << 18) / (4 * width)) * 4; }

int64_t groups_of(int64_t width) { return width < 1536 ? 1 : (width + 512) / 1024; }

// A chunk's product is that of the matrix, in columns of a wider result.
void expect_product(int isa, const wf_chunk& chunk, const std::vector<float>& x, int64_t tokens,
                    const std::vector<float>& y, const std::string& name) {
    const int64_t stride = chunk.rows + 3;
    std::vector<float> wide(size_t(tokens * stride));
    int64_t nanoseconds[2] = {};
    wf_flaw flaw{};
    wf_activations* prepared = wf_activations_new(isa, chunk.table, x.data(), WF_FLOAT32, tokens, chunk.width);
    const wf_task task{&chunk, prepared, wide.data(), stride};
    if (wf_multiply_chunks(isa, &task, 1, WF_FLOAT32, nullptr, nullptr, nanoseconds, &flaw)) std::abort();
    wf_activations_free(prepared);
    for (int64_t t = 0; t < tokens; ++t)
        expect(!std::memcmp(wide.data() + t * stride, y.data() + t * chunk.rows, size_t(chunk.rows) * sizeof(float)),
               name);
}

// Changes that make a matrix or a chunk ask for more than there is.
template <class Matrix>
std::vector<Matrix> lies_of(const Matrix& sound) {
    std::vector<Matrix> lies(7, sound);
    lies[0].rows += 4, lies[1].rows = 0, lies[2].rows = INT64_MAX;
    lies[3].width += 1536, lies[4].width = 0, lies[5].width = INT64_MAX;
    lies[6].scales_count -= 1;
    return lies;
}

void expect_lies_refused(int isa, const wf_matrix& sound, const std::string& name) {
    auto lies = lies_of(sound);
    lies.push_back(sound);
    lies.back().codes_bytes = sound.codes_bytes / 2 - 1;  // there may be room for pairs
    const std::vector<float> x(16);
    std::vector<float> y(16);
    void* result = y.data();
    const int64_t id = 0;
    for (const wf_matrix& lie : lies) {
        const wf_matrix* matrix = &lie;
        expect(wf_matmul(isa, &matrix, 1, x.data(), WF_FLOAT32, 1, &result) < 0, name + ", a lie to wf_matmul");
        expect(wf_matmul_float(isa, matrix, x.data(), WF_FLOAT32, 1, y.data()) < 0,
               name + ", a lie to wf_matmul_float");
        expect(wf_rows(isa, matrix, &id, 1, 0, y.data()) < 0, name + ", a lie to wf_rows");
    }
}

void expect_lies_refused(int isa, const wf_chunk& sound, const std::string& name) {
    auto lies = lies_of(sound);
    if (sound.states) lies[6].parts += 1;  // it has no scales
    auto lie = [&](auto change) { change(lies.emplace_back(sound)); };
    lie([](wf_chunk& c) { c.data_bytes = (c.states || c.row_bytes ? c.data_bytes : c.data_bytes / 2) - 1; });
    lie([](wf_chunk& c) { c.part_rows = c.states ? c.part_rows + 4 : 6; });
    lie([](wf_chunk& c) { c.states = c.states ? 3 : 8; });
    lie([](wf_chunk& c) { c.wide ^= c.states > 0, c.table = c.states ? c.table : nullptr; });
    if (sound.row_bytes) lie([](wf_chunk& c) { c.row_bytes += 1; });
    if (sound.row_bytes && sound.word_indices) lie([](wf_chunk& c) { c.word_indices += 64; });
    if (sound.row_bytes && sound.word_indices) lie([](wf_chunk& c) { c.word_bytes = 8; });
    uint8_t codes[16];
    uint16_t scales[16];
    for (const wf_chunk& c : lies) {
        wf_flaw flaw{};
        expect(wf_chunk_decode(isa, &c, codes, scales, &flaw) < 0, name + ", a lie to wf_chunk_decode");
        const std::vector<float> x(4096);
        std::vector<float> y(4096);
        int64_t nanoseconds[2] = {};
        wf_activations* prepared =
            wf_activations_new(isa, sound.table, x.data(), WF_FLOAT32, 1, std::min<int64_t>(sound.width, 4096));
        const wf_task task{&c, prepared, y.data(), 1};
        expect(wf_multiply_chunks(isa, &task, 1, WF_FLOAT32, nullptr, nullptr, nanoseconds, &flaw) < 0,
               name + ", a lie to wf_multiply_chunks");
        wf_activations_free(prepared);
    }
}

void compare(int isa, int scalar, const Grid& g, int64_t rows, int64_t width) {
    const int limit = g.precision == 8 ? 127 : 2047;
    std::vector<int16_t> units(size_t(g.n * g.p));
    std::vector<float> points(units.size());
    for (size_t i = 0; i < units.size(); ++i) {
        units[i] = int16_t(int(rng() % uint32_t(2 * limit + 1)) - limit);
        points[i] = 0.01f * float(units[i]);
    }
    const int64_t row_bytes = row_bytes_of(g, width);
    std::vector<uint8_t> stored(size_t(rows * row_bytes));
    for (auto& byte : stored) byte = uint8_t(rng());
    for (size_t i = 1; g.n == 1 << 16 && i < stored.size(); i += 2)
        stored[i] = uint8_t(0x78 + rng() % 16);  // of 12 bits
    std::vector<uint16_t> factors(size_t(rows * groups_of(width)));
    for (auto& factor : factors) factor = uint16_t(0x3000 + rng() % 0x1000);  // 0.125 to 2

    const Arranged a(isa, g, rows, width, units, points, stored, factors, row_bytes);
    const Arranged b(scalar, g, rows, width, units, points, stored, factors, row_bytes);
    const std::string name = std::string(wf_isa(isa)) + " p" + std::to_string(g.p) + " n" + std::to_string(g.n) + " " +
                             std::to_string(rows) + "x" + std::to_string(width);
    for (int64_t tokens : {1, 2, 3, 8, 17}) {
        std::vector<float> x(size_t(tokens * width)), y(size_t(tokens * rows)), z(y.size());
        for (auto& v : x) v = float(int32_t(rng())) * 1e-9f;
        void *py = y.data(), *pz = z.data();
        const wf_matrix *pa = &a.matrix, *pb = &b.matrix;
        if (wf_matmul(isa, &pa, 1, x.data(), WF_FLOAT32, tokens, &py)) std::abort();
        if (wf_matmul(scalar, &pb, 1, x.data(), WF_FLOAT32, tokens, &pz)) std::abort();
        expect(!std::memcmp(y.data(), z.data(), y.size() * sizeof(float)), name + " tokens " + std::to_string(tokens));
        wf_chunk chunk{rows,
                       width,
                       8,
                       0.01f,
                       1.0f,
                       a.table,
                       stored.data(),
                       factors.data(),
                       0,
                       0,
                       nullptr,
                       nullptr,
                       g.digits,
                       g.word_bytes,
                       row_bytes,
                       int64_t(stored.size()),
                       int64_t(factors.size()),
                       0};
        expect_product(isa, chunk, x, tokens, y, name + " as stored");
        if (tokens == 1) expect_lies_refused(isa, chunk, name + " as stored");
        chunk.data = a.codes.data(), chunk.scales = a.scales.data(), chunk.row_bytes = 0;
        chunk.data_bytes = int64_t(a.codes.size()), chunk.scales_count = int64_t(a.scales.size());
        expect_product(isa, chunk, x, tokens, y, name + " as arranged");
        if (tokens == 1) expect_lies_refused(isa, chunk, name + " as arranged");
    }
    expect_lies_refused(isa, a.matrix, name);
    std::vector<int64_t> ids = {rows - 1, 0, rows / 2};
    std::vector<float> u(size_t(3 * width)), v(u.size());
    if (wf_rows(isa, &a.matrix, ids.data(), 3, 0, u.data())) std::abort();
    if (wf_rows(scalar, &b.matrix, ids.data(), 3, 0, v.data())) std::abort();
    expect(!std::memcmp(u.data(), v.data(), u.size() * sizeof(float)), name + " rows");
}

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

// A stream of `rows` x `width` random symbols, written by hand with its table: docs/format.md.
std::vector<uint8_t> stream_of(int64_t rows, int64_t width, int lanes, int symbols, bool wide, bool levels) {
    std::vector<uint16_t> frequencies(256);
    int left = 4096;
    for (int s = 0; s < symbols; ++s) {
        const int most = left - (symbols - 1 - s);
        frequencies[size_t(s)] = uint16_t(s + 1 < symbols ? 1 + int(rng() % uint32_t(most / 3 + 1)) : left);
        left -= frequencies[size_t(s)];
    }
    const int64_t count = (rows * width + lanes - 1) / lanes * lanes, scale_count = rows * groups_of(width);
    std::vector<uint8_t> coded(static_cast<size_t>(count)), lot;
    for (int s = 0; s < symbols; ++s) lot.insert(lot.end(), frequencies[size_t(s)], uint8_t(s));
    for (auto& symbol : coded) symbol = lot[rng() % lot.size()];
    const int raw = wide ? 2 : 0;
    const float unit = 0.25f;
    std::vector<uint8_t> out = {uint8_t(1 | (levels ? 2 : 0) | raw << 4), uint8_t(symbols - 1), uint8_t(symbols / 2),
                                3};
    auto append = [&](const void* from, int64_t bytes) {
        const auto* at = static_cast<const uint8_t*>(from);
        out.insert(out.end(), at, at + bytes);
    };
    append(&unit, 4);
    for (int64_t i = 0; i < (3 * scale_count + 7) / 8; ++i) out.push_back(uint8_t(rng()));
    std::vector<uint8_t> table(size_t((12 * symbols + 7) / 8));
    for (int i = 0; i < 12 * symbols; ++i)
        table[size_t(i / 8)] |= uint8_t((frequencies[size_t(i / 12)] >> (i % 12) & 1) << (i % 8));
    append(table.data(), int64_t(table.size()));
    for (int s = 0; levels && s < symbols; ++s) out.push_back(uint8_t(rng() % 255 + 129));  // never -128
    for (int64_t i = 0; i < (raw * count + 7) / 8; ++i) out.push_back(uint8_t(rng()));
    std::vector<uint8_t> bytes(size_t(4 * lanes + 2 * count));
    const int64_t size =
        wf_rans_encode(coded.data(), count, lanes, frequencies.data(), bytes.data(), int64_t(bytes.size()));
    if (size < 0) std::abort();
    append(bytes.data(), size);
    return out;
}

int lanes_of(int64_t weights) {
    int lanes = 32;
    while (lanes > 1 && weights < lanes * 4096) lanes /= 2;
    return lanes;
}

// A chunk of one stream, whose levels and scales are known: its product is that of the levels.
void expect_streamed_product(int isa, int states, int64_t rows, int64_t width, bool wide,
                             const std::vector<uint8_t>& stream, const std::vector<uint8_t>& codes,
                             const std::vector<uint16_t>& scales, const std::string& name) {
    const Grid grid{1, wide ? 1 << 16 : 1 << 8, wide ? 16 : 8};
    std::vector<int16_t> units(static_cast<size_t>(grid.n));
    std::vector<float> points(units.size()), x(size_t(2 * width)), y(size_t(2 * rows));
    for (int i = 0; i < grid.n; ++i)
        units[size_t(i)] = int16_t(i - grid.n / 2), points[size_t(i)] = float(i - grid.n / 2);
    for (auto& v : x) v = float(int32_t(rng())) * 1e-9f;
    const Arranged levels(isa, grid, rows, width, units, points, codes, scales, width * (wide ? 2 : 1));
    const wf_matrix* matrix = &levels.matrix;
    void* result = y.data();
    if (wf_matmul(isa, &matrix, 1, x.data(), WF_FLOAT32, 2, &result)) std::abort();
    uint32_t end = uint32_t(stream.size());
    const wf_chunk chunk{rows,
                         width,
                         stream_rows(width),
                         0.01f,
                         1.0f,
                         levels.table,
                         stream.data(),
                         nullptr,
                         states,
                         wide,
                         &end,
                         nullptr,
                         0,
                         0,
                         0,
                         int64_t(stream.size()),
                         0,
                         1};
    expect_product(isa, chunk, x, 2, y, name + ", streamed");
    expect_lies_refused(isa, chunk, name + ", streamed");
    std::vector<uint8_t> arranged(levels.codes.size());
    std::vector<uint16_t> arranged_scales(levels.scales.size());
    wf_flaw flaw{9, 9, 9};
    expect(!wf_chunk_decode(isa, &chunk, arranged.data(), arranged_scales.data(), &flaw) && arranged == levels.codes &&
               arranged_scales == levels.scales,
           name + ", decoded");
    end -= 2;
    expect(wf_chunk_decode(isa, &chunk, arranged.data(), arranged_scales.data(), &flaw) == WF_FLAWED && !flaw.task &&
               !flaw.part && !flaw.changed,
           name + ", cut short");
}

// A matrix of so many streams that threads take several at a time: whole, and with one of them damaged. Streams of
// mixed numbers of symbols are not read in the same way, nor are rows that lanes do not divide.
void compare_many_streams(int isa, int scalar, int64_t width, int most_symbols) {
    constexpr int64_t count = 7, last = 70;
    const int64_t each = stream_rows(width), rows = (count - 1) * each + last;
    for (int states : {1, 8, 256}) {
        std::vector<uint8_t> arena(4 * count);
        for (int64_t i = 0; i < count; ++i) {
            const int symbols = i == 3 ? 1 : i % 2 ? most_symbols : 12;
            const auto stream = stream_of(i + 1 < count ? each : last, width, 32, symbols, false, false);
            arena.insert(arena.end(), stream.begin(), stream.end());
            const uint32_t end = uint32_t(arena.size());
            std::memcpy(arena.data() + 4 * i, &end, 4);
        }
        std::vector<uint8_t> codes[2];
        std::vector<uint16_t> scales[2];
        auto decode = [&](int on, int which) {
            codes[which].assign(size_t(rows * width), 0);
            scales[which].assign(size_t(rows * groups_of(width)), 0);
            return wf_trellis_decode(on, states, 0, arena.data(), int64_t(arena.size()), rows, width,
                                     codes[which].data(), scales[which].data());
        };
        const std::string name = std::to_string(count) + " streams of up to " + std::to_string(most_symbols) +
                                 " symbols, width " + std::to_string(width) + ", " + std::to_string(states) + " states";
        expect(!decode(isa, 0) && !decode(scalar, 1) && codes[0] == codes[1] && scales[0] == scales[1], name);
        for (int64_t damaged : {0, 1, 5}) {
            uint32_t end;
            std::memcpy(&end, arena.data() + 4 * damaged, 4);
            arena[end - 1] ^= 0x80;  // bits that only choose between symbols would give another good stream
            expect(decode(isa, 0) == -3 - damaged && decode(scalar, 1) == -3 - damaged, name + ", one damaged");
            arena[end - 1] ^= 0x80;
        }
    }
}

// Chunks that arrive one after another, or several at a time, and are done with in the same order.
struct Arriving {
    int64_t count, finished = 0, ready = 0;
    bool good = true;
    std::minstd_rand chance{1};  // asked as often as threads need: not the generator of everything else

    static void answer(void* context, int64_t finished, int wait, int64_t* count) {
        auto& a = *static_cast<Arriving*>(context);
        a.good &= finished >= a.finished && finished <= a.ready && (!wait || finished == a.ready);
        a.finished = finished;
        a.ready = std::min(a.count, a.ready + int64_t(a.chance() % 3) + (wait ? 1 : 0));
        *count = a.ready;
    }
};

// A matrix of streams as tasks of a few streams each: the product is that of the levels, damage has its place.
void compare_tasks(int isa, int64_t width) {
    constexpr int64_t streams = 11;
    const int64_t each = stream_rows(width), last = std::min<int64_t>(70, each - 1), rows = (streams - 1) * each + last;
    std::vector<uint8_t> arena(4 * streams), bytes;
    std::vector<uint32_t> ends;
    for (int64_t i = 0; i < streams; ++i) {
        const auto stream = stream_of(i + 1 < streams ? each : last, width, 32, 14, false, false);
        bytes.insert(bytes.end(), stream.begin(), stream.end());
        ends.push_back(uint32_t(bytes.size()));
        const uint32_t end = uint32_t(bytes.size()) + 4 * streams;
        std::memcpy(arena.data() + 4 * i, &end, 4);
    }
    arena.insert(arena.end(), bytes.begin(), bytes.end());
    std::vector<uint8_t> codes(size_t(rows * width));
    std::vector<uint16_t> scales(size_t(rows * groups_of(width)));
    if (wf_trellis_decode(isa, 8, 0, arena.data(), int64_t(arena.size()), rows, width, codes.data(), scales.data()))
        std::abort();
    const Grid grid{1, 256, 8};
    std::vector<int16_t> units(256);
    std::vector<float> points(256), x(static_cast<size_t>(width)), y(static_cast<size_t>(rows)), z(y.size());
    for (int i = 0; i < 256; ++i) units[size_t(i)] = int16_t(i - 128), points[size_t(i)] = float(i - 128);
    for (auto& v : x) v = float(int32_t(rng())) * 1e-9f;
    const Arranged levels(isa, grid, rows, width, units, points, codes, scales, width);
    const wf_matrix* matrix = &levels.matrix;
    void* result = y.data();
    if (wf_matmul(isa, &matrix, 1, x.data(), WF_FLOAT32, 1, &result)) std::abort();
    wf_activations* prepared = wf_activations_new(isa, levels.table, x.data(), WF_FLOAT32, 1, width);

    std::vector<uint64_t> sums(static_cast<size_t>(streams));
    std::vector<wf_chunk> chunks;
    std::vector<std::vector<uint32_t>> chunk_ends;
    std::vector<wf_task> tasks;
    for (int64_t first = 0, count; first < streams; first += count) {
        count = std::min(streams - first, int64_t(1 + chunks.size() % 3));
        const uint32_t from = first ? ends[size_t(first) - 1] : 0;
        auto& own = chunk_ends.emplace_back();
        for (int64_t i = first; i < first + count; ++i) own.push_back(ends[size_t(i)] - from);
        chunks.push_back({std::min(count * each, rows - first * each), width, each, 0.01f, 1.0f, levels.table,
                          bytes.data() + from, nullptr, 8, 0, own.data(), &sums[size_t(first)], 0, 0, 0, own.back(), 0,
                          count});
    }
    int64_t row = 0, nanoseconds[2] = {};
    wf_flaw flaw{};
    for (const auto& chunk : chunks) {
        tasks.push_back({&chunk, prepared, z.data() + row, rows});
        row += chunk.rows;
    }
    const int64_t count = int64_t(tasks.size());
    auto multiply = [&](bool arriving) {
        Arriving source{count};
        std::fill(z.begin(), z.end(), 0.0f);
        flaw = {};
        const int status = wf_multiply_chunks(isa, tasks.data(), count, WF_FLOAT32,
                                              arriving ? Arriving::answer : nullptr, &source, nanoseconds, &flaw);
        return source.good ? status : -99;
    };
    const std::string name = "tasks of width " + std::to_string(width);
    for (int trial = 0; trial < 6; ++trial)
        expect(!multiply(trial % 2) && !std::memcmp(y.data(), z.data(), y.size() * sizeof(float)), name);
    std::vector<uint64_t> again(sums.size());
    const int64_t size = int64_t(bytes.size());
    expect(!wf_checksums(isa, bytes.data(), size, ends.data(), streams, again.data()) && again == sums,
           name + ", checksums");
    expect(wf_checksums(isa, bytes.data(), size - 1, ends.data(), streams, again.data()) < 0,
           name + ", checksums beyond the end");
    bytes[size_t(ends[4]) - 1] ^= 0x80;  // part 1 of task 2
    auto flawed = [&](bool arriving, int changed) {
        return multiply(arriving) == WF_FLAWED && flaw.task == 2 && flaw.part == 1 && flaw.changed == changed;
    };
    expect(flawed(true, 1) && flawed(false, 1), name + ", changed");
    std::fill(sums.begin(), sums.end(), 0);
    expect(flawed(false, 0) && !sums[4] && sums[0], name + ", damaged");
    bytes[size_t(ends[4]) - 1] ^= 0x80;
    expect(!multiply(true), name + ", whole again");
    auto ended = [](void*, int64_t, int, int64_t*) {};
    expect(wf_multiply_chunks(isa, tasks.data(), count, WF_FLOAT32, ended, nullptr, nanoseconds, &flaw) == WF_ENDED,
           name + ", ended");
    wf_activations_free(prepared);
}

// Streams that are whole, cut short or damaged: the same result, or refused by both, without a read beyond the bytes.
void compare_streams(int isa, int scalar) {
    struct {
        int64_t rows, width;
        int symbols;
        bool wide, levels;
    } cases[] = {{3, 50, 9, false, false},     {64, 1100, 12, false, true},  {64, 2100, 16, false, false},
                 {64, 2100, 30, false, false}, {66, 2100, 60, false, false}, {64, 2100, 120, true, false},
                 {66, 2144, 16, false, false}, {66, 2144, 30, false, false}, {66, 2144, 1, false, false}};
    for (const auto& c : cases)
        for (int states : {1, 8, 256}) {
            const int lanes = lanes_of(c.rows * c.width);
            const auto stream = stream_of(c.rows, c.width, lanes, c.symbols, c.wide, c.levels);
            std::vector<uint16_t> scales(size_t(c.rows * groups_of(c.width)));
            auto decode = [&](int on, const std::vector<uint8_t>& body, std::vector<uint8_t>& codes) {
                std::vector<uint8_t> arena(4 + body.size());  // its end is where the sanitizer watches
                const uint32_t end = uint32_t(arena.size());
                std::memcpy(arena.data(), &end, 4);
                if (!body.empty()) std::memcpy(arena.data() + 4, body.data(), body.size());
                codes.assign(size_t(c.rows * c.width * (c.wide ? 2 : 1)), 0);
                const int64_t status = wf_trellis_decode(on, states, c.wide, arena.data(), int64_t(arena.size()),
                                                         c.rows, c.width, codes.data(), scales.data());
                for (uint16_t scale : scales) codes.push_back(uint8_t(scale)), codes.push_back(uint8_t(scale >> 8));
                if (status) codes.clear();
                return status;
            };
            const std::string name =
                "stream of " + std::to_string(c.symbols) + " symbols, " + std::to_string(states) + " states";
            std::vector<uint8_t> x, y;
            expect(decode(isa, stream, x) == 0 && decode(scalar, stream, y) == 0 && x == y, name);
            expect_streamed_product(isa, states, c.rows, c.width, c.wide, stream, x, scales, name);
            for (int trial = 0; trial < 60; ++trial) {
                auto other = stream;
                if (trial % 2)
                    other.resize(rng() % other.size());
                else
                    other[trial % 4 ? rng() % other.size() : rng() % 24] ^= uint8_t(1u << rng() % 8);
                expect(decode(isa, other, x) == decode(scalar, other, y) && x == y, name + ", damaged");
            }
        }
    for (int states : {1, 4, 8, 64, 256})
        for (int lanes : {1, 8, 32}) {
            std::vector<float> x(size_t(lanes * 300));
            for (auto& v : x) v = float(int32_t(rng())) * 1e-8f;
            std::vector<int16_t> p(x.size()), q(x.size());
            expect(!wf_trellis_search(isa, states, x.data(), int64_t(x.size()), lanes, -31, 31, p.data()) &&
                       !wf_trellis_search(scalar, states, x.data(), int64_t(x.size()), lanes, -31, 31, q.data()) &&
                       p == q,
                   "search with " + std::to_string(states) + " states");
        }
}

}  // namespace

int main() {
    const Grid grids[] = {{1, 2, 8},        {1, 4, 8},       {1, 7, 8},         {1, 16, 8},        {1, 32, 16},
                          {1, 88, 16},      {1, 256, 16},    {2, 4, 8},         {2, 8, 8},         {2, 16, 8},
                          {2, 32, 8},       {2, 64, 8},      {2, 100, 8},       {2, 256, 8},       {2, 1024, 16},
                          {3, 512, 8},      {3, 4096, 16},   {4, 256, 8},       {4, 4096, 8},      {1, 256, 8},
                          {1, 1 << 16, 16}, {1, 3, 8, 5, 1}, {1, 11, 8, 16, 7}, {1, 88, 16, 6, 5}, {2, 724, 16, 5, 6}};
    int scalar = 0;
    while (std::strcmp(wf_isa(scalar), "scalar")) ++scalar;
    wf_set_threads(2);
    int compared = 0;
    for (int isa = 0; isa < scalar; ++isa) {
        if (!wf_usable(isa)) continue;
        for (const Grid& grid : grids)
            for (auto [rows, width] : {std::pair<int64_t, int64_t>{1, 1}, {1, 172}, {7, 896}, {33, 1030}, {37, 2561}})
                compare(isa, scalar, grid, rows, width);
        for (int64_t width : {1, 3, 64, 172, 1028, 1536, 4100}) {
            std::vector<float> x(size_t(2 * width));
            for (auto& v : x) v = float(int32_t(rng())) * 1e-9f;
            std::vector<float> y = x;
            wf_rotate(isa, x.data(), 2, width, 0);
            wf_rotate(scalar, y.data(), 2, width, 0);
            expect(!std::memcmp(x.data(), y.data(), x.size() * sizeof(float)), "rotation " + std::to_string(width));
        }
        for (int dtype : {WF_FLOAT32, WF_BFLOAT16})
            for (bool biases : {false, true}) {
                const auto x = layer_on(isa, dtype, biases), y = layer_on(scalar, dtype, biases);
                expect(!std::memcmp(x.data(), y.data(), x.size() * sizeof(float)), "layer " + std::to_string(dtype));
            }
        compare_streams(isa, scalar);
        for (int symbols : {14, 30, 60}) compare_many_streams(isa, scalar, 2144, symbols);
        compare_many_streams(isa, scalar, 2100, 30);
        for (int64_t width : {2100, 2144, 70000}) compare_tasks(isa, width);
        std::printf("%s equals scalar: %s\n", wf_isa(isa), failures ? "no" : "yes");
        ++compared;
    }
    if (!compared) std::printf("only scalar code here\n");
    return failures != 0;
}

// Attention to coded keys and values: the same bits on every instruction set and however a text is cut; lies refused.
#include "compare.hpp"

#include <cstring>
#include <initializer_list>

namespace {

constexpr int64_t kHidden = 16, kTokens = 300, kCapacity = 384, kBlock = 128;

struct Case {
    int key_bits, value_bits;
    int64_t head_dim, heads, kv_heads, window;
    int dtype;
    int64_t first, recent, ring;
};

std::vector<int8_t> ascending(int bits) {
    std::vector<int8_t> levels(size_t(1) << bits);
    for (size_t i = 0; i < levels.size(); ++i) levels[i] = int8_t(int(i * 254 / (levels.size() - 1)) - 127);
    return levels;
}

// A layer of which there are no more than shapes, and a text with all its memory.
struct Subject {
    Case c;
    wf_matrix q, kv, o, other;
    std::vector<float> norm, given[3], mixed;
    std::vector<int8_t> levels[2];
    std::vector<uint8_t> memory[2], whole[2];
    void *codes[2], *rows[2];
    wf_layer layer{};
    wf_coding coding{};
    int64_t done = 0;

    explicit Subject(const Case& given_case)
        : c(given_case), q{}, kv{}, o{}, other{}, norm(kHidden, 1.0f), mixed(size_t(kTokens * c.heads * c.head_dim)) {
        const int64_t q_size = c.heads * c.head_dim, kv_size = c.kv_heads * c.head_dim;
        q.rows = o.width = q_size, kv.rows = kv_size, o.rows = other.rows = kHidden;
        q.width = kv.width = other.width = kHidden;
        layer.hidden = kHidden, layer.heads = c.heads, layer.kv_heads = c.kv_heads, layer.head_dim = c.head_dim;
        layer.epsilon = 1e-5f, layer.scaling = 0.2f, layer.cache_dtype = c.dtype, layer.window = c.window;
        layer.q = &q, layer.k = layer.v = &kv, layer.o = &o, layer.gate = layer.up = layer.down = &other;
        layer.input_norm = layer.post_norm = {norm.data(), kHidden};
        std::mt19937 own(3);
        for (int i = 0; i < 3; ++i) {
            given[i].resize(size_t(kTokens * (i ? kv_size : q_size)));
            for (auto& x : given[i]) x = float(int32_t(own())) * 1e-9f;
        }
        const int64_t number = c.dtype == WF_FLOAT32 ? 4 : 2;
        for (int side = 0; side < 2; ++side) {
            const int bits = side ? c.value_bits : c.key_bits;
            const int64_t block = 2 * kBlock + kBlock * c.head_dim * bits / 8, plain = kCapacity * c.head_dim * number;
            memory[side].resize(size_t(c.kv_heads * (bits == 16 ? plain : kCapacity / kBlock * block)));
            whole[side].resize(size_t(c.kv_heads * (c.first + c.ring) * c.head_dim * number));
            if (bits < 8) levels[side] = ascending(bits);
            codes[side] = memory[side].data(), rows[side] = whole[side].data();
            (side ? coding.values : coding.keys) = {
                bits,        bits == 8 ? 127.0f : 46.0f,   levels[side].data(),
                &rows[side], int64_t(memory[side].size()), int64_t(whole[side].size())};
        }
        coding.first = c.first, coding.recent = c.recent, coding.ring = c.ring;
    }
    Subject(const Subject&) = delete;

    wf_sequence text(int64_t tokens) { return {tokens, done, kCapacity, &codes[0], &codes[1], 1, 0, &coding}; }

    static void product(void* context, int, int first, int count, const float* x, int64_t tokens, float* const* y,
                        int* status) {
        auto& own = *static_cast<Subject*>(context);
        const int64_t q_size = own.q.rows, sizes[] = {q_size, own.kv.rows, own.kv.rows};
        for (int i = 0; i < count; ++i)
            if (first == 0)
                std::memcpy(y[i], own.given[i].data() + own.done * sizes[i], size_t(tokens * sizes[i]) * sizeof(float));
            else
                std::memset(y[i], 0, size_t(tokens * kHidden) * sizeof(float));
        if (first == 3) std::memcpy(own.mixed.data() + own.done * q_size, x, size_t(tokens * q_size) * sizeof(float));
        *status = 0;
    }

    int run(int isa, const wf_sequence& text) {
        std::vector<float> hidden(size_t(kTokens * kHidden), 1.0f), out(hidden);
        std::vector<float> cosine(size_t(kTokens * c.head_dim), 1.0f), sine(cosine.size(), 0.0f);
        return wf_run_layers(isa, &layer, 1, &text, 1, hidden.data(), text.tokens, 1, cosine.data(), sine.data(),
                             layer.input_norm, out.data(), product, this);
    }

    void read(int isa, std::initializer_list<int64_t> cuts) {
        for (int64_t tokens : cuts) {
            if (run(isa, text(tokens))) std::abort();
            done += tokens;
            coding.coded = std::max(coding.coded, done - c.recent);
        }
    }
};

bool same(const Subject& a, const Subject& b) {
    return !std::memcmp(a.mixed.data(), b.mixed.data(), a.mixed.size() * sizeof(float)) && a.memory[0] == b.memory[0] &&
           a.memory[1] == b.memory[1];
}

void expect_coding_lies_refused(int isa) {
    auto refused = [&](auto&& lie, bool sound = false) {
        Subject s({4, 5, 64, 4, 2, 0, WF_BFLOAT16, 4, 32, 64});
        s.read(isa, {100});
        wf_sequence text = s.text(20);
        lie(s, text);
        expect((s.run(isa, text) == (sound ? 0 : -3)), "coded, a text that lies");
    };
    refused([](Subject&, wf_sequence&) {}, true);
    refused([](Subject& s, wf_sequence&) { s.coding.keys.bits = 6; });
    refused([](Subject& s, wf_sequence&) { s.coding.keys.bytes -= 1; });
    refused([](Subject& s, wf_sequence&) { s.coding.values.whole_bytes -= 1; });
    refused([](Subject& s, wf_sequence&) { s.coding.values.levels = nullptr; });
    refused([](Subject& s, wf_sequence&) { s.coding.values.unit = 0; });
    refused([](Subject& s, wf_sequence&) { s.coding.keys.whole = nullptr; });
    refused([](Subject& s, wf_sequence&) { s.rows[0] = s.rows[1]; });
    refused([](Subject& s, wf_sequence&) { s.codes[0] = nullptr; });
    refused([](Subject& s, wf_sequence&) { s.coding.first = -1; });
    refused([](Subject& s, wf_sequence&) { s.coding.first = INT64_MAX; });
    refused([](Subject& s, wf_sequence&) { s.coding.recent = 0; });
    refused([](Subject& s, wf_sequence&) { s.coding.recent = s.coding.ring + 1; });
    refused([](Subject& s, wf_sequence&) { s.coding.ring = INT64_MAX; });
    refused([](Subject& s, wf_sequence&) { s.coding.kept_from = 101; });
    refused([](Subject& s, wf_sequence&) { s.coding.coded = -1; });
    refused([](Subject&, wf_sequence& text) { text.capacity -= 1; });
    refused([](Subject&, wf_sequence& text) { text.capacity += kBlock; });
    Subject odd({4, 4, 40, 2, 1, 0, WF_BFLOAT16, 4, 32, 64});
    expect(odd.run(isa, odd.text(3)) == -3, "coded, heads that are no multiple of 16");
}

}  // namespace

void compare_coded(int isa, int scalar) {
    const Case cases[] = {{3, 4, 64, 4, 2, 0, WF_BFLOAT16, 4, 64, 128},   {4, 5, 80, 3, 1, 100, WF_FLOAT32, 4, 32, 33},
                          {5, 3, 16, 2, 2, 30, WF_BFLOAT16, 0, 1, 1},     {8, 8, 128, 5, 1, 0, WF_BFLOAT16, 20, 8, 9},
                          {8, 16, 512, 1, 1, 7, WF_FLOAT32, 1, 200, 299}, {16, 4, 48, 4, 4, 0, WF_BFLOAT16, 4, 64, 64}};
    for (const Case& c : cases) {
        Subject a(c), b(c), whole(c);
        a.read(isa, {1, 130, 9, 100, 1, 59});
        b.read(scalar, {1, 130, 9, 100, 1, 59});
        whole.read(isa, {kTokens});
        const std::string name = std::to_string(c.key_bits) + ", " + std::to_string(c.value_bits) + " bits, coded";
        expect(same(a, b), name);
        expect(same(a, whole), name + ", in one pass");
    }
    expect_coding_lies_refused(isa);
}

#include "attention.hpp"

#include <vector>

#include "coded.hpp"
#include "layout.hpp"
#include "pool.hpp"

namespace waterfill {
namespace {

constexpr int64_t kAttentionTokens = 8;            // of one task: they share the conversion of keys and values
constexpr int64_t kEverything = int64_t(1) << 48;  // more positions than there are
constexpr int64_t kWorthThreads = 1 << 16;         // numbers

struct Keep {  // of keys and values of one layer and text: where those of a head lie
    const wf_layer& layer;
    const wf_sequence& text;
    int number;
    int64_t number_bytes() const { return layer.cache_dtype == WF_FLOAT32 ? 4 : 2; }
    int64_t window() const { return layer.window ? least(layer.window, kEverything) : kEverything; }
    uint8_t* row(void* const* rows, int64_t h, int64_t position = 0) const {
        const int64_t at = (h * text.capacity + position) * layer.head_dim;
        return static_cast<uint8_t*>(rows[number]) + at * number_bytes();
    }
};

// New rows of a head of k or v, the first of which is at `from`, to `rows` of it, the first of which is that of token
// `row` of the text and of token t of the pass.
void write(const Keep& keep, const float* from, int64_t t, int64_t count, int64_t row, void* rows) {
    const int64_t d = keep.layer.head_dim, size = keep.layer.kv_heads * d;
    for (int64_t i = 0; i < count; ++i)
        from_float(from + (t + i) * size, keep.layer.cache_dtype, (row + i) * d, d, rows);
}

// A head of a text's keys and values as they are, with some of its tokens, whose queries begin at token `start` of the
// pass.
void attend(const Functions& f, const Keep& keep, int64_t h, int64_t first, int64_t start, const float* q,
            float* mixed) {
    const wf_layer& layer = keep.layer;
    const int64_t d = layer.head_dim, shared = layer.heads / layer.kv_heads, q_size = layer.heads * d;
    const int64_t tokens = least(kAttentionTokens, keep.text.tokens - first),
                  at = (start + first) * q_size + h * shared * d;
    const int64_t seen = keep.text.position + first + 1, from = most(0, seen - keep.window());  // by the first token
    const Attention one{d,
                        shared,
                        tokens,
                        seen - from,
                        keep.window(),
                        q_size,
                        layer.scaling,
                        layer.cache_dtype != WF_FLOAT32,
                        keep.row(keep.text.keys, h, from),
                        keep.row(keep.text.values, h, from),
                        q + at,
                        mixed + at};
    f.attend(one, scratch_floats(kScores, tokens * shared * (one.positions + tokens - 1)));
}

// Keys or values of head h; `fresh` are those of the text's new tokens.
CodedSide side_of(const Keep& keep, const wf_coded& coded, void* const* memory, int64_t h, const float* fresh) {
    const wf_layer& layer = keep.layer;
    const int64_t d = layer.head_dim, size = layer.kv_heads * d;
    CodedSide side{coded.bits, coded.levels, coded.unit, nullptr, nullptr, fresh + h * d, size};
    if (coded.bits == 16) {
        side.whole = keep.row(memory, h);
    } else {
        const int64_t blocks = keep.text.capacity / kCodedTokens,
                      rows = keep.text.coding->first + keep.text.coding->ring;
        side.blocks = static_cast<uint8_t*>(memory[keep.number]) + h * blocks * coded_block_bytes(coded.bits, d);
        side.whole = static_cast<uint8_t*>(coded.whole[keep.number]) + h * rows * d * keep.number_bytes();
    }
    return side;
}

// Head h of a coded text, for queries of some of its tokens; k and v begin with its first new token.
CodedAttention coded_head(const Keep& keep, int64_t h, int64_t first, int64_t tokens, const float* k, const float* v) {
    const wf_layer& layer = keep.layer;
    const wf_sequence& text = keep.text;
    const wf_coding& coding = *text.coding;
    return {layer.head_dim,
            layer.heads / layer.kv_heads,
            tokens,
            text.position + first,
            keep.window(),
            coding.first,
            coding.recent,
            coding.ring,
            coding.kept_from,
            text.position,
            layer.heads * layer.head_dim,
            layer.scaling,
            layer.cache_dtype != WF_FLOAT32,
            side_of(keep, coding.keys, text.keys, h, k),
            side_of(keep, coding.values, text.values, h, v),
            nullptr,
            nullptr};
}

// Before the queries: new rows as they are going to be remembered, and codes of tokens that are no longer recent.
void remember(const Functions& f, const Keep& keep, int64_t h, float* k, float* v) {
    const int64_t tokens = keep.text.tokens, end = keep.text.position + tokens;
    const wf_coding& coding = *keep.text.coding;
    const CodedAttention a = coded_head(keep, h, 0, tokens, k, v);
    for (const bool values : {false, true}) {
        const CodedSide& side = values ? a.values : a.keys;
        float* fresh = (values ? v : k) + h * a.head_dim;
        if (a.half)
            for (int64_t t = 0; t < tokens; ++t) f.round_row(fresh + t * side.fresh_stride, a.head_dim);
        if (side.bits == 16)
            write(keep, fresh, 0, tokens, keep.text.position, side.whole);
        else
            f.code_rows(a, side, values, most(coding.first, coding.coded), end - coding.recent);
    }
}

// Behind the queries, which look at what was in the ring: new rows take their places there.
void keep_recent(const Keep& keep, int64_t h, const float* k, const float* v) {
    const wf_coding& coding = *keep.text.coding;
    const CodedAttention a = coded_head(keep, h, 0, 0, k, v);
    for (const CodedSide* side : {&a.keys, &a.values}) {
        if (side->bits == 16) continue;
        for (int64_t t = 0; t < keep.text.tokens; ++t) {
            const int64_t j = keep.text.position + t;
            if (j < coding.first || t >= keep.text.tokens - coding.ring)
                write(keep, side->fresh, t, 1, j < coding.first ? j : coding.first + j % coding.ring, side->whole);
        }
    }
}

void attend_coded(const Functions& f, const Keep& keep, int64_t h, int64_t first, int64_t start, const float* q,
                  const float* k, const float* v, float* mixed) {
    const int64_t tokens = least(kAttentionTokens, keep.text.tokens - first);
    CodedAttention a = coded_head(keep, h, first, tokens, k, v);
    const int64_t d = a.head_dim, queries = tokens * a.queries, at = (start + first) * a.stride + h * a.queries * d;
    a.q = q + at, a.out = mixed + at;
    const int64_t seen = least(a.position + tokens, a.window + tokens - 1);
    float* floats = scratch_floats(kScores, queries * (seen + d + 1));
    uint8_t* whole = scratch(kQueryWords, queries * (kCodedTokens * 4 + coded_words(d) * 2));
    f.attend_coded(a,
                   {floats, floats + queries * seen, floats + queries * (seen + d),
                    reinterpret_cast<int16_t*>(whole + queries * kCodedTokens * 4), reinterpret_cast<int32_t*>(whole)});
}

// work(i) for i below `count`, in several threads where `numbers` are worth waking one.
template <class Work>
void each(int64_t count, int64_t numbers, const Work& work) {
    if (numbers >= kWorthThreads) return parallel(count, work);
    for (int64_t i = 0; i < count; ++i) work(i);
}

}  // namespace

// Every text by itself; the tasks of all are shared among the threads together.
void attention(const Functions& f, const wf_layer& layer, int number, const Pass& pass, const float* q, float* k,
               float* v, float* mixed) {
    const int64_t q_size = layer.heads * layer.head_dim, kv_size = layer.kv_heads * layer.head_dim;
    struct Task {
        int64_t text, start, head, first;
    };
    std::vector<Task> tasks, heads;
    int64_t start = 0, work = 0;
    for (int64_t i = 0; i < pass.texts; start += pass.sequences[i++].tokens) {
        const wf_sequence& text = pass.sequences[i];
        for (int64_t h = 0; h < layer.kv_heads; ++h) heads.push_back({i, start, h, 0});
        for (int64_t first = 0; first < text.tokens; first += kAttentionTokens)
            for (int64_t h = 0; h < layer.kv_heads; ++h) tasks.push_back({i, start, h, first});
        work += (text.position + text.tokens) * text.tokens * q_size;
    }
    auto kept = [&](const Task& t) { return Keep{layer, pass.sequences[t.text], number}; };
    each(int64_t(heads.size()), pass.tokens * kv_size, [&](int64_t i) {
        const Task& t = heads[size_t(i)];
        const Keep keep = kept(t);
        float *own_k = k + t.start * kv_size, *own_v = v + t.start * kv_size;
        if (keep.text.coding) return remember(f, keep, t.head, own_k, own_v);
        const int64_t tokens = keep.text.tokens, position = keep.text.position;
        write(keep, own_k + t.head * layer.head_dim, 0, tokens, position, keep.row(keep.text.keys, t.head));
        write(keep, own_v + t.head * layer.head_dim, 0, tokens, position, keep.row(keep.text.values, t.head));
    });
    each(int64_t(tasks.size()), work, [&](int64_t i) {
        const Task& t = tasks[size_t(i)];
        const Keep keep = kept(t);
        if (keep.text.coding)
            attend_coded(f, keep, t.head, t.first, t.start, q, k + t.start * kv_size, v + t.start * kv_size, mixed);
        else
            attend(f, keep, t.head, t.first, t.start, q, mixed);
    });
    for (const Task& t : heads)
        if (const Keep keep = kept(t); keep.text.coding)
            keep_recent(keep, t.head, k + t.start * kv_size, v + t.start * kv_size);
}

}  // namespace waterfill

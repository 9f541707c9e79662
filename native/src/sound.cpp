#include "sound.hpp"

#include <algorithm>
#include <vector>

#include "coded.hpp"
#include "layout.hpp"
#include "registers.hpp"

namespace waterfill {
namespace {

constexpr int64_t kMostWeights = int64_t(1) << 48;
constexpr int kMostWordBytes = 7;

// Bytes of a stored row that are read; -1 where words cannot be as they are said to be.
int64_t row_bytes_read(const StoredRows& m) {
    const Table& t = m.table->view;
    if (t.halves) return window_row_bytes(m.width, t.halves);
    const int paired = m.table->paired, n = paired ? paired : t.n;
    const int64_t count = codes_per_row(m.width, paired ? 1 : t.p);
    if (!m.word_indices || t.direct) return ceil_div(count * bits_of(n), 8);
    if (m.word_indices < 0 || m.word_bytes < 1 || m.word_bytes > kMostWordBytes) return -1;
    uint64_t numbers = uint64_t(1) << 8 * m.word_bytes;  // that a word can be
    for (int i = 0; i < m.word_indices; ++i) numbers /= uint64_t(n);
    if (!numbers) return -1;
    return (ceil_div(count, m.word_indices) - 1) * m.word_bytes + 1;  // the last word takes the bytes that it needs
}

}  // namespace

bool possible(int64_t rows, int64_t width) {
    return rows >= 1 && width >= 1 && width <= kMostWeights && rows <= kMostWeights / width;
}

bool holds_arranged(const wf_table* table, int64_t rows, int64_t width, const void* codes, int64_t codes_bytes,
                    const void* scales, int64_t scales_count) {
    if (!table || !codes || !scales || !possible(rows, width)) return false;
    const int64_t tiles = tiles_of(rows);
    return tiles <= codes_bytes / tile_code_bytes(table->view, width) &&
           tiles <= scales_count / (kTile * groups_of(width));
}

bool holds_stored(const StoredRows& m, int64_t codes_bytes, int64_t scales_count) {
    if (!m.table || !m.codes || !m.scales || !possible(m.rows, m.width)) return false;
    const int64_t read = row_bytes_read(m);
    return read > 0 && read <= m.row_bytes && m.rows <= codes_bytes / m.row_bytes &&
           m.rows <= scales_count / groups_of(m.width);
}

bool holds_parts(const uint32_t* ends, int64_t parts, int64_t bytes) {
    int64_t from = 0;
    for (int64_t i = 0; i < parts; from = ends[i++])
        if (ends[i] < from) return false;
    return from <= bytes;
}

bool sound(const wf_matrix& m) {
    return holds_arranged(m.table, m.rows, m.width, m.codes, m.codes_bytes, m.scales, m.scales_count);
}

bool holds(const wf_vector& v, int64_t count) { return v.numbers && v.count == count; }

namespace {

// Memory of one side of a coded text in all layers, which is put to the others'.
bool holds_coded(const wf_sequence& text, const wf_coded& side, void* const* codes, const wf_layer* layers,
                 std::vector<const void*>& memory) {
    const wf_coding& coding = *text.coding;
    const bool plain = side.bits == 16;
    if (!plain && (!coded_bits(side.bits) || !(side.unit > 0) || !side.whole || text.capacity % kCodedTokens ||
                   (side.bits != 8 && !side.levels)))
        return false;
    for (int j = 0; j < text.layers; ++j) {
        const wf_layer& l = layers[j];
        const int64_t row = l.kv_heads * l.head_dim * (l.cache_dtype == WF_FLOAT32 ? 4 : 2);
        const int64_t block = plain ? row : l.kv_heads * coded_block_bytes(side.bits, l.head_dim);
        if (!codes[j] || text.capacity / (plain ? 1 : kCodedTokens) > side.bytes / block) return false;
        memory.push_back(codes[j]);
        if (plain) continue;
        if (l.head_dim % kCodedHeadDim || !side.whole[j] || coding.first + coding.ring > side.whole_bytes / row)
            return false;
        memory.push_back(side.whole[j]);
    }
    return true;
}

// Tokens in the order that wf_coding has them in: what is no longer in the ring has codes.
bool in_order(const wf_coding& c, int64_t position) {
    return c.first >= 0 && c.first <= kMostWeights && c.recent >= 1 && c.recent <= c.ring && c.ring <= kMostWeights &&
           c.kept_from >= 0 && c.kept_from <= position && c.coded >= 0 && c.coded <= position;
}

}  // namespace

bool holds_texts(const wf_sequence* texts, int64_t count, int64_t tokens, const wf_layer* layers, int layer_count) {
    std::vector<const void*> memory;
    for (int64_t i = 0; i < count; ++i) {
        const wf_sequence& text = texts[i];
        if (text.tokens < 1 || text.tokens > tokens || text.position < 0 || text.capacity < text.tokens) return false;
        if (text.position > text.capacity - text.tokens || text.layers != layer_count || !text.keys || !text.values)
            return false;
        tokens -= text.tokens;
        if (const wf_coding* coding = text.coding) {
            if (!in_order(*coding, text.position) || !holds_coded(text, coding->keys, text.keys, layers, memory) ||
                !holds_coded(text, coding->values, text.values, layers, memory))
                return false;
            continue;
        }
        for (int j = 0; j < layer_count; ++j) {
            const wf_layer& l = layers[j];
            const int64_t row = l.kv_heads * l.head_dim * (l.cache_dtype == WF_FLOAT32 ? 4 : 2);
            if (!text.keys[j] || !text.values[j] || text.capacity > text.bytes / row) return false;
            memory.push_back(text.keys[j]), memory.push_back(text.values[j]);
        }
    }
    std::sort(memory.begin(), memory.end());
    return !tokens && std::adjacent_find(memory.begin(), memory.end()) == memory.end();
}

bool sound(const wf_layer& l, bool shapes_only) {
    if (l.kv_heads < 1 || l.heads < 1 || l.heads % l.kv_heads || l.head_dim < 2 || l.head_dim > kMostHeadDim ||
        l.head_dim % 2)
        return false;
    if (l.dtype == WF_FLOAT16 || l.cache_dtype == WF_FLOAT16 || !possible(l.heads, l.head_dim)) return false;
    if (l.window < 0 || l.rotary < 0 || l.activation < WF_SILU || l.activation > WF_GELU_TANH) return false;
    const int64_t q = l.heads * l.head_dim, kv = l.kv_heads * l.head_dim;
    const struct {
        const wf_matrix* matrix;
        int64_t rows, width;
    } matrices[] = {{l.q, q, l.hidden},
                    {l.k, kv, l.hidden},
                    {l.v, kv, l.hidden},
                    {l.o, l.hidden, q},
                    {l.up, l.gate->rows, l.hidden},
                    {l.gate, l.up->rows, l.hidden},
                    {l.down, l.hidden, l.up->rows}};
    for (const auto& [matrix, rows, width] : matrices) {
        if (matrix->rows != rows || matrix->width != width || !possible(rows, width)) return false;
        if (!shapes_only && !sound(*matrix)) return false;
    }
    const struct {
        const wf_vector& vector;
        int64_t count;
    } optional[] = {{l.q_norm, l.head_dim}, {l.k_norm, l.head_dim}, {l.q_bias, q},        {l.k_bias, kv},
                    {l.v_bias, kv},         {l.o_bias, l.hidden},   {l.o_norm, l.hidden}, {l.down_norm, l.hidden}};
    for (const auto& [vector, count] : optional)
        if (vector.numbers && vector.count != count) return false;
    return holds(l.input_norm, l.hidden) && holds(l.post_norm, l.hidden);
}

}  // namespace waterfill

// Expectations that count failures: products of chunks are those of matrices, and what lies about its size is refused.
#include "compare.hpp"

#include <cstdio>
#include <cstring>

std::mt19937 rng(1);
int failures = 0;

void expect(bool holds, const std::string& what) {
    if (holds) return;
    std::fprintf(stderr, "differs: %s\n", what.c_str());
    ++failures;
}

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

namespace {

// Changes that make a matrix or a chunk ask for more than there is.
template <class Matrix>
std::vector<Matrix> lies_of(const Matrix& sound) {
    std::vector<Matrix> lies(7, sound);
    lies[0].rows += 4, lies[1].rows = 0, lies[2].rows = INT64_MAX;
    lies[3].width += 1536, lies[4].width = 0, lies[5].width = INT64_MAX;
    lies[6].scales_count -= 1;
    return lies;
}

}  // namespace

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

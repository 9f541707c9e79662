// Random matrices in shapes chosen to hit every remainder: products, rows and chunks of them.
#include "compare.hpp"

#include <cstring>

namespace {

int bits_of(int n) {
    int bits = 0;
    while ((1 << bits) < n) ++bits;
    return bits;
}

int64_t row_bytes_of(const Grid& g, int64_t width) {
    const int64_t count = (width + g.p - 1) / g.p;
    if (!g.digits) return (count * bits_of(g.n) + 7) / 8;
    uint64_t most = 1;  // of the last word, which takes the bytes that it needs
    for (int64_t i = 0; i < count % g.digits; ++i) most *= uint64_t(g.n);
    int64_t bytes = count / g.digits * g.word_bytes;
    for (--most; most; most >>= 8) ++bytes;
    return bytes;
}

}  // namespace

void compare_matrices(int isa, int scalar, const Grid& g, int64_t rows, int64_t width) {
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
    compare_arranged(isa, scalar, a, b, g, stored, factors, row_bytes, name);
}

void compare_arranged(int isa, int scalar, const Arranged& a, const Arranged& b, const Grid& g,
                      const std::vector<uint8_t>& stored, const std::vector<uint16_t>& factors, int64_t row_bytes,
                      const std::string& name) {
    const int64_t rows = a.matrix.rows, width = a.matrix.width;
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

// Coded streams: one by one and many at a time, whole, cut short and damaged; and the search that writes them.
#include "compare.hpp"

#include <cstring>

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

namespace {

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

}  // namespace

// Streams of mixed numbers of symbols are not read in the same way, nor are rows that lanes do not divide.
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
    for (int states : {1, 4, 8, 16, 32, 64, 128, 256})
        for (int lanes : {1, 4, 8, 32}) {
            std::vector<float> x(size_t(lanes * 300));
            for (auto& v : x) v = float(int32_t(rng())) * 1e-8f;
            std::vector<int16_t> p(x.size()), q(x.size());
            expect(!wf_trellis_search(isa, states, x.data(), int64_t(x.size()), lanes, -31, 31, p.data()) &&
                       !wf_trellis_search(scalar, states, x.data(), int64_t(x.size()), lanes, -31, 31, q.data()) &&
                       p == q,
                   "search with " + std::to_string(states) + " states");
            // Lane by lane, or all of them side by side, finds the same.
            const int64_t steps = int64_t(x.size()) / lanes;
            std::vector<float> wide(size_t(steps * 32));
            for (int64_t t = 0; t < steps; ++t)
                for (int lane = 0; lane < lanes; ++lane) wide[size_t(t * 32 + lane)] = x[size_t(t * lanes + lane)];
            std::vector<int16_t> side_by_side(wide.size());
            bool same = !wf_trellis_search(isa, states, wide.data(), steps * 32, 32, -31, 31, side_by_side.data());
            for (int64_t t = 0; t < steps; ++t)
                for (int lane = 0; lane < lanes; ++lane)
                    same = same && side_by_side[size_t(t * 32 + lane)] == p[size_t(t * lanes + lane)];
            expect(same, "search lane by lane with " + std::to_string(states) + " states");
        }
}

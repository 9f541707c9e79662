#include "table.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "layout.hpp"
#include "registers.hpp"

namespace waterfill {
namespace {

void fill(wf_table& t, int p, int n, int precision, const int16_t* units, const float* points, int bias) {
    Table& v = t.view;
    v = {p, n, bits_of(n), precision, bias, 1, nullptr, {}, nullptr, nullptr, false, 0, {}, {}};
    while (v.entry < p * precision / 8) v.entry *= 2;
    const int rounded = 1 << v.bits, period = std::max(256, rounded), size = precision / 8;
    t.entries.resize(size_t(period) * size_t(v.entry) + 8);
    for (int i = 0; i < period; ++i)
        for (int k = 0; k < p; ++k) {
            const int value = units[std::min(i % rounded, n - 1) * p + k] + v.bias;
            uint8_t* to = t.entries.data() + i * v.entry + k * size;
            to[0] = uint8_t(value);
            if (size == 2) to[1] = uint8_t(value >> 8);
        }
    v.entries = t.entries.data();
    for (int k = 0; k < p && n <= 256 && precision == 8; ++k) {
        t.bytes[k].resize(256);
        for (int i = 0; i < 256; ++i) t.bytes[k][size_t(i)] = t.entries[size_t(i * v.entry + k)];
        v.bytes[k] = t.bytes[k].data();
    }
    if (p == 1 && n <= 256 && precision == 16) {
        t.words.resize(256);
        std::memcpy(t.words.data(), v.entries, 512);
        v.words = t.words.data();
    }
    t.points.assign(points, points + size_t(n) * size_t(p));
    v.points = t.points.data();
}

// Levels that are their own codes, less half their number: there is no table.
bool is_direct(int p, int n, int precision) { return p == 1 && n == 1 << precision; }

void fill_direct(wf_table& t, int precision, int bias) {
    t.view = {1,       1 << precision, precision, precision, bias, precision / 8, nullptr, {}, nullptr,
              nullptr, true,           0,         {},        {}};
}

// A scalar grid as one of pairs: two codes side by side index it, so that each byte that is loaded and shifted serves
// twice as many weights.
void fill_with_pairs(wf_table& t, int n, const int16_t* units, const float* points, int bias) {
    const int bits = bits_of(n), count = 1 << 2 * bits;
    std::vector<int16_t> pair_units;
    std::vector<float> pair_points;
    for (int code = 0; code < count; ++code)
        for (int k = 0; k < 2; ++k) {
            const int one = std::min(code >> k * bits & ((1 << bits) - 1), n - 1);
            pair_units.push_back(units[one]);
            pair_points.push_back(points[one]);
        }
    fill(t, 2, count, 8, pair_units.data(), pair_points.data(), bias);
    t.paired = n;
}

}  // namespace

wf_table* new_table(const Functions& f, int p, int n, int precision, const int16_t* units, const float* points) {
    if (p < 1 || p > 4 || n < 2 || (precision != 8 && precision != 16)) return nullptr;
    const bool direct = is_direct(p, n, precision);
    if (n > 4096 && !direct) return nullptr;
    std::unique_ptr<wf_table> made(new (std::nothrow) wf_table);
    if (!made) return nullptr;
    if (direct)
        fill_direct(*made, precision, precision == 8 ? f.bias : 0);
    else if (p == 1 && precision == 8 && bits_of(n) <= f.pair_bits)
        fill_with_pairs(*made, n, units, points, f.bias);
    else
        fill(*made, p, n, precision, units, points, precision == 8 ? f.bias : 0);
    return made.release();
}

wf_table* new_window_table(int halves, const uint8_t* hash, const int8_t* levels) {
    const int8_t *high = levels, *low = levels + 16;
    const int least_level = *std::min_element(high, high + 16) + *std::min_element(low, low + 16);
    const int most_level = *std::max_element(high, high + 16) + *std::max_element(low, low + 16);
    if (!registers_of(halves).count || least_level < -kWindowBias || most_level >= kWindowBias) return nullptr;
    std::unique_ptr<wf_table> made(new (std::nothrow) wf_table);
    if (!made) return nullptr;
    Table& v = made->view;
    v = {1, 1 << 8, 8, 8, kWindowBias, 1, nullptr, {}, nullptr, nullptr, false, halves, {}, {}};
    std::memcpy(v.hash, hash, sizeof v.hash);
    for (int i = 0; i < 16; ++i) v.levels[0][i] = uint8_t(high[i] + kWindowBias), v.levels[1][i] = uint8_t(low[i]);
    return made.release();
}

}  // namespace waterfill

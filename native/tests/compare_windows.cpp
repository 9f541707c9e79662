// Bitshift trellises: products and rows from random codes, the search for paths, and tables that there cannot be.
#include <array>
#include <cstring>
#include <numeric>

#include "compare.hpp"

namespace {

constexpr int kStates = 4096, kLanes = 16;

struct Symbols {  // of a register
    int bits, every;
};

std::vector<Symbols> symbols_of(int halves) {
    std::vector<Symbols> all;
    for (int bits : {4, 2, 1})
        if (halves / 2 & bits) all.push_back({bits, 1});
    if (halves % 2) all.push_back({1, 2});
    return all;
}

int64_t window_row_bytes(int halves, int64_t width) {
    const int64_t whole = kLanes * (1 + halves % 2), columns = (width + whole - 1) / whole * whole;
    int64_t bytes = 0;
    for (const Symbols& s : symbols_of(halves)) bytes += (columns / s.every * s.bits + 7) / 8;
    return bytes;
}

template <class Number, size_t COUNT>
std::array<Number, COUNT> random_numbers(int from, int count) {
    std::array<Number, COUNT> numbers;
    for (auto& n : numbers) n = Number(from + int(rng() % uint32_t(count)));
    return numbers;
}

}  // namespace

void compare_windows(int isa, int scalar, int halves, int64_t rows, int64_t width) {
    const auto hash = random_numbers<uint8_t, 48>(0, 256);
    auto levels = random_numbers<int8_t, 32>(-32, 64);
    levels[3] = levels[20] = -32, levels[8] = 31, levels[31] = 32;  // as far as they may reach
    const int64_t row_bytes = window_row_bytes(halves, width);
    std::vector<uint8_t> stored(size_t(rows * row_bytes));
    for (auto& byte : stored) byte = uint8_t(rng());
    std::vector<uint16_t> factors(size_t(rows * groups_of(width)));
    for (auto& factor : factors) factor = uint16_t(0x3000 + rng() % 0x1000);
    const Grid grid{1, 256, 8};
    const auto arranged = [&](int on) {
        wf_table* table = wf_window_table_new(on, halves, hash.data(), levels.data());
        if (!table) std::abort();
        return Arranged(on, table, grid, rows, width, stored, factors, row_bytes);
    };
    const std::string name = std::string(wf_isa(isa)) + " bitshift " + std::to_string(halves) + "/2 " +
                             std::to_string(rows) + "x" + std::to_string(width);
    compare_arranged(isa, scalar, arranged(isa), arranged(scalar), grid, stored, factors, row_bytes, name);
}

void compare_window_search(int isa, int scalar) {
    const auto levels = random_numbers<int8_t, kStates>(-64, 128);
    for (int ways : {2, 4, 16}) {
        std::vector<uint16_t> before(kStates), after(kStates);
        for (int group = 0, at = 0; group < kStates / ways; ++group)
            for (int way = 0; way < ways; ++way, ++at)  // all but the oldest symbol, and all but the newest
                before[size_t(at)] = uint16_t(way * (kStates / ways) + group), after[size_t(at)] = uint16_t(at);
        for (int64_t steps : {1, 33, 100}) {
            std::vector<float> x(size_t(2 * steps * kLanes));
            for (auto& v : x) v = float(int32_t(rng())) * 4e-8f;
            std::vector<uint16_t> start(2 * kLanes), found(x.size()), expected(x.size());
            for (auto& s : start) s = uint16_t(rng() % kStates);
            for (auto [on, out] : {std::pair{isa, found.data()}, {scalar, expected.data()}})
                if (wf_bitshift_search(on, levels.data(), 0.5f, before.data(), after.data(), &ways, 1, x.data(),
                                       start.data(), 2, steps, out))
                    std::abort();
            expect(found == expected, std::string(wf_isa(isa)) + " search of " + std::to_string(ways) + " ways, " +
                                          std::to_string(steps) + " steps");
        }
        const uint16_t lost = after[7];
        after[7] = after[8];
        std::vector<float> x(kLanes);
        std::vector<uint16_t> start(kLanes), found(kLanes);
        const int twice = wf_bitshift_search(isa, levels.data(), 0.5f, before.data(), after.data(), &ways, 1, x.data(),
                                             start.data(), 1, 1, found.data());
        after[7] = lost, start[5] = kStates;
        const int beyond = wf_bitshift_search(isa, levels.data(), 0.5f, before.data(), after.data(), &ways, 1, x.data(),
                                              start.data(), 1, 1, found.data());
        expect(twice && beyond, "a search among states that are there twice, or from one that is not, is refused");
    }
}

void expect_window_tables_refused(int isa) {
    const std::array<uint8_t, 48> hash{};
    std::array<int8_t, 32> levels{};
    for (int halves : {-1, 0, 1, 11, 12, 1 << 20})
        expect(!wf_window_table_new(isa, halves, hash.data(), levels.data()), "a rate that there is not is refused");
    for (int level : {64, -65}) {
        levels[5] = int8_t(level);
        expect(!wf_window_table_new(isa, 4, hash.data(), levels.data()), "levels of more than 7 bits are refused");
    }
}

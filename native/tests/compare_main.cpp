// Every instruction set of this machine against the scalar code, to the bit: products, rows and rotations of random
// matrices, decoder layers, streams and tasks. Run under the sanitizers and, for NEON, under qemu.
#include <cstdio>
#include <cstring>
#include <utility>

#include "compare.hpp"

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
                compare_matrices(isa, scalar, grid, rows, width);
        for (int halves = 2; halves <= 10; ++halves)
            for (auto [rows, width] : {std::pair<int64_t, int64_t>{1, 1}, {3, 172}, {7, 896}, {10, 1536}, {37, 2561}})
                compare_windows(isa, scalar, halves, rows, width);
        compare_window_search(isa, scalar);
        expect_window_tables_refused(isa);
        for (int64_t width : {1, 3, 64, 172, 1028, 1536, 4100}) {
            std::vector<float> x(size_t(2 * width));
            for (auto& v : x) v = float(int32_t(rng())) * 1e-9f;
            std::vector<float> y = x;
            wf_rotate(isa, x.data(), 2, width, 0);
            wf_rotate(scalar, y.data(), 2, width, 0);
            expect(!std::memcmp(x.data(), y.data(), x.size() * sizeof(float)), "rotation " + std::to_string(width));
        }
        for (int dtype : {WF_FLOAT32, WF_BFLOAT16})
            for (bool biases : {false, true}) compare_layers(isa, scalar, dtype, biases);
        compare_coded(isa, scalar);
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

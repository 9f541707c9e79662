// Tasks: chunks of streams that are multiplied while more of them arrive, with checksums of what was read.
#include "compare.hpp"

#include <cstring>

namespace {

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

}  // namespace

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

// Streams of entropy-coded matrices: docs/format.md has the bytes.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "layout.hpp"
#include "matrix.hpp"
#include "pool.hpp"

namespace waterfill {

// Frequencies [256] that sum to 4096 -> the table; false if they do not.
bool make_table(const uint16_t* frequencies, RansTable& table);

// The code with that many states (1, 4, 8 … 256), or null.
const TrellisCode* trellis_code(int states);

// Symbols -> lanes' states, 4 bytes each, and words; returns their bytes, or -1 if `capacity` is too small or a symbol has
// no frequency.
int64_t rans_encode(const uint8_t* symbols, int64_t count, int lanes, const uint16_t* frequencies, uint8_t* out,
                    int64_t capacity);

// `bytes` bytes of states and words -> `count` symbols; false unless they are exactly that.
bool rans_decode(const Functions& f, const uint8_t* in, int64_t bytes, int lanes, const RansTable& table, int64_t count,
                 uint8_t* out);

struct StreamShape {
    int64_t rows, width;
    int states;
    bool wide;  // levels of 16 bits
};

int64_t stream_rows(int64_t width);  // rows of each stream but the last
int64_t stream_count(const StreamShape& s);
int64_t padded_count(int64_t weights, int* lanes);  // symbols of a stream, and how many lanes they are coded in

// One stream: its rows, its bytes, where their fp16 scales [rows][groups] go, and where their levels.
struct StreamPart {
    int64_t rows;
    const uint8_t* in;
    int64_t bytes;
    uint16_t* scales;
    LevelPlace to;
};

// Row by row, as the codes of a grid of all levels.
LevelPlace in_rows(const StreamShape& s, uint8_t* codes);

// In the layout of the kernels whose bias is `bias`.
LevelPlace in_tiles(const StreamShape& s, uint8_t* codes, int bias);

// Up to kTogether streams, side by side where the instruction set can; `good` is false for those that are damaged.
void read_streams(const Functions& f, const StreamShape& s, const StreamPart* parts, int count, bool* good);

inline int64_t elapsed_ns(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
}

// work(number of a stream, its place among those read together, whether it is good) for each of `count` streams, after
// part(number, place) has said which it is. Adds the time of reading, of all threads.
template <class Part, class Work>
void each_stream(const Functions& f, const StreamShape& s, int64_t count, const Part& part, const Work& work,
                 std::atomic<int64_t>& reading_ns) {
    const int64_t workers = threads(), rounds = ceil_div(ceil_div(count, kTogether), workers);
    const int64_t shares = least(count, rounds * workers);  // equal ones, so that no thread ends long after the others
    parallel(shares, [&](int64_t share) {
        const int64_t first = share * count / shares, stop = (share + 1) * count / shares;
        const auto start = std::chrono::steady_clock::now();
        StreamPart parts[kTogether];
        bool good[kTogether];
        for (int64_t i = first; i < stop; ++i) parts[i - first] = part(i, int(i - first));
        read_streams(f, s, parts, int(stop - first), good);
        reading_ns += elapsed_ns(start);
        for (int64_t i = first; i < stop; ++i) work(i, int(i - first), good[i - first]);
    });
}

// The first damaged stream is the one that is named, whichever thread finds one first.
void lower(std::atomic<int64_t>& least, int64_t value);

}  // namespace waterfill

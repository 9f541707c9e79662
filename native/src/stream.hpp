// Streams of entropy-coded matrices: docs/format.md has the bytes.
#pragma once

#include <atomic>
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

int64_t stream_rows(int64_t width);                // rows of each stream but the last
int64_t stream_count(const StreamShape& s);
int64_t padded_count(int64_t weights, int* lanes);  // symbols of a stream, and how many lanes they are coded in

// One stream: its rows, its bytes, and where their fp16 scales [rows][groups] go.
struct StreamPart {
    int64_t rows;
    const uint8_t* in;
    int64_t bytes;
    uint16_t* scales;
};

// A stream's symbols, in memory of the calling thread, and what makes levels of them.
struct Symbols {
    bool good;  // or else damaged
    Walk walk;
    const uint8_t *raw, *decoded;
    int lanes;
    int64_t count;
};

// One stream or two, which together take much less than twice the time of one.
void read_streams(const Functions& f, const StreamShape& s, const StreamPart* parts, int count, Symbols* found);

// Symbols of a sound stream -> levels [rows * width, rounded up to lanes].
void walk_stream(const Functions& f, const StreamShape& s, const Symbols& symbols, void* levels);

// work(number of a stream, its symbols) for each of `count` streams, two at a time while there are plenty. `part(i)` says
// which one number i is.
template <class Part, class Work>
void each_stream(const Functions& f, const StreamShape& s, int64_t count, const Part& part, const Work& work) {
    std::atomic<int64_t> next{0};
    const int workers = int(least(threads(), count));
    parallel(workers, [&](int64_t) {
        for (int64_t first = next.load(); first < count;) {
            const int take = count - first > 2 * workers ? 2 : 1;
            if (!next.compare_exchange_weak(first, first + take)) continue;
            StreamPart parts[2];
            Symbols found[2];
            for (int i = 0; i < take; ++i) parts[i] = part(first + i);
            read_streams(f, s, parts, take, found);
            for (int i = 0; i < take; ++i) work(first + i, found[i]);
            first = next.load();
        }
    });
}

// The first damaged stream is the one that is named, whichever thread finds one first.
void lower(std::atomic<int64_t>& least, int64_t value);

}  // namespace waterfill

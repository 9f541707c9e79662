#include "lossless.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bitstream.hpp"
#include "coding.hpp"
#include "product.hpp"

namespace waterfill {
namespace {

constexpr int kMostPlanes = 4, kWorth = 32;  // a plane is coded if that saves more than 1 / kWorth of it
constexpr int kLogBits = 16;
constexpr uint8_t kLeastBytes[4] = {0, 0, 1, 0};  // kLeastState
constexpr int64_t kMostTableBytes = 2 + 32 + 384;

// log2 of 1 … 4096 in 16-bit fractions. No value lies near the middle of two: the same on every machine.
struct Logs {
    int32_t of[kSlots + 1];
    Logs() {
        of[0] = 0;
        for (int i = 1; i <= kSlots; ++i) of[i] = int32_t(std::floor(std::log2(double(i)) * (1 << kLogBits) + 0.5));
    }
};
const int32_t* logs() {
    static const Logs table;
    return table.of;
}

// Frequencies that sum to 4096, in integers: rounded down, then those changed that it helps most, or harms least.
void round_counts(const int64_t* counts, int64_t total, uint16_t* frequencies) {
    const int32_t* log = logs();
    int sum = 0;
    for (int s = 0; s < 256; ++s) {
        frequencies[s] = counts[s] ? uint16_t(std::max<int64_t>(1, counts[s] * kSlots / total)) : 0;
        sum += frequencies[s];
    }
    for (; sum < kSlots; ++sum) {
        int best = -1;
        int64_t most = -1;
        for (int s = 0; s < 256; ++s) {
            if (!counts[s]) continue;
            const int64_t gain = counts[s] * (log[frequencies[s] + 1] - log[frequencies[s]]);
            if (gain > most) most = gain, best = s;
        }
        ++frequencies[best];
    }
    for (; sum > kSlots; --sum) {
        int best = -1;
        int64_t least = INT64_MAX;
        for (int s = 0; s < 256; ++s) {
            if (frequencies[s] < 2) continue;
            const int64_t loss = counts[s] * (log[frequencies[s]] - log[frequencies[s] - 1]);
            if (loss < least) least = loss, best = s;
        }
        --frequencies[best];
    }
}

struct Span {
    int first, last, used;  // symbols that occur
    int64_t table_bytes() const { return 2 + (last - first + 8) / 8 + (12 * used + 7) / 8; }
};

Span span_of(const uint16_t* frequencies) {
    Span span{-1, 0, 0};
    for (int s = 0; s < 256; ++s)
        if (frequencies[s]) {
            if (span.first < 0) span.first = s;
            span.last = s;
            ++span.used;
        }
    return span;
}

// First symbol, last, a bit for each that tells whether it occurs, and 12 bits of frequency (4096 as 0) for those.
void put_table(const Span& span, const uint16_t* frequencies, uint8_t* out) {
    std::memset(out, 0, size_t(span.table_bytes()));
    out[0] = uint8_t(span.first), out[1] = uint8_t(span.last);
    uint8_t *map = out + 2, *fields = map + (span.last - span.first + 8) / 8;
    for (int s = span.first, k = 0; s <= span.last; ++s) {
        if (!frequencies[s]) continue;
        map[(s - span.first) / 8] |= uint8_t(1 << (s - span.first) % 8);
        const uint32_t value = frequencies[s] & (kSlots - 1);
        if (k % 2 == 0)
            fields[k / 2 * 3] = uint8_t(value), fields[k / 2 * 3 + 1] = uint8_t(value >> 8);
        else
            fields[k / 2 * 3 + 1] |= uint8_t(value << 4), fields[k / 2 * 3 + 2] = uint8_t(value >> 4);
        ++k;
    }
}

// Bytes of the table, or -1; the frequencies still have to sum to 4096.
int64_t take_table(const uint8_t* in, int64_t bytes, uint16_t* frequencies) {
    if (bytes < 2 || in[0] > in[1]) return -1;
    const int first = in[0], count = in[1] - first + 1, map_bytes = (count + 7) / 8;
    if (bytes < 2 + map_bytes) return -1;
    const uint8_t *map = in + 2, *fields = map + map_bytes;
    int used = 0;
    for (int i = 0; i < 8 * map_bytes; ++i) {
        const bool set = map[i / 8] >> (i % 8) & 1;
        if (set && i >= count) return -1;
        used += set;
    }
    const int64_t size = 2 + map_bytes + (12 * used + 7) / 8;
    if (bytes < size || !(map[0] & 1) || !(map[(count - 1) / 8] >> ((count - 1) % 8) & 1)) return -1;
    if (used % 2 && in[size - 1] >> 4) return -1;
    for (int i = 0, k = 0; i < count; ++i) {
        if (!(map[i / 8] >> (i % 8) & 1)) continue;
        const uint8_t* at = fields + k / 2 * 3;
        const uint32_t value = k % 2 ? at[1] >> 4 | uint32_t(at[2]) << 4 : at[0] | uint32_t(at[1] & 15) << 8;
        frequencies[first + i] = uint16_t(value ? value : kSlots);
        ++k;
    }
    return size;
}

void count_bytes(const uint8_t* plane, int64_t count, int64_t* counts) {
    std::memset(counts, 0, 256 * sizeof *counts);
    uint32_t part[4][256] = {};  // equal neighbours would wait for each other's sum; a stream has no 2^32 bytes
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
        for (int k = 0; k < 4; ++k) ++part[k][plane[i + k]];
    for (; i < count; ++i) ++part[0][plane[i]];
    for (int s = 0; s < 256; ++s) counts[s] = int64_t(part[0][s]) + part[1][s] + part[2][s] + part[3][s];
}

// Numbers, turned left by one bit so that the exponent is at the top and the sign at the bottom, by planes of bytes.
void split(const uint8_t* numbers, int item_bytes, int64_t count, uint8_t* planes, int64_t step) {
    if (item_bytes == 2) {
        uint8_t *high = planes, *low = planes + step;
        for (int64_t i = 0; i < count; ++i) {
            uint16_t v;
            std::memcpy(&v, numbers + 2 * i, 2);
            high[i] = uint8_t(v >> 7), low[i] = uint8_t(v << 1 | v >> 15);
        }
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        uint32_t v;
        std::memcpy(&v, numbers + 4 * i, 4);
        v = v << 1 | v >> 31;
        for (int p = 0; p < 4; ++p) planes[p * step + i] = uint8_t(v >> (24 - 8 * p));
    }
}

void join(const uint8_t* const* plane, int item_bytes, int64_t count, uint8_t* numbers) {
    if (item_bytes == 2) {
        const uint8_t *high = plane[0], *low = plane[1];
        for (int64_t i = 0; i < count; ++i) {
            const uint16_t v = uint16_t(high[i] << 7 | low[i] >> 1 | low[i] << 15);
            std::memcpy(numbers + 2 * i, &v, 2);
        }
        return;
    }
    const uint8_t *a = plane[0], *b = plane[1], *c = plane[2], *d = plane[3];
    for (int64_t i = 0; i < count; ++i) {
        uint32_t v = uint32_t(a[i]) << 24 | uint32_t(b[i]) << 16 | uint32_t(c[i]) << 8 | d[i];
        v = v >> 1 | v << 31;
        std::memcpy(numbers + 4 * i, &v, 4);
    }
}

// What coding a symbol needs: x / freq is x * reciprocal / 2^44, exactly so for x < freq * 2^20 and freq <= 4096.
struct Step {
    uint64_t reciprocal;
    uint32_t limit;  // from this state on a word has to leave first, less one; freq * 2^20 may be 2^32
    uint32_t freq;
    const uint16_t* slots;
};

// `rans_encode` of bitstream.hpp to the same bytes, several times as fast: no division, and no branch on whether a word
// leaves.
int64_t encode_fast(const uint8_t* symbols, int64_t count, int lanes, const uint16_t* frequencies, uint8_t* out) {
    RansTable table;
    if (!make_table(frequencies, table)) return -1;
    uint16_t slot_of[kSlots];
    uint32_t start[256];
    Step steps[256];
    for (uint32_t s = 0, sum = 0; s < 256; sum += frequencies[s++]) {
        const uint64_t freq = frequencies[s];
        start[s] = sum;
        steps[s] = {freq ? ((uint64_t(1) << 44) + freq - 1) / freq : 0, uint32_t((freq << 20) - 1), uint32_t(freq),
                    slot_of + sum};
    }
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
        const uint32_t entry = table.slots[slot];
        slot_of[start[entry >> 24] + (entry >> 12 & 4095)] = uint16_t(slot);
    }
    uint32_t x[kMostLanes];
    for (int lane = 0; lane < lanes; ++lane) x[lane] = kLeastState;
    if (frequencies[symbols[0]] == kSlots) {  // no word is ever written
        for (int lane = 0; lane < lanes; ++lane) std::memcpy(out + 4 * lane, kLeastBytes, 4);
        return 4 * lanes;
    }
    uint8_t* const end = out + 4 * lanes + 2 * count;  // words are written backwards, and moved
    uint8_t* at = end;
    for (int64_t i = count - lanes; i >= 0; i -= lanes)
        for (int lane = lanes - 1; lane >= 0; --lane) {
            const Step& step = steps[symbols[i + lane]];
            uint32_t state = x[lane];
            const uint16_t word = uint16_t(state);
            std::memcpy(at - 2, &word, 2);
            const uint32_t leaves = state > step.limit;
            at -= 2 * leaves;
            state >>= 16 * leaves;
            const uint32_t quotient = uint32_t(state * step.reciprocal >> 44);
            x[lane] = quotient << kSlotBits | step.slots[state - quotient * step.freq];
        }
    std::memcpy(out, x, 4 * size_t(lanes));
    std::memmove(out + 4 * lanes, at, size_t(end - at));
    return 4 * lanes + (end - at);
}

}  // namespace

int64_t exact_capacity(int item_bytes, int64_t count) {
    return 1 + item_bytes * (kMostTableBytes + 4 + 4 * kMostLanes + 2 * (count + kMostLanes));
}

int64_t encode_exact(const uint8_t* numbers, int item_bytes, int64_t count, uint8_t* out) {
    int lanes;
    const int64_t padded = padded_count(count, &lanes);
    uint8_t* planes = scratch(kSymbols, item_bytes * padded);
    split(numbers, item_bytes, count, planes, padded);

    uint16_t frequencies[kMostPlanes][256];
    Span spans[kMostPlanes];
    int coded = 0, last = -1;
    for (int p = 0; p < item_bytes; ++p) {
        int64_t counts[256];
        count_bytes(planes + p * padded, count, counts);
        round_counts(counts, count, frequencies[p]);
        spans[p] = span_of(frequencies[p]);
        int64_t bits = 0;
        for (int s = 0; s < 256; ++s)
            if (counts[s]) bits += counts[s] * ((kSlotBits << kLogBits) - logs()[frequencies[p][s]]);
        const int64_t bytes = spans[p].table_bytes() + 4 * lanes + (bits >> (kLogBits + 3));
        if (bytes + count / kWorth < count) coded |= 1 << p, last = p;
    }
    uint8_t* at = out;
    *at++ = uint8_t(coded);
    for (int p = 0; p < item_bytes; ++p)
        if (!(coded >> p & 1)) std::memcpy(at, planes + p * padded, size_t(count)), at += count;
    for (int p = 0; p < item_bytes; ++p) {
        if (!(coded >> p & 1)) continue;
        uint8_t* plane = planes + p * padded;
        const int likeliest = int(std::max_element(frequencies[p], frequencies[p] + 256) - frequencies[p]);
        std::memset(plane + count, likeliest, size_t(padded - count));
        uint8_t* from = at + (p == last ? 0 : 4);
        put_table(spans[p], frequencies[p], from);
        const int64_t table = spans[p].table_bytes();
        const int64_t size = encode_fast(plane, padded, lanes, frequencies[p], from + table);
        if (size < 0) return -1;
        if (p != last)
            for (int b = 0; b < 4; ++b) at[b] = uint8_t((table + size) >> (8 * b));
        at = from + table + size;
    }
    return at - out;
}

bool decode_exact(const Functions& f, const uint8_t* in, int64_t bytes, int item_bytes, int64_t count,
                  uint8_t* numbers) {
    if (bytes < 1 || in[0] >> item_bytes) return false;
    const int coded = in[0];
    const uint8_t *at = in + 1, *end = in + bytes, *plane[kMostPlanes];
    int last = -1;
    for (int p = 0; p < item_bytes; ++p) {
        if (coded >> p & 1) {
            last = p;
            continue;
        }
        if (end - at < count) return false;
        plane[p] = at;
        at += count;
    }
    int lanes;
    const int64_t padded = padded_count(count, &lanes);
    uint8_t* decoded = coded ? scratch(kSymbols, item_bytes * padded) : nullptr;
    for (int p = 0; p < item_bytes; ++p) {
        if (!(coded >> p & 1)) continue;
        int64_t size = end - at;
        if (p != last) {
            if (size < 4) return false;
            const int64_t said = int64_t(at[0]) | int64_t(at[1]) << 8 | int64_t(at[2]) << 16 | int64_t(at[3]) << 24;
            at += 4;
            if (said > size - 4) return false;
            size = said;
        }
        uint16_t frequencies[256] = {};
        RansTable table;
        const int64_t head = take_table(at, size, frequencies);
        if (head < 0 || !make_table(frequencies, table)) return false;
        uint8_t* out = decoded + p * padded;
        if (frequencies[at[0]] == kSlots) {  // one symbol, which changes no state: so it is with weights of fewer bits
            if (size - head != 4 * lanes) return false;
            for (int lane = 0; lane < lanes; ++lane)
                if (std::memcmp(at + head + 4 * lane, kLeastBytes, 4)) return false;
            std::memset(out, at[0], size_t(count));
        } else if (!rans_decode(f, at + head, size - head, lanes, table, padded, out)) {
            return false;
        }
        plane[p] = out;
        at += size;
    }
    if (at != end) return false;
    join(plane, item_bytes, count, numbers);
    return true;
}

}  // namespace waterfill

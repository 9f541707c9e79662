#include "bitstream.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "half.hpp"
#include "layout.hpp"
#include "product.hpp"
#include "rans.hpp"

namespace waterfill {
namespace {

constexpr int64_t kStreamWeights = 1 << 18;
constexpr int64_t kLaneWeights = 4096;  // a lane costs two bytes and the choice of its first state

// Ungerboeck (1987), table I: h0 and h1 without their last bits, which are 1 and 0.
const TrellisCode kCodes[] = {{1, 0, 0},
                              {4, 05 >> 1, 02 >> 1},
                              {8, 013 >> 1, 04 >> 1},
                              {16, 023 >> 1, 04 >> 1},
                              {32, 045 >> 1, 010 >> 1},
                              {64, 0103 >> 1, 024 >> 1},
                              {128, 0235 >> 1, 0126 >> 1},
                              {256, 0515 >> 1, 0362 >> 1}};

int buckets_of(int symbols) {
    int bits = 4;
    while ((1 << bits) < symbols) ++bits;
    return bits;
}

// Reads little-endian numbers and bit fields of a stream; `good` turns false at its end.
struct Reader {
    const uint8_t *at, *end;
    bool good = true;

    const uint8_t* take(int64_t bytes) {
        if (bytes < 0 || end - at < bytes) {
            good = false;
            return nullptr;
        }
        const uint8_t* from = at;
        at += bytes;
        return from;
    }
    uint32_t number(int bytes) {
        const uint8_t* from = take(bytes);
        uint32_t value = 0;
        for (int i = 0; from && i < bytes; ++i) value |= uint32_t(from[i]) << (8 * i);
        return value;
    }
};

uint32_t field(const uint8_t* from, int64_t index, int bits) {
    const int64_t first = index * bits;
    uint32_t value = 0;
    for (int b = 0; b < bits; ++b) value |= uint32_t(from[(first + b) / 8] >> ((first + b) % 8) & 1) << b;
    return value;
}

// Probabilities c^(p^2) of the numbers p = 4j + offset, by repeated products of 32-bit fractions: the same everywhere.
void gaussian_frequencies(uint32_t c, int symbols, int center, int offset, uint16_t* frequencies) {
    auto product = [](uint64_t a, uint64_t b) { return a * b >> 32; };
    const uint64_t c8 = [&] {
        const uint64_t c2 = product(c, c), c4 = product(c2, c2);
        return product(c4, c4);
    }();
    auto power = [&](int n) {  // c^n
        uint64_t value = uint64_t(1) << 32;
        for (; n >= 8; n -= 8) value = product(value, c8);
        for (; n > 0; --n) value = product(value, c);
        return value;
    };
    auto weights = [&](int p, int count, std::vector<uint64_t>& out) {  // of p, p + 4, p + 8 …
        uint64_t value = power(p * p), ratio = power(8 * p + 16);
        const uint64_t c32 = power(32);
        for (int i = 0; i < count; ++i) {
            out.push_back(value);
            value = product(value, ratio);
            ratio = product(ratio, c32);
        }
    };
    std::vector<uint64_t> above, below;
    weights(offset, symbols - center, above);
    weights(4 - offset, center, below);
    uint64_t total = 0;
    for (uint64_t w : above) total += w;
    for (uint64_t w : below) total += w;
    int sum = 0;
    for (int s = 0; s < symbols; ++s) {
        const uint64_t w = s >= center ? above[size_t(s - center)] : below[size_t(center - 1 - s)];
        const uint64_t share = total ? (w * uint64_t(kSlots - symbols) + total / 2) / total : 0;
        frequencies[s] = uint16_t(1 + share);
        sum += frequencies[s];
    }
    int largest = 0;
    for (int s = 1; s < symbols; ++s)
        if (frequencies[s] > frequencies[largest]) largest = s;
    frequencies[largest] = uint16_t(frequencies[largest] + kSlots - sum);
}

// 2^(code / 8) times `unit`; code 0 is a group of zeros.
uint16_t scale_of(float unit, uint32_t code) {
    static const float kEighths[8] = {1.0f,        1.09050773f, 1.18920712f, 1.29683955f,
                                      1.41421356f, 1.54221083f, 1.68179283f, 1.83400809f};
    if (code == 0) return 0;
    const uint32_t octave = (code - 1) / 8;
    return float_to_half(unit * kEighths[(code - 1) % 8] * bits_to_float((127 + octave) << 23));
}

}  // namespace

bool make_table(const uint16_t* frequencies, RansTable& t) {
    int symbols = 0, sum = 0;
    for (int s = 0; s < 256; ++s) {
        sum += frequencies[s];
        if (frequencies[s]) symbols = s + 1;
    }
    if (sum != kSlots) return false;
    t.bucket_bits = buckets_of(symbols);
    const int buckets = 1 << t.bucket_bits, capacity = kSlots >> t.bucket_bits;
    int left[256], own[256], alias[256], small[256], large[256], smalls = 0, larges = 0, next = 0;
    for (int b = 0; b < buckets; ++b) {
        left[b] = frequencies[b], own[b] = capacity, alias[b] = b;
        if (left[b] < capacity)
            small[smalls++] = b;
        else
            large[larges++] = b;
    }
    for (int i = 0; i < smalls; ++i) {
        const int s = small[i], a = large[next];
        own[s] = left[s], alias[s] = a;
        left[a] -= capacity - left[s];
        if (left[a] < capacity) small[smalls++] = a, ++next;
    }
    int given[256] = {};
    for (int b = 0; b < buckets; ++b) {
        auto part = [&](int symbol, int from, int to) {
            const int first = b * capacity + from, k = given[symbol];
            const uint32_t head = uint32_t(symbol) << 24, tail = uint32_t(frequencies[symbol] - 1) & 4095;
            for (int i = 0; i < to - from; ++i) t.slots[first + i] = head | uint32_t(k + i) << 12 | tail;
            given[symbol] += to - from;
            return head | (uint32_t(k - first) & 4095) << 12 | tail;
        };
        const uint32_t mine = part(b, 0, own[b]), theirs = part(alias[b], own[b], capacity);
        if (buckets <= 32) t.threshold[b] = uint32_t(b * capacity + own[b]), t.own[b] = mine, t.other[b] = theirs;
    }
    for (int b = buckets; b < 32; ++b) {  // registers of 32 entries
        const int from = b % std::min(buckets, 32);
        t.threshold[b] = t.threshold[from], t.own[b] = t.own[from], t.other[b] = t.other[from];
    }
    return true;
}

const TrellisCode* trellis_code(int states) {
    for (const TrellisCode& code : kCodes)
        if (code.states == states) return &code;
    return nullptr;
}

int64_t rans_encode(const uint8_t* symbols, int64_t count, int lanes, const uint16_t* frequencies, uint8_t* out,
                    int64_t capacity) {
    RansTable table;
    if (!make_table(frequencies, table)) return -1;
    std::vector<uint16_t> slot_of(kSlots);
    uint32_t start[256];
    for (uint32_t s = 0, sum = 0; s < 256; sum += frequencies[s++]) start[s] = sum;
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
        const uint32_t entry = table.slots[slot];
        slot_of[start[entry >> 24] + (entry >> 12 & 4095)] = uint16_t(slot);
    }
    std::vector<uint32_t> x(size_t(lanes), kLeastState);
    std::vector<uint16_t> words;  // last first
    words.reserve(size_t(count / 2));
    for (int64_t i = count - 1; i >= 0; --i) {
        const uint32_t s = symbols[i], freq = frequencies[s];
        uint32_t& state = x[size_t(i % lanes)];
        if (freq == 0) return -1;
        if (state >= uint64_t(freq) << (32 - kSlotBits)) words.push_back(uint16_t(state)), state >>= 16;
        state = state / freq << kSlotBits | slot_of[start[s] + state % freq];
    }
    const int64_t bytes = 4 * int64_t(lanes) + 2 * int64_t(words.size());
    if (bytes > capacity) return -1;
    auto put = [&](uint32_t value, int size) {
        for (int b = 0; b < size; ++b) *out++ = uint8_t(value >> (8 * b));
    };
    for (uint32_t state : x) put(state, 4);
    for (size_t i = words.size(); i-- > 0;) put(words[i], 2);
    return bytes;
}

namespace {

// Reads the states of `lanes` lanes; false where they cannot be.
bool read_states(Reader& reader, int lanes, uint32_t* x) {
    for (int lane = 0; lane < lanes; ++lane) x[lane] = reader.number(4);
    return reader.good && std::all_of(x, x + lanes, [](uint32_t state) { return state >= kLeastState; });
}

// Whether a stream ends where and as it began.
bool ended(const uint8_t* at, const uint8_t* end, const uint32_t* x, int lanes) {
    return at == end && std::all_of(x, x + lanes, [](uint32_t state) { return state == kLeastState; });
}

}  // namespace

bool rans_decode(const Functions& f, const uint8_t* in, int64_t bytes, int lanes, const RansTable& table, int64_t count,
                 uint8_t* out) {
    if (lanes < 1 || lanes > kMostLanes || count % lanes) return false;
    Reader reader{in, in + bytes};
    uint32_t x[kMostLanes];
    return read_states(reader, lanes, x) && f.decode_symbols(table, lanes, x, reader.at, reader.end, count, out) &&
           ended(reader.at, reader.end, x, lanes);
}

int64_t stream_rows(int64_t width) { return kTile * most(1, kStreamWeights / (kTile * width)); }

int64_t stream_count(const BitstreamShape& s) { return ceil_div(s.rows, stream_rows(s.width)); }

int64_t padded_count(int64_t weights, int* lanes) {
    *lanes = kMostLanes;
    while (*lanes > 1 && weights < *lanes * kLaneWeights) *lanes /= 2;
    return ceil_div(weights, *lanes) * *lanes;
}

namespace {

// Everything before the words: false where that is damaged.
bool open_stream(const BitstreamShape& s, const BitstreamPart& part, LevelReader& r) {
    Reader reader{part.in, part.in + part.bytes};
    const int64_t rows = part.rows;
    uint16_t* scales = part.scales;
    const TrellisCode* code = trellis_code(s.states);
    const uint32_t flags = reader.number(1), symbols = reader.number(1) + 1, center = reader.number(1);
    const uint32_t scale_bits = reader.number(1);
    const float unit = bits_to_float(reader.number(4));
    const int raw_bits = int(flags >> 4);
    const bool with_table = flags & 1, with_levels = flags & 2;
    const int64_t most = s.wide ? 511 : 31, least = (s.wide ? 512 : 32) - (s.states == 1);  // j from -least to most
    if (!reader.good || !code || (flags & 12) || scale_bits > 8 || center >= symbols) return false;
    if (!(unit >= 0 && unit < 65504.0f) || raw_bits > (s.wide ? 6 : 0)) return false;
    if (with_levels && (symbols > 16 || s.wide)) return false;
    if (int64_t(center) << raw_bits > least || (int64_t(symbols - center) << raw_bits) - 1 > most) return false;

    const int64_t groups = groups_of(s.width), scale_count = rows * groups;
    const uint8_t* packed_scales = reader.take(ceil_div(scale_count * scale_bits, 8));
    if (!reader.good) return false;
    for (int64_t i = 0; i < scale_count; ++i) {
        scales[i] = scale_of(unit, scale_bits ? field(packed_scales, i, int(scale_bits)) : 1);
        if ((scales[i] & 0x7c00) == 0x7c00) return false;  // infinite
    }

    uint16_t frequencies[256] = {};
    if (with_table) {
        const uint8_t* packed = reader.take(ceil_div(int64_t(symbols) * kSlotBits, 8));
        if (!reader.good) return false;
        for (uint32_t i = 0; i < symbols; ++i) frequencies[i] = uint16_t(field(packed, i, kSlotBits));
        if (symbols == 1) frequencies[0] = kSlots;
    } else {
        gaussian_frequencies(reader.number(4), int(symbols), int(center), s.states > 1, frequencies);
    }
    const uint8_t* values = with_levels ? reader.take(symbols) : nullptr;
    for (uint32_t i = 0; values && i < symbols; ++i)
        if (int8_t(values[i]) == -128) return false;  // has no negative
    if (!reader.good || !make_table(frequencies, r.table)) return false;

    r.left = padded_count(rows * s.width, &r.lanes);
    r.raw = reader.take(ceil_div(r.left * raw_bits, 8));
    r.walk = {*code, int(center), raw_bits, reinterpret_cast<const int8_t*>(values)};
    std::fill(r.state, r.state + kMostLanes, uint8_t(0));
    if (!reader.good || !read_states(reader, r.lanes, r.x)) return false;
    r.at = reader.at, r.end = reader.end;
    return true;
}

template <class Level>
void put_levels(const Level* levels, int64_t rows, int64_t width, const LevelPlace& to) {
    for (int64_t row = 0; row < rows; ++row) {
        uint8_t* out = to.codes + row / kTile * to.tile + row % kTile * to.row;
        for (int64_t column = 0; column < width; column += kChunk, out += to.chunk) {
            Level flipped[kChunk];
            const int64_t filled = least(kChunk, width - column);
            if (filled < kChunk) std::fill(flipped + filled, flipped + kChunk, Level(to.flip));
            for (int64_t i = 0; i < filled; ++i) flipped[i] = Level(levels[row * width + column + i] ^ Level(to.flip));
            std::memcpy(out, flipped, size_t(to.padded ? kChunk : filled) * sizeof(Level));
        }
    }
}

// All of a stream, symbols first.
template <class Level>
bool decode_levels(const Functions& f, const BitstreamShape& s, LevelReader& r, const BitstreamPart& part) {
    uint8_t* symbols = scratch(kSymbols, r.left);
    Level* levels = reinterpret_cast<Level*>(scratch(kLevels, r.left * int64_t(sizeof(Level))));
    if (!f.decode_symbols(r.table, r.lanes, r.x, r.at, r.end, r.left, symbols)) return false;
    if constexpr (sizeof(Level) == 2)
        f.walk_wide(r.walk, r.lanes, r.state, r.left, symbols, r.raw, levels);
    else
        f.walk(r.walk, r.lanes, r.state, r.left, symbols, levels);
    r.left = 0;
    put_levels(levels, part.rows, s.width, part.to);
    return true;
}

// Rows that fill the last tile.
void pad_rows(int64_t rows, int64_t width, int64_t item, const LevelPlace& to) {
    for (int64_t row = rows; to.padded && row % kTile; ++row)
        for (int64_t c = 0; c < chunks_per_row(width, 1); ++c)
            std::memset(to.codes + row / kTile * to.tile + row % kTile * to.row + c * to.chunk, 0,
                        size_t(kChunk * item));
}

}  // namespace

LevelPlace in_rows(const BitstreamShape& s, uint8_t* codes) {
    const int64_t item = s.wide ? 2 : 1, row = s.width * item;
    return {codes, kTile * row, row, kChunk * item, false, uint16_t(s.wide ? 0x8000 : 0x80)};
}

LevelPlace in_tiles(const BitstreamShape& s, uint8_t* codes, int bias) {
    const int64_t chunk = kChunk * (s.wide ? 2 : 1);
    // adding 128 turns the upper bit over
    return {codes, chunks_per_row(s.width, 1) * kTile * chunk, chunk, kTile * chunk, true, uint16_t(s.wide ? 0 : bias)};
}

void read_streams(const Functions& f, const BitstreamShape& s, const BitstreamPart* parts, int count, bool* good) {
    LevelReader readers[kTogether], *sound[kTogether];
    LevelPlace places[kTogether];
    int sounds = 0;
    int64_t rows = INT64_MAX;  // that all have
    for (int i = 0; i < count; ++i) {
        readers[i].good = open_stream(s, parts[i], readers[i]);
        if (!readers[i].good) continue;
        sound[sounds] = &readers[i], places[sounds] = parts[i].to, ++sounds;
        rows = least(rows, parts[i].rows);
    }
    const bool together = !s.wide && sounds > 1 && f.decode_rows(sound, places, sounds, s.width, 0, rows);
    for (int i = 0; i < count; ++i) {
        LevelReader& r = readers[i];
        LevelReader* const alone = &r;
        const BitstreamPart& part = parts[i];
        const int64_t done = together ? rows : 0;
        if (r.good && !s.wide && done < part.rows) f.decode_rows(&alone, &part.to, 1, s.width, done, part.rows);
        if (r.good && r.left)
            r.good = s.wide ? decode_levels<int16_t>(f, s, r, part) : decode_levels<int8_t>(f, s, r, part);
        good[i] = r.good && ended(r.at, r.end, r.x, r.lanes);
        if (good[i]) pad_rows(part.rows, s.width, s.wide ? 2 : 1, part.to);
    }
}

void lower(std::atomic<int64_t>& least, int64_t value) {
    for (int64_t now = least.load(); value < now && !least.compare_exchange_weak(now, value);) {
    }
}

}  // namespace waterfill

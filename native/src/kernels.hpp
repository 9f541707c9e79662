// Products of packed matrices with activations, once for all instruction sets: `Isa` supplies vectors of 64 bytes.
//
// Activations are rotated and quantised to integers per group (prepare.hpp), table entries are integers too, so that
// sums inside a group are exact; between groups there is one order of float operations:
//
//     y[t, r] = sum over groups g of  (sum of table[code] * x) as float * (scale[r, g] * x_scale[t, g])
//
// Hence every instruction set, batch size and path below gives the same bits.
//
//     few tokens, byte tables   tile_from_codes: codes -> registers -> dot product, nothing written
//     anything else             decode_tile: four rows to a buffer, then dots_from_buffer or the instruction set's gemm
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "checksum.hpp"
#include "hadamard.hpp"
#include "half.hpp"
#include "layer_math.hpp"
#include "layout.hpp"
#include "matrix.hpp"
#include "rans.hpp"
#include "trellis.hpp"

namespace waterfill {
namespace {

#if defined(__GNUC__)
#define WF_UNROLL _Pragma("GCC unroll 32")  // or an array of vectors would not be one of registers
#else
#define WF_UNROLL
#endif

constexpr int kAhead = 4096;         // bytes: codes are fetched before they are needed, across pages too
constexpr int64_t kExactWords = 512;  // products of 2047 * 2047 that surely fit an int32 sum

template <class Isa>
struct Kernels {
    using Bytes = typename Isa::Bytes;
    using Acc = typename Isa::Acc;

    static bool from_codes(const Table& t) {
        if (t.direct) return true;
        if (t.precision != 8 || t.bits > 8) return false;
        return t.p == 1 ? t.bits <= 4 : t.p == 2 || (t.p == 4 && t.bits >= 3 && Isa::quadruples);
    }
    static bool from_words(const Table& t) { return t.precision == 16 && t.p == 1 && t.bits >= 5 && t.bits <= 8; }
    static int order(const Table& t) {
        if (t.direct || Isa::interleaved(t.bits, t.p) || !(from_codes(t) || from_words(t))) return 1;
        return t.p == 4 ? 4 : 2;
    }

    template <class Element>
    static const Element* row(const Prepared& x, int64_t t) {
        return reinterpret_cast<const Element*>(x.data) + t * x.padded;
    }

    // Levels of 8 bits are what a table of them would give.
    struct Direct {
        explicit Direct(const Table&) {}
        void look_up(const Bytes (&index)[2], Bytes (&value)[2]) const { value[0] = index[0], value[1] = index[1]; }
    };
    template <int BITS, int P>
    using TableOf = std::conditional_t<BITS == 8 && P == 1, Direct, typename Isa::template Table<BITS, P>>;

    // --- few tokens, byte tables -------------------------------------------------------------------------------

    template <int BITS, int P, int TOKENS>
    static void tile_from_codes(const Matrix& m, int64_t tile, const Prepared& x, int64_t token, float* y) {
        constexpr int bytes = planes_of(BITS).bytes;
        const TableOf<BITS, P> table(*m.table);
        const int64_t chunks = chunks_per_row(m.width, P), groups = x.groups;
        const uint8_t* code = m.codes + tile * chunks * kTile * bytes;
        const uint16_t* scale = m.scales + tile * groups * kTile;
        const int8_t* activations[TOKENS];
        for (int t = 0; t < TOKENS; ++t) activations[t] = row<int8_t>(x, token + t);
        float sum[TOKENS][kTile] = {};
        for (int64_t g = 0, chunk = 0; g < groups; ++g, scale += kTile) {
            const int64_t end = g + 1 < groups ? (g + 1) * (kGroup / P / kChunk) : chunks;
            Acc acc[TOKENS][kTile];
            for (int t = 0; t < TOKENS; ++t)
                for (int r = 0; r < kTile; ++r) acc[t][r] = Isa::start(x.corrections[(token + t) * groups + g]);
            for (; chunk < end; ++chunk) {
                for (int line = 0; line < kTile * bytes; line += 64) Isa::prefetch(code + kAhead + line);
                for (int r = 0; r < kTile; ++r, code += bytes) {
                    Bytes index[2], value[2 * P];
                    Isa::template codes<BITS>(code, index);
                    table.look_up(index, value);
                    for (int t = 0; t < TOKENS; ++t)
                        for (int k = 0; k < 2 * P; ++k)
                            acc[t][r] = Isa::dot(acc[t][r], value[k], activations[t] + chunk * kChunk * P + 64 * k);
                }
            }
            float factor[kTile];
            for (int r = 0; r < kTile; ++r) factor[r] = half_to_float(scale[r]) * m.step;
            for (int t = 0; t < TOKENS; ++t) {
                int32_t whole[kTile];
                Isa::reduce(acc[t], whole);
                const float by = x.scales[(token + t) * groups + g];
                for (int r = 0; r < kTile; ++r) sum[t][r] += float(whole[r]) * (factor[r] * by);
            }
        }
        std::memcpy(y, sum, sizeof sum);
    }

    // Eight tokens, where registers hold the sums of two rows: two of a group, and then the other two. What is loaded of
    // the activations serves both.
    template <int BITS, int P>
    static void tile_for_eight(const Matrix& m, int64_t tile, const Prepared& x, int64_t token, float* y) {
        constexpr int bytes = planes_of(BITS).bytes, tokens = 8, pair = 2, sums = tokens * pair / kTile;
        const TableOf<BITS, P> table(*m.table);
        const int64_t chunks = chunks_per_row(m.width, P), groups = x.groups;
        const uint8_t* codes = m.codes + tile * chunks * kTile * bytes;
        const uint16_t* scale = m.scales + tile * groups * kTile;
        const int8_t* activations = row<int8_t>(x, token);
        float sum[tokens][kTile] = {};
        for (int64_t g = 0; g < groups; ++g, scale += kTile) {
            const int64_t start = g * (kGroup / P / kChunk), end = g + 1 < groups ? start + kGroup / P / kChunk : chunks;
            for (int first = 0; first < kTile; first += pair) {
                Acc acc[sums][kTile];  // of token t and row first + r: number t * pair + r
                WF_UNROLL for (int i = 0; i < tokens * pair; ++i)
                    acc[i / kTile][i % kTile] = Isa::start(x.corrections[(token + i / pair) * groups + g]);
                const uint8_t* ahead = codes + (start * kTile + (end - start) * first) * bytes + kAhead;
                for (int64_t chunk = start; chunk < end; ++chunk, ahead += pair * bytes) {
                    for (int line = 0; line < pair * bytes; line += 64) Isa::prefetch(ahead + line);
                    Bytes value[pair][2 * P];
                    WF_UNROLL for (int r = 0; r < pair; ++r) {
                        Bytes index[2];
                        Isa::template codes<BITS>(codes + (chunk * kTile + first + r) * bytes, index);
                        table.look_up(index, value[r]);
                    }
                    const int8_t* from = activations + chunk * kChunk * P;
                    WF_UNROLL for (int k = 0; k < 2 * P; ++k)
                        WF_UNROLL for (int i = 0; i < tokens * pair; ++i) {
                            Acc& to = acc[i / kTile][i % kTile];
                            to = Isa::dot(to, value[i % pair][k], from + i / pair * x.padded + 64 * k);
                        }
                }
                const float factor[pair] = {half_to_float(scale[first]) * m.step, half_to_float(scale[first + 1]) * m.step};
                for (int i = 0; i < sums; ++i) {
                    int32_t whole[kTile];
                    Isa::reduce(acc[i], whole);
                    for (int k = 0; k < kTile; ++k) {
                        const int t = (i * kTile + k) / pair, r = k % pair;
                        sum[t][first + r] += float(whole[k]) * (factor[r] * x.scales[(token + t) * groups + g]);
                    }
                }
            }
        }
        std::memcpy(y, sum, sizeof sum);
    }

    // Levels of 16 bits: no table, and sums of 512 that are exact.
    template <int TOKENS>
    static void tile_from_words(const Matrix& m, int64_t tile, const Prepared& x, int64_t token, float* y) {
        const int64_t stride = chunks_per_row(m.width, 1) * kChunk * 2, groups = x.groups;
        const uint8_t* codes = m.codes + tile * kTile * stride;
        const uint16_t* scale = m.scales + tile * groups * kTile;
        float sum[TOKENS][kTile] = {};
        for (int64_t g = 0; g < groups; ++g, scale += kTile) {
            const int64_t end = g + 1 < groups ? (g + 1) * kGroup : ceil_div(m.width, kChunk) * kChunk;
            float total[TOKENS][kTile] = {};
            for (int64_t from = g * kGroup; from < end; from += kExactWords) {
                Acc acc[TOKENS][kTile];
                for (int t = 0; t < TOKENS; ++t)
                    for (int r = 0; r < kTile; ++r) acc[t][r] = Isa::start(0);
                for (int64_t at = from; at < least(end, from + kExactWords); at += kChunk) {
                    const uint8_t* code = codes + at * 2 * kTile;
                    for (int line = 0; line < kTile * 2 * kChunk; line += 64) Isa::prefetch(code + kAhead + line);
                    for (int r = 0; r < kTile; ++r)
                        for (int k = 0; k < kChunk; k += 32) {
                            const Bytes w = Isa::load(code + r * 2 * kChunk + 2 * k);
                            for (int t = 0; t < TOKENS; ++t)
                                acc[t][r] = Isa::dot_words(acc[t][r], w, row<int16_t>(x, token + t) + at + k);
                        }
                }
                for (int t = 0; t < TOKENS; ++t) {
                    int32_t whole[kTile];
                    Isa::reduce(acc[t], whole);
                    for (int r = 0; r < kTile; ++r) total[t][r] += float(whole[r]);
                }
            }
            for (int t = 0; t < TOKENS; ++t)
                for (int r = 0; r < kTile; ++r)
                    sum[t][r] += total[t][r] * (half_to_float(scale[r]) * m.step * x.scales[(token + t) * groups + g]);
        }
        std::memcpy(y, sum, sizeof sum);
    }

    using Tile = void (*)(const Matrix&, int64_t, const Prepared&, int64_t, float*);

    template <int P, int TOKENS>
    static Tile tile_for(int bits) {
        switch (bits) {
            case 1: return tile_from_codes<1, P, TOKENS>;
            case 2: return tile_from_codes<2, P, TOKENS>;
            case 3: return tile_from_codes<3, P, TOKENS>;
            case 4: return tile_from_codes<4, P, TOKENS>;
        }
        if constexpr (P == 1) return bits == 8 ? tile_from_codes<8, 1, TOKENS> : tile_from_words<TOKENS>;
        if constexpr (P > 1) switch (bits) {
                case 5: return tile_from_codes<5, P, TOKENS>;
                case 6: return tile_from_codes<6, P, TOKENS>;
                case 7: return tile_from_codes<7, P, TOKENS>;
                case 8: return tile_from_codes<8, P, TOKENS>;
            }
        return nullptr;
    }

    template <int TOKENS>
    static Tile tile_for(const Table& t) {
        if constexpr (Isa::quadruples)
            if (t.p == 4) return tile_for<4, TOKENS>(t.bits);
        return t.p == 1 ? tile_for<1, TOKENS>(t.bits) : tile_for<2, TOKENS>(t.bits);
    }

    template <int P>
    static Tile eight_for(int bits) {
        switch (bits) {
            case 1: return tile_for_eight<1, P>;
            case 2: return tile_for_eight<2, P>;
            case 3: return tile_for_eight<3, P>;
            case 4: return tile_for_eight<4, P>;
            case 8: return tile_for_eight<8, P>;
        }
        if constexpr (P > 1) switch (bits) {
                case 5: return tile_for_eight<5, P>;
                case 6: return tile_for_eight<6, P>;
                case 7: return tile_for_eight<7, P>;
            }
        return nullptr;
    }

    // Null where eight tokens are no more than twice four.
    static Tile eight_for(const Table& t) {
        if constexpr (Isa::eight_tokens) return t.p == 1 ? eight_for<1>(t.bits) : t.p == 2 ? eight_for<2>(t.bits) : nullptr;
        return nullptr;
    }

    // Rows first … last of the product with few tokens; y [tokens][rows].
    static void few(const Matrix& m, const Prepared& x, int64_t first_tile, int64_t last_tile, float* y) {
        const Tile one = tile_for<1>(*m.table), two = tile_for<2>(*m.table), four = tile_for<4>(*m.table);
        const Tile eight = eight_for(*m.table);
        float out[8 * kTile];
        for (int64_t tile = first_tile; tile < last_tile; ++tile)
            for (int64_t token = 0; token < x.tokens;) {
                const int64_t left = x.tokens - token;
                const int64_t count = left >= 8 && eight ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
                (count == 8 ? eight : count == 4 ? four : count == 2 ? two : one)(m, tile, x, token, out);
                scatter(m, out, tile, token, count, y);
                token += count;
            }
    }

    static void scatter(const Matrix& m, const float* out, int64_t tile, int64_t token, int64_t tokens, float* y) {
        const int64_t row = tile * kTile, rows = least(kTile, m.rows - row);
        for (int64_t t = 0; t < tokens; ++t)
            std::memcpy(y + (token + t) * m.rows + row, out + t * kTile, size_t(rows) * sizeof(float));
    }

    // --- decoding to a buffer ----------------------------------------------------------------------------------

    template <int BITS, int P>
    static void decode_bytes(const Matrix& m, int64_t tile, uint8_t* out, int64_t stride) {
        constexpr int bytes = planes_of(BITS).bytes;
        const TableOf<BITS, P> table(*m.table);
        const int64_t chunks = chunks_per_row(m.width, P);
        const uint8_t* code = m.codes + tile * chunks * kTile * bytes;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            for (int r = 0; r < kTile; ++r, code += bytes) {
                Bytes index[2], value[2 * P];
                Isa::template codes<BITS>(code, index);
                table.look_up(index, value);
                for (int k = 0; k < 2 * P; ++k) Isa::store(out + r * stride + chunk * kChunk * P + 64 * k, value[k]);
            }
    }

    template <int P>
    static void decode_vectors(const Matrix& m, int64_t tile, uint8_t* out, int64_t stride) {
        switch (m.table->bits) {
            case 1: return decode_bytes<1, P>(m, tile, out, stride);
            case 2: return decode_bytes<2, P>(m, tile, out, stride);
            case 3: return decode_bytes<3, P>(m, tile, out, stride);
            case 4: return decode_bytes<4, P>(m, tile, out, stride);
            case 5: return decode_bytes<5, P>(m, tile, out, stride);
            case 6: return decode_bytes<6, P>(m, tile, out, stride);
            case 7: return decode_bytes<7, P>(m, tile, out, stride);
            default: return decode_bytes<8, P>(m, tile, out, stride);
        }
    }

    template <int BITS>
    static void decode_words(const Matrix& m, int64_t tile, int16_t* out, int64_t stride) {
        constexpr int bytes = planes_of(BITS).bytes;
        const typename Isa::template WordTable<BITS> table(*m.table);
        const int64_t chunks = chunks_per_row(m.width, 1);
        const uint8_t* code = m.codes + tile * chunks * kTile * bytes;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            for (int r = 0; r < kTile; ++r, code += bytes) {
                Bytes index[2];
                Isa::template codes<BITS>(code, index);
                table.look_up(index, out + r * stride + chunk * kChunk);
            }
    }

    static void copy_words(const Matrix& m, int64_t tile, uint8_t* out, int64_t stride) {
        const int64_t chunks = chunks_per_row(m.width, 1);
        const uint8_t* code = m.codes + tile * chunks * kTile * 2 * kChunk;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            for (int r = 0; r < kTile; ++r, code += 2 * kChunk)
                std::memcpy(out + r * stride + chunk * 2 * kChunk, code, 2 * kChunk);
    }

    // Any grid: entries of ENTRY bytes copied one by one, USED of which count. Codes are read four at a time: loads are
    // what limits this.
    template <int ENTRY, int USED>
    static void decode_entries(const Matrix& m, int64_t tile, uint8_t* out, int64_t stride) {
        const Planes planes = planes_of(m.table->bits);
        const int64_t chunks = chunks_per_row(m.width, m.table->p);
        const uint8_t* chunk = m.codes + tile * chunks * kTile * planes.bytes;
        const uint8_t* entries = m.table->entries;
        for (int64_t c = 0; c < chunks; ++c)
            for (int r = 0; r < kTile; ++r, chunk += planes.bytes) {
                uint8_t* to = out + r * stride + c * kChunk * USED;
                alignas(64) uint16_t index[kChunk];
                chunk_codes(chunk, planes, index);
                for (int i = 0; i < kChunk; i += 4, to += 4 * USED) {
                    uint64_t four;
                    std::memcpy(&four, index + i, 8);
                    std::memcpy(to, entries + (four & 0xffff) * ENTRY, ENTRY);
                    std::memcpy(to + USED, entries + (four >> 16 & 0xffff) * ENTRY, ENTRY);
                    std::memcpy(to + 2 * USED, entries + (four >> 32 & 0xffff) * ENTRY, ENTRY);
                    std::memcpy(to + 3 * USED, entries + (four >> 48) * ENTRY, ENTRY);
                }
            }
    }

    // Four rows as integers in the order of the prepared activations; `stride` in bytes.
    static void decode_tile(const Matrix& m, int64_t tile, uint8_t* out, int64_t stride) {
        if (from_codes(*m.table)) {
            if (m.table->p == 1) switch (m.table->bits) {
                    case 1: return decode_bytes<1, 1>(m, tile, out, stride);
                    case 2: return decode_bytes<2, 1>(m, tile, out, stride);
                    case 3: return decode_bytes<3, 1>(m, tile, out, stride);
                    case 4: return decode_bytes<4, 1>(m, tile, out, stride);
                    case 8: return decode_bytes<8, 1>(m, tile, out, stride);
                    case 16: return copy_words(m, tile, out, stride);
                }
            if constexpr (Isa::quadruples)
                if (m.table->p == 4) return decode_vectors<4>(m, tile, out, stride);
            return decode_vectors<2>(m, tile, out, stride);
        }
        if (m.table->precision == 16 && m.table->p == 1) {
            auto* words = reinterpret_cast<int16_t*>(out);
            switch (m.table->bits) {
                case 5: return decode_words<5>(m, tile, words, stride / 2);
                case 6: return decode_words<6>(m, tile, words, stride / 2);
                case 7: return decode_words<7>(m, tile, words, stride / 2);
                case 8: return decode_words<8>(m, tile, words, stride / 2);
            }
        }
        switch (m.table->p * m.table->precision / 8) {
            case 1: return decode_entries<1, 1>(m, tile, out, stride);
            case 2: return decode_entries<2, 2>(m, tile, out, stride);
            case 3: return decode_entries<4, 3>(m, tile, out, stride);
            case 4: return decode_entries<4, 4>(m, tile, out, stride);
            case 6: return decode_entries<8, 6>(m, tile, out, stride);
            default: return decode_entries<8, 8>(m, tile, out, stride);
        }
    }

    // --- products from the buffer --------------------------------------------------------------------------------

    // Sums of one group, `positions` long, for four rows and one token, as exact as float sums of exact parts can be.
    template <class Element>
    static void group_sums(const uint8_t* rows, int64_t stride, const Element* x, int64_t positions, int32_t start,
                           float (&sum)[kTile]) {
        constexpr int64_t step = 64 / int64_t(sizeof(Element)), part = sizeof(Element) == 1 ? 4 * kGroup : kExactWords;
        for (float& s : sum) s = 0;
        for (int64_t from = 0; from < positions; from += part) {
            Acc acc[kTile];
            for (int r = 0; r < kTile; ++r) acc[r] = Isa::start(start);
            for (int64_t at = from; at < least(positions, from + part); at += step)
                for (int r = 0; r < kTile; ++r) {
                    const uint8_t* w = rows + r * stride + at * int64_t(sizeof(Element));
                    if constexpr (sizeof(Element) == 1)
                        acc[r] = Isa::dot(acc[r], Isa::load(w), x + at);
                    else
                        acc[r] = Isa::dot_words(acc[r], Isa::load(w), x + at);
                }
            int32_t whole[kTile];
            Isa::reduce(acc, whole);
            for (int r = 0; r < kTile; ++r) sum[r] += float(whole[r]);
        }
    }

    template <class Element>
    static void dots_from_buffer(const Matrix& m, int64_t tile, const uint8_t* rows, int64_t stride, const Prepared& x,
                                 float* y) {
        for (int64_t t = 0; t < x.tokens; ++t) {
            float out[kTile] = {};
            for (int64_t g = 0; g < x.groups; ++g) {
                const int64_t from = g * kGroup, to = g + 1 < x.groups ? from + kGroup : x.padded;
                float sum[kTile];
                group_sums<Element>(rows + from * int64_t(sizeof(Element)), stride, row<Element>(x, t) + from, to - from,
                                    sizeof(Element) == 1 ? x.corrections[t * x.groups + g] : 0, sum);
                const uint16_t* scale = m.scales + (tile * x.groups + g) * kTile;
                for (int r = 0; r < kTile; ++r) out[r] += sum[r] * (half_to_float(scale[r]) * m.step * x.scales[t * x.groups + g]);
            }
            scatter(m, out, tile, t, 1, y);
        }
    }

    static void through_buffer(const Matrix& m, const Prepared& x, int64_t first_tile, int64_t last_tile, float* y,
                               uint8_t* scratch) {
        const int64_t stride = buffer_stride(m, x);
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
            decode_tile(m, tile, scratch, stride);
            if (m.table->precision == 8)
                dots_from_buffer<int8_t>(m, tile, scratch, stride, x, y);
            else
                dots_from_buffer<int16_t>(m, tile, scratch, stride, x, y);
        }
    }

    // Bytes per decoded row: the padded activations, or the codes that pad the last chunk beyond them.
    static int64_t buffer_stride(const Matrix& m, const Prepared& x) {
        const int64_t positions = most(x.padded, chunks_per_row(m.width, m.table->p) * kChunk * m.table->p);
        return ceil_div(positions * m.table->precision / 8 + 64, 64) * 64;
    }

    static int64_t scratch_bytes(const Matrix& m, const Prepared& x) {
        return buffer_stride(m, x) * kTile + Isa::gemm_scratch_bytes(buffer_stride(m, x), x.tokens);
    }

    // Tiles first … last of y = x W^T.
    static void multiply(const Matrix& m, const Prepared& x, int64_t first_tile, int64_t last_tile, float* y,
                         uint8_t* scratch) {
        // What has to be written to a buffer anyway gains from the gemm sooner.
        if (x.tokens >= (from_codes(*m.table) ? Isa::gemm_tokens : Isa::gemm_tokens / 2))
            Isa::template gemm<Kernels>(m, x, first_tile, last_tile, y, scratch);
        else if (from_codes(*m.table))
            few(m, x, first_tile, last_tile, y);
        else
            through_buffer(m, x, first_tile, last_tile, y, scratch);
    }

    // --- activations and rows ----------------------------------------------------------------------------------

    template <int ORDER, class Element>
    static void in_runs(const Element (&from)[kUnit], Element* to) {
        for (int64_t block = 0; block < kUnit; block += 64 * ORDER)
            for (int k = 0; k < ORDER; ++k)
                for (int64_t i = 0; i < 64; ++i) to[block + 64 * k + i] = from[block + ORDER * i + k];
    }

    template <class Element>
    static void quantise_row(const float* row, int64_t width, int order, int bias, Element* out, float* scales,
                             int32_t* corrections) {
        constexpr float limit = sizeof(Element) == 1 ? 127.0f : 2047.0f;
        constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest whole number, ties to even
        for (int64_t g = 0; g < groups_of(width); ++g) {
            const int64_t start = g * kGroup, stop = group_stop(width, g);
            uint32_t magnitude = 0;  // compared as integers, where NaN is largest
            for (int64_t i = start; i < stop; ++i) {
                const uint32_t bits = float_to_bits(row[i]) & 0x7fffffff;
                magnitude = magnitude > bits ? magnitude : bits;
            }
            const float largest = bits_to_float(magnitude);
            const bool usable = largest > 1e-30f && magnitude < 0x7f800000;
            scales[g] = usable ? largest / limit : magnitude < 0x7f800000 ? 0.0f : NAN;
            const float by = usable ? limit / largest : 0.0f;
            int32_t sum = 0;
            const int64_t end = ceil_div(stop, kUnit) * kUnit;
            for (int64_t block = start; block < end; block += kUnit) {
                Element whole[kUnit] = {};
                const int64_t count = least(kUnit, stop - block);
                if (usable)
                    for (int64_t i = 0; i < count; ++i) {
                        const int32_t value = int32_t((row[block + i] * by + round) - round);
                        whole[i] = Element(value);
                        sum += value;
                    }
                switch (order) {
                    case 2: in_runs<2>(whole, out + block); break;
                    case 4: in_runs<4>(whole, out + block); break;
                    default: std::memcpy(out + block, whole, sizeof whole);
                }
            }
            corrections[g] = -bias * sum;
        }
    }

    static void quantise(const float* row, int64_t width, int order, int precision, int bias, void* out,
                         float* scales, int32_t* corrections) {
        if (precision == 8)
            quantise_row(row, width, order, bias, static_cast<int8_t*>(out), scales, corrections);
        else
            quantise_row(row, width, order, 0, static_cast<int16_t*>(out), scales, corrections);
    }

    static int level_at(const Table& t, const uint8_t* chunk, int64_t i) {
        if (t.precision == 8) return t.bias ? chunk[i] - t.bias : int8_t(chunk[i]);
        return int16_t(uint16_t(chunk[2 * i] | chunk[2 * i + 1] << 8));
    }

    static void decode_row(const Matrix& m, int64_t row, float* out) {
        const Table& t = *m.table;
        const Planes planes = planes_of(t.bits);
        const int64_t chunks = chunks_per_row(m.width, t.p), tile = row / kTile, groups = groups_of(m.width);
        const uint16_t* scale = m.scales + tile * groups * kTile + row % kTile;
        const int in_order = t.p == 1 ? order(t) : 1;
        const int last = t.n - 1;
        for (int64_t c = 0; c < chunks; ++c) {
            const uint8_t* chunk = m.codes + ((tile * chunks + c) * kTile + row % kTile) * planes.bytes;
            if (t.direct) {
                const int64_t start = c * kChunk, stop = least(start + kChunk, m.width);
                const float by = half_to_float(scale[least(start / kGroup, groups - 1) * kTile]) * m.unit;
                for (int64_t i = start; i < stop; ++i) out[i] = float(level_at(t, chunk, i - start)) * by;
                continue;
            }
            uint16_t code[kChunk];
            chunk_codes(chunk, planes, code);
            for (int64_t i = 0; i < kChunk; ++i) {
                const float* point = t.points + (code[i] < last ? code[i] : last) * t.p;
                for (int k = 0; k < t.p; ++k) {
                    int64_t column = (c * kChunk + i) * t.p + k;
                    if (in_order > 1) column = ordered_column(column, in_order);
                    if (column >= m.width) continue;
                    const int64_t g = least(column / kGroup, groups - 1);
                    out[column] = point[k] * (half_to_float(scale[g * kTile]) * m.unit);
                }
            }
        }
    }

    static const Functions* functions(const char* name) {
        static const Functions table = {name, Isa::bias, Isa::pair_bits, order,     rotate_row<Isa::lanes>, quantise,
                                        scratch_bytes, multiply,  decode_row, dot16,
                                        rms_norm,      swiglu,    attend,
                                        Isa::decode_symbols, Isa::decode_rows, walk_narrow, walk_lanes<int16_t>, Search<Isa>::run,
                                        checksum};
        return &table;
    }
};

}  // namespace
}  // namespace waterfill

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
//     anything else             decode_tile: four rows to a buffer (buffered.hpp), or the instruction set's gemm
#pragma once

#include <cstring>

#include "bitshift_search.hpp"
#include "buffered.hpp"
#include "checksum.hpp"
#include "coded_attention.hpp"
#include "decode.hpp"
#include "hadamard.hpp"
#include "half.hpp"
#include "layer_math.hpp"
#include "layout.hpp"
#include "matrix.hpp"
#include "prepare.hpp"
#include "rans.hpp"
#include "stages.hpp"
#include "trellis_search.hpp"
#include "trellis_states.hpp"
#include "windows.hpp"

namespace waterfill {
namespace {

constexpr int64_t kFromBuffer = 8;  // tokens for which levels that are computed are written down

template <class Isa>
struct Kernels : Buffered<Isa> {
    using Base = Buffered<Isa>;
    using Base::from_codes;
    using Base::scatter;
    using Base::through_buffer;
    using Bytes = typename Isa::Bytes;
    using Acc = typename Isa::Acc;

    // --- few tokens, byte tables -------------------------------------------------------------------------------

    template <int BITS, int P, int TOKENS>
    static void tile_from_codes(const Matrix& m, int64_t tile, const Prepared& x, int64_t token, float* y) {
        constexpr int bytes = planes_of(BITS).bytes;
        const typename Base::template TableOf<BITS, P> table(*m.table);
        const int64_t chunks = chunks_per_row(m.width, P), groups = x.groups;
        const uint8_t* code = m.codes + tile * chunks * kTile * bytes;
        const uint16_t* scale = m.scales + tile * groups * kTile;
        const int8_t* activations[TOKENS];
        for (int t = 0; t < TOKENS; ++t) activations[t] = Base::template row<int8_t>(x, token + t);
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

    // The same from a bitshift trellis, whose levels come from what is behind in a row, too: some rows at a time.
    template <int HALVES, int TOKENS>
    static void tile_from_windows(const Matrix& m, int64_t tile, const Prepared& x, int64_t token, float* y) {
        using Decoder = Windows<Isa, HALVES>;
        const Decoder decoder(*m.table);
        const int64_t chunks = chunks_per_row(m.width, 1), groups = x.groups;
        const uint16_t* scale = m.scales + tile * groups * kTile;
        typename Decoder::Chunk reached[Decoder::vectors];
        const uint8_t* code = decoder.begin(m.codes + tile * tile_window_bytes(m.width, HALVES), reached);
        const int8_t* activations[TOKENS];
        for (int t = 0; t < TOKENS; ++t) activations[t] = Base::template row<int8_t>(x, token + t);
        // A row that ends in the first half of a chunk has nothing in the other one.
        const bool half = (m.width - 1) % kChunk < kChunk / 2;
        float sum[TOKENS][kTile] = {};
        for (int64_t g = 0, chunk = 0; g < groups; ++g, scale += kTile) {
            const bool last = g + 1 == groups;
            const int64_t count = (last ? chunks - half : (g + 1) * (kGroup / kChunk)) - chunk;
            typename Decoder::Sums sums[Decoder::vectors][TOKENS] = {};
            for (int v = 0; v < Decoder::vectors; ++v) {
                if (last && half)
                    decoder.template multiply<TOKENS, kChunkSteps / 2>(code, count, v, reached[v], activations,
                                                                       chunk * kChunk, sums[v]);
                else
                    decoder.template multiply<TOKENS, 0>(code, count, v, reached[v], activations, chunk * kChunk,
                                                         sums[v]);
            }
            for (int t = 0; t < TOKENS; ++t) {
                const int64_t at = (token + t) * groups + g;
                typename Decoder::Sums of_token[Decoder::vectors];
                for (int v = 0; v < Decoder::vectors; ++v) of_token[v] = sums[v][t];
                int32_t whole[kTile];
                Isa::reduce_lanes(of_token, whole);
                for (int r = 0; r < kTile; ++r)
                    sum[t][r] +=
                        float(whole[r] + x.corrections[at]) * (half_to_float(scale[r]) * m.step * x.scales[at]);
            }
            chunk += count, code += count * Decoder::bytes;
        }
        std::memcpy(y, sum, sizeof sum);
    }

    // Eight tokens, where registers hold the sums of two rows: two of a group, and then the other two. What is loaded
    // of the activations serves both.
    template <int BITS, int P>
    static void tile_for_eight(const Matrix& m, int64_t tile, const Prepared& x, int64_t token, float* y) {
        constexpr int bytes = planes_of(BITS).bytes, tokens = 8, pair = 2, sums = tokens * pair / kTile;
        const typename Base::template TableOf<BITS, P> table(*m.table);
        const int64_t chunks = chunks_per_row(m.width, P), groups = x.groups;
        const uint8_t* codes = m.codes + tile * chunks * kTile * bytes;
        const uint16_t* scale = m.scales + tile * groups * kTile;
        const int8_t* activations = Base::template row<int8_t>(x, token);
        float sum[tokens][kTile] = {};
        for (int64_t g = 0; g < groups; ++g, scale += kTile) {
            const int64_t start = g * (kGroup / P / kChunk),
                          end = g + 1 < groups ? start + kGroup / P / kChunk : chunks;
            for (int first = 0; first < kTile; first += pair) {
                Acc acc[sums][kTile];  // of token t and row first + r: number t * pair + r
                WF_UNROLL for (int i = 0; i < tokens * pair; ++i) acc[i / kTile][i % kTile] =
                    Isa::start(x.corrections[(token + i / pair) * groups + g]);
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
                    WF_UNROLL for (int k = 0; k < 2 * P; ++k) WF_UNROLL for (int i = 0; i < tokens * pair; ++i) {
                        Acc& to = acc[i / kTile][i % kTile];
                        to = Isa::dot(to, value[i % pair][k], from + i / pair * x.padded + 64 * k);
                    }
                }
                const float factor[pair] = {half_to_float(scale[first]) * m.step,
                                            half_to_float(scale[first + 1]) * m.step};
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
                                acc[t][r] =
                                    Isa::dot_words(acc[t][r], w, Base::template row<int16_t>(x, token + t) + at + k);
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
        if (t.halves)
            return by_rate(t.halves,
                           [](auto halves) -> Tile { return tile_from_windows<decltype(halves)::value, TOKENS>; });
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
        if constexpr (Isa::eight_tokens)
            return t.halves ? nullptr : t.p == 1 ? eight_for<1>(t.bits) : t.p == 2 ? eight_for<2>(t.bits) : nullptr;
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

    // Tiles first … last of y = x W^T.
    static void multiply(const Matrix& m, const Prepared& x, int64_t first_tile, int64_t last_tile, float* y,
                         uint8_t* scratch) {
        // What has to be written to a buffer anyway gains from the gemm sooner.
        if (x.tokens >= (from_codes(*m.table) ? Isa::gemm_tokens : Isa::gemm_tokens / 2))
            Isa::template gemm<Kernels>(m, x, first_tile, last_tile, y, scratch);
        else if (from_codes(*m.table) && (!m.table->halves || x.tokens < kFromBuffer))
            few(m, x, first_tile, last_tile, y);
        else
            through_buffer(m, x, first_tile, last_tile, y, scratch);
    }

    static const Functions* functions(const char* name) {
        static const Functions table = [name] {
            Functions f{};
            f.name = name;
            f.bias = Isa::bias;
            f.pair_bits = Isa::pair_bits;
            f.order = Base::order;
            f.rotate = rotate_row<Isa::lanes>;
            f.quantise = quantise;
            f.scratch_bytes = Base::scratch_bytes;
            f.multiply = multiply;
            f.decode_row = Base::decode_row;
            f.dot = dot16;
            f.rms_norm = rms_norm;
            f.swiglu = swiglu;
            f.geglu = geglu;
            f.attend = attend;
            f.round_row = round_row;
            f.code_rows = code_rows<Isa::lanes>;
            f.attend_coded = CodedHead<Isa>::attend;
            f.decode_symbols = Isa::decode_symbols;
            f.decode_rows = Isa::decode_rows;
            f.walk = walk_narrow;
            f.walk_wide = walk_lanes<int16_t>;
            f.search = Search<Isa>::run;
            f.search_lane = LaneSearch<Isa>::run;
            f.search_windows = WindowSearch<Isa>::run;
            f.sum_stages = sum_stages;
            f.checksum = checksum;
            return f;
        }();
        return &table;
    }
};

}  // namespace
}  // namespace waterfill

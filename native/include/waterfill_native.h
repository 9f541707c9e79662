/* The C interface of waterfill's native library. native_signatures.py is its mirror in Python, and says by a hash of
 * this file which one it mirrors; native_calls.py is the only caller.
 *
 * Functions return 0, or a negative number for arguments that cannot be: callers check theirs first, in words. Whatever
 * may come from a file is given with its size, and refused where the shapes beside it ask for more; activations and
 * results are the caller's own, as large as those shapes say. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define WF_EXPORT __declspec(dllexport)
#else
#define WF_EXPORT __attribute__((visibility("default")))
#endif

typedef struct wf_table wf_table;

typedef struct {
    int64_t rows, width;
    float step; /* value of one unit of the table, times 2^exponent */
    float unit; /* 2^exponent */
    const wf_table* table;
    const uint8_t* codes;              /* in the kernels' layout: wf_arrange */
    const uint16_t* scales;            /* fp16, in the kernels' layout */
    int64_t codes_bytes, scales_count; /* that there are */
} wf_matrix;

enum { WF_FLOAT32 = 0, WF_BFLOAT16 = 1, WF_FLOAT16 = 2 };

/* Which header the library was built from: the first 16 hexadecimal digits of this file's SHA-256, without carriage
 * returns. */
WF_EXPORT const char* wf_header(void);

/* Bytes of a structure of this header by its name, "wf_matrix"; -1: there is none. */
WF_EXPORT int64_t wf_sizeof(const char* structure);

/* Instruction sets, best first: name of number i, or NULL when there are no more. They include what this build lacks
 * and what this machine cannot run; wf_usable says which can be used. */
WF_EXPORT const char* wf_isa(int isa);
WF_EXPORT int wf_usable(int isa);

/* Threads that later calls share work among: 1 runs everything in the calling thread, 0 is the default. */
WF_EXPORT int wf_set_threads(int count);

/* Share the threads of the process's OpenMP runtime, given its GOMP_parallel; NULL: own threads, the default. */
WF_EXPORT int wf_set_team(void* gomp_parallel);

/* Give back the memory that the calling thread keeps from call to call. */
WF_EXPORT int wf_release_memory(void);

/* In place: the block Hadamard transform of waterfill/codecs/hadamard.py, or its inverse, of each of `rows` rows. */
WF_EXPORT int wf_rotate(int isa, float* x, int64_t rows, int64_t width, int inverse);

/* A grid [n][p]: `units` as integers (8 or 16 bits of `precision`), `points` exact. NULL when out of memory. */
WF_EXPORT wf_table* wf_table_new(int isa, int p, int n, int precision, const int16_t* units, const float* points);
WF_EXPORT void wf_table_free(wf_table* table);

/* A bitshift trellis of `halves` / 2 bits: `hash` [3][16] of each four bits of a window, and `levels` [2][16] of a
 * hash's halves, whose sums are of 7 bits. NULL where there is no such trellis, or no memory. */
WF_EXPORT wf_table* wf_window_table_new(int isa, int halves, const uint8_t* hash, const int8_t* levels);

/* Sizes in the kernels' layout; -1 for a matrix that cannot be. */
WF_EXPORT int64_t wf_codes_bytes(const wf_table* table, int64_t rows, int64_t width);
WF_EXPORT int64_t wf_scales_count(int64_t rows, int64_t width);

/* From the layout of the artifact to that of the kernels. `word_indices` > 0: radix words of so many indices in
 * `word_bytes`; 0: bit fields. matrix->codes and ->scales point to the stored buffers. */
WF_EXPORT int wf_arrange(int isa, const wf_matrix* stored, int word_indices, int word_bytes, int64_t row_bytes,
                         uint8_t* codes, uint16_t* scales);

/* y[i] = x W_i^T for `count` matrices of one width: x [tokens][width], y[i] [tokens][rows_i], all of `dtype`. */
WF_EXPORT int wf_matmul(int isa, const wf_matrix* const* matrices, int count, const void* x, int dtype, int64_t tokens,
                        void* const* y);

/* One matrix, from exact grid points and float activations; y of floats. */
WF_EXPORT int wf_matmul_float(int isa, const wf_matrix* matrix, const void* x, int dtype, int64_t tokens, float* y);

typedef struct {
    const void* numbers; /* NULL: there is none */
    int64_t count;
} wf_vector;

enum { WF_SILU = 0, WF_GELU_TANH = 1 };

/* A decoder layer of the Llama kind: RMS norms, attention with rotary positions, a gated feed-forward. `heads` are a
 * multiple of `kv_heads`, `head_dim` is even and at most 512. Matrices are [rows][width] and vectors [count], where q
 * is heads * head_dim, kv is kv_heads * head_dim, and inner the rows of `gate`. */
typedef struct {
    int64_t hidden, heads, kv_heads, head_dim;
    float epsilon;         /* of the norms */
    float scaling;         /* of the scores, before the softmax */
    int dtype;             /* of norms and biases: WF_FLOAT32 or WF_BFLOAT16 */
    int cache_dtype;       /* of keys and values: the same two */
    const wf_matrix* q;    /* [q][hidden] */
    const wf_matrix* k;    /* [kv][hidden] */
    const wf_matrix* v;    /* [kv][hidden] */
    const wf_matrix* o;    /* [hidden][q] */
    const wf_matrix* gate; /* [inner][hidden] */
    const wf_matrix* up;   /* [inner][hidden] */
    const wf_matrix* down; /* [hidden][inner] */
    wf_vector input_norm;  /* [hidden], before the attention */
    wf_vector post_norm;   /* [hidden], before the feed-forward */
    wf_vector q_norm;      /* [head_dim], of each head; may be missing, as may all that follow */
    wf_vector k_norm;      /* [head_dim] */
    wf_vector q_bias;      /* [q] */
    wf_vector k_bias;      /* [kv] */
    wf_vector v_bias;      /* [kv] */
    wf_vector o_bias;      /* [hidden] */
    wf_vector o_norm;      /* [hidden], of what the attention adds */
    wf_vector down_norm;   /* [hidden], of what the feed-forward adds */
    int64_t window;        /* tokens that one attends to, itself and those before it; 0: all */
    int activation;        /* of the gate: WF_SILU or WF_GELU_TANH */
    int rotary;            /* which of the pass's tables of rotary positions */
} wf_layer;

/* The caller's own products, where matrices are not in memory: `count` matrices of a layer, from `first` on in the
 * order of wf_layer, each times x [tokens][width] -> y[i] [tokens][rows]. Unless it sets *status to 0 the pass ends. It
 * is not what it returns: an interpreter that is interrupted as it is called back returns anything. */
typedef void (*wf_product)(void* context, int layer, int first, int count, const float* x, int64_t tokens,
                           float* const* y, int* status);
enum { WF_UNANSWERED = -100 }; /* *status before */

/* Keys or values of a text by codes of 3, 4, 5 or 8 bits: in each layer [kv_heads][capacity / 128] blocks, which are
 * `bytes` bytes, of 128 fp16 scales and 128 * head_dim codes (native/src/coded.hpp). whole[i] has rows of layer i as
 * they are, [kv_heads][first + ring][head_dim] of its cache_dtype, `whole_bytes` bytes: the text's first tokens, and of
 * all others the newest `ring`, token t at first + t % ring. With 16 bits there are neither codes nor these, but
 * numbers as in a text without a wf_coding, in `bytes` bytes. */
typedef struct {
    int bits;
    float unit;           /* levels of a standard deviation; with 8 bits, of the largest coordinate */
    const int8_t* levels; /* [2^bits], ascending; with 8 bits codes are the levels */
    void* const* whole;
    int64_t bytes, whole_bytes;
} wf_coded;

/* Of a text whose tokens are coded: a token attends to the text's `first` ones as they are, and to the newest `recent`,
 * itself included, as far as the ring has them: those from number `kept_from` on. It attends to all others by codes,
 * which those behind the first get in the pass in which they become older than the newest; `coded` tokens, from
 * the text's beginning on, have been so old before. */
typedef struct {
    wf_coded keys, values;
    int64_t first, recent, ring, kept_from, coded;
} wf_coding;

/* A text that a pass reads on in: `tokens` more of it, behind `position` others. keys[i] and values[i], for `layers`
 * layers, are what is known of those in layer i, [kv_heads][capacity][head_dim], in memory of `bytes` bytes each. */
typedef struct {
    int64_t tokens, position, capacity;
    void* const* keys;
    void* const* values;
    int64_t layers, bytes;
    const wf_coding* coding; /* NULL: numbers of the layers' cache_dtype; else as it says, and `bytes` means nothing */
} wf_sequence;

/* Consecutive tokens of several texts through all layers, `tokens` in all, text after text: hidden states
 * [tokens][hidden] in place, then normalised to `out` by `final_norm`, of the first layer's dtype. cosine and sine
 * [tables][tokens][head_dim], of which each layer takes its own; all have one head_dim. Each text attends to its
 * own keys and values, to which the new tokens' are added; matrices are multiplied with all tokens at once. With
 * `product` they need no more than their shapes; the status that it set, but for 0, is returned. -3: a sequence's
 * memory is too small, or another's. */
WF_EXPORT int wf_run_layers(int isa, const wf_layer* layers, int count, const wf_sequence* sequences, int64_t texts,
                            float* hidden, int64_t tokens, int tables, const float* cosine, const float* sine,
                            wf_vector final_norm, float* out, wf_product product, void* context);

/* One token through one layer, everything of its `dtype`, the cache too: hidden states in and out [hidden], cosine and
 * sine [head_dim], the only table. */
WF_EXPORT int wf_decode_layer(int isa, const wf_layer* layer, const void* in, const void* cosine, const void* sine,
                              void* keys, void* values, int64_t capacity, int64_t position, void* out);

/* Rows of W in its own basis, or rotated: out [count][width]. */
WF_EXPORT int wf_rows(int isa, const wf_matrix* matrix, const int64_t* ids, int64_t count, int rotated, float* out);

/* Entropy coding: docs/format.md has the bytes. `frequencies` [256] sum to 4096, `count` is a multiple of `lanes`, a
 * power of two up to 32. Returns the bytes of states and words, or -1 where they exceed `capacity`, an argument cannot
 * be, or a symbol has no frequency. */
WF_EXPORT int64_t wf_rans_encode(const uint8_t* symbols, int64_t count, int lanes, const uint16_t* frequencies,
                                 uint8_t* out, int64_t capacity);
/* -2: the bytes are not those of `count` symbols. */
WF_EXPORT int wf_rans_decode(int isa, const uint8_t* in, int64_t bytes, int lanes, const uint16_t* frequencies,
                             int64_t count, uint8_t* out);

/* The path of the trellis code nearest to x [count], in units in which levels are 4j + 1 or their negatives (4j with
 * one state), least <= j <= most: out [count] are the levels. */
WF_EXPORT int wf_trellis_search(int isa, int states, const float* x, int64_t count, int lanes, int least, int most,
                                int16_t* out);

/* The paths through windows of 12 bits whose levels [4096] come nearest to x [blocks][steps][16], each from its own
 * window start [blocks][16] on: windows [blocks][steps][16]. Squared errors are counted in whole numbers, a squared
 * level as `unit`. Steps are of `kinds` kinds in turn, 1 or 2; for each kind, `before` and `after` [kinds][4096] have
 * groups of ways[kind] windows, all of which follow on each of as many others. */
WF_EXPORT int wf_bitshift_search(int isa, const int8_t* levels, float unit, const uint16_t* before,
                                 const uint16_t* after, const int* ways, int kinds, const float* x,
                                 const uint16_t* start, int64_t blocks, int64_t steps, uint16_t* windows);

/* All streams of a matrix -> levels plus 128 as bytes, or `wide` plus 32768 in two bytes, [rows][width], and fp16
 * scales [rows][groups]. -3 - i: stream i is damaged, or what follows the last one is not zeros. */
WF_EXPORT int64_t wf_trellis_decode(int isa, int states, int wide, const uint8_t* arena, int64_t bytes, int64_t rows,
                                    int64_t width, uint8_t* codes, uint16_t* scales);

/* Streams of a stage of a nested matrix: those of the parts of a chunk. */
typedef struct {
    const uint8_t* data;
    const uint32_t* ends; /* of each part, in bytes from `data` */
    int64_t data_bytes, parts;
    int wide;
} wf_stage;

/* Consecutive rows of a matrix, in one of three forms: streams as an artifact has them (`states` > 0), codes as an
 * artifact has them (`row_bytes` > 0; `word_indices` and `word_bytes` as in wf_arrange), or codes and scales in the
 * kernels' layout. With `gains` streams are those of the last stage of a nested matrix: each part is its gain times the
 * sum of its stages, rounded to levels of the table's precision. */
typedef struct {
    int64_t rows, width;
    int64_t part_rows;      /* of each part but the last: those of a stream, or any multiple of 4 */
    float step, unit;       /* as in wf_matrix */
    const wf_table* table;  /* that the rows are multiplied with: of streams, the table of levels */
    const uint8_t* data;    /* streams, or codes */
    const uint16_t* scales; /* of codes */
    int states, wide;
    const uint32_t* ends; /* of each part, in bytes from `data`; of codes only where `sums` are given */
    uint64_t* sums; /* NULL, or wf_checksums of its parts when they were first read; 0, and then set: not read yet */
    int word_indices, word_bytes;
    int64_t row_bytes;
    int64_t data_bytes, scales_count, parts; /* that there are; `parts` are those of `ends`, and of `sums` */
    const uint16_t* gains;                   /* fp16, of each part; or NULL */
    const wf_stage* stages;                  /* below the last one, from the lowest on */
    int64_t stage_count;
} wf_chunk;

/* Activations x [tokens][width], rotated and rounded once for all matrices whose tables take them in the same form, as
 * that of `table` does. NULL when out of memory. */
typedef struct wf_activations wf_activations;
WF_EXPORT wf_activations* wf_activations_new(int isa, const wf_table* table, const void* x, int dtype, int64_t tokens,
                                             int64_t width);
WF_EXPORT void wf_activations_free(wf_activations* x);

/* y[t * stride + r] = row r of the chunk times token t of x. */
typedef struct {
    const wf_chunk* chunk;
    const wf_activations* x;
    void* y;
    int64_t stride;
} wf_task;

/* Sets *count to how many of the tasks, from the first on, may begin; called only in the caller's
 * thread, while others work. `finished` of them, from the first on, are done with. With `wait` there is nothing left to
 * do: it had better wait until there is. Less than it said before, or nothing: there will be no more. */
typedef void (*wf_ready)(void* context, int64_t finished, int wait, int64_t* count);

/* The first part that is not what it should be. */
typedef struct {
    int64_t task; /* its number among those that were given; 0 where there is one chunk */
    int64_t part; /* its number in the chunk */
    int changed;  /* 1: it is not what it was when it was first read; 0: it is damaged */
} wf_flaw;
enum { WF_ENDED = 1, WF_FLAWED = -3 };

/* All tasks; with `ready` NULL they may begin at once. y of `dtype`. Nanoseconds of all threads are added to
 * nanoseconds[0], checksums and decoding, and [1], multiplying. WF_ENDED: `ready` ended it. WF_FLAWED: *flaw says which
 * part. */
WF_EXPORT int wf_multiply_chunks(int isa, const wf_task* tasks, int64_t count, int dtype, wf_ready ready, void* context,
                                 int64_t* nanoseconds, wf_flaw* flaw);

/* A chunk -> the kernels' layout. WF_FLAWED: *flaw says which part. */
WF_EXPORT int wf_chunk_decode(int isa, const wf_chunk* chunk, uint8_t* codes, uint16_t* scales, wf_flaw* flaw);

/* sums[i], never 0, of the bytes between ends[i - 1], or 0, and ends[i], of `bytes` in all, to find out that they were
 * read otherwise than before; the same for every instruction set, and not part of any format. */
WF_EXPORT int wf_checksums(int isa, const uint8_t* data, int64_t bytes, const uint32_t* ends, int64_t count,
                           uint64_t* sums);

/* Floating-point numbers of `item_bytes` bytes, 2 or 4, exactly: `count` numbers -> one stream per 2^18 of them, stream
 * i at out + i * capacity, its length in sizes[i]. `capacity` is what wf_lossless_capacity says, or more. */
WF_EXPORT int64_t wf_lossless_capacity(int item_bytes);
WF_EXPORT int wf_lossless_encode(int item_bytes, const uint8_t* numbers, int64_t count, uint8_t* out, int64_t capacity,
                                 int64_t* sizes);

/* All streams, each behind the one before, of so many bytes each and `bytes` in all -> `count` numbers. -3 - i: stream
 * i is damaged. */
WF_EXPORT int64_t wf_lossless_decode(int isa, int item_bytes, const uint8_t* streams, int64_t bytes,
                                     const uint32_t* sizes, int64_t count, uint8_t* numbers);

#ifdef __cplusplus
}
#endif

// The exported functions of chunks: checks, before tasks.cpp and chunk.cpp work.
#include "../include/waterfill_native.h"
#include "chunk.hpp"
#include "isa.hpp"
#include "sound.hpp"
#include "tasks.hpp"

using namespace waterfill;

wf_activations* wf_activations_new(int isa, const wf_table* table, const void* x, int dtype, int64_t tokens,
                                   int64_t width) {
    const Functions* f = functions(isa);
    if (!f || tokens < 1 || width < 1 || dtype < 0 || dtype > 2) return nullptr;
    return new_activations(*f, table->view, x, dtype, tokens, width);
}

void wf_activations_free(wf_activations* x) { delete x; }

int wf_multiply_chunks(int isa, const wf_task* tasks, int64_t count, int dtype, wf_ready ready, void* context,
                       int64_t* nanoseconds, wf_flaw* flaw) {
    const Functions* f = functions(isa);
    if (!f || count < 1 || dtype < 0 || dtype > 2) return -1;
    return run_tasks(*f, tasks, count, dtype, ready, context, nanoseconds, flaw);
}

int wf_chunk_decode(int isa, const wf_chunk* chunk, uint8_t* codes, uint16_t* scales, wf_flaw* flaw) {
    const Functions* f = functions(isa);
    if (!sound(f, *chunk) || arranged(*chunk)) return -1;
    std::atomic<int64_t> least_flaw{kNoFlaw};
    decode_chunk(*f, *chunk, codes, scales, least_flaw);
    return flaw_status(least_flaw, flaw);
}

int wf_checksums(int isa, const uint8_t* data, int64_t bytes, const uint32_t* ends, int64_t count, uint64_t* sums) {
    const Functions* f = functions(isa);
    if (!f || !holds_parts(ends, count, bytes)) return -1;
    for (int64_t i = 0; i < count; ++i) sums[i] = checksum_of(*f, data, ends, i);
    return 0;
}

// Parts of chunks: what one thread decodes at a time, into memory that stays in its cache.
#pragma once

#include <atomic>
#include <cstdint>

#include "../include/waterfill_native.h"
#include "bitstream.hpp"
#include "layout.hpp"
#include "matrix.hpp"

namespace waterfill {

bool sound(const Functions* f, const wf_chunk& c);

constexpr int64_t kMostStages = 8;  // of a nested matrix

int64_t parts_of(const wf_chunk& c);
int64_t rows_of(const wf_chunk& c, int64_t part);

inline bool arranged(const wf_chunk& c) { return !c.states && !c.row_bytes; }

// Which part of which task is not what it should be, as one number: the first of them has the least.
constexpr int64_t kNoFlaw = INT64_MAX;
inline int64_t flaw_number(int64_t task, int64_t part, bool changed) {
    return task << 32 | part << 1 | int64_t(changed);
}

// The status that says so: 0, or WF_FLAWED and what *flaw then is.
int flaw_status(int64_t least_flaw, wf_flaw* flaw);

// Where a part goes, in the kernels' layout.
struct PartPlace {
    uint8_t* codes;
    uint16_t* scales;
};

// Up to kTogether parts that are not in the kernels' layout yet, from part `first` on -> places[i]; good[i] is false
// for those that are damaged.
void decode_parts(const Functions& f, const wf_chunk& c, int64_t first, int count, const PartPlace* places, bool* good);

// All parts, by all threads, to codes and scales in the kernels' layout; lowers `least_flaw` to the number of a damaged
// one.
void decode_chunk(const Functions& f, const wf_chunk& c, uint8_t* codes, uint16_t* scales,
                  std::atomic<int64_t>& least_flaw);

// Of part `part`'s bytes, never 0: to find out that they were read otherwise than before.
uint64_t checksum_of(const Functions& f, const uint8_t* data, const uint32_t* ends, int64_t part);

}  // namespace waterfill

// Floating-point numbers to fewer bytes and back, bit by bit: docs/format.md has the bytes.
#pragma once

#include <cstdint>

#include "matrix.hpp"

namespace waterfill {

constexpr int64_t kStreamElements = 1 << 18;  // of each stream but the last

// Room that an encoded stream surely has enough of.
int64_t exact_capacity(int item_bytes, int64_t count);

// One stream of `count` numbers of `item_bytes` bytes, 2 or 4; returns its bytes, or -1.
int64_t encode_exact(const uint8_t* numbers, int item_bytes, int64_t count, uint8_t* out);

// False unless `in` is exactly a stream of so many numbers.
bool decode_exact(const Functions& f, const uint8_t* in, int64_t bytes, int item_bytes, int64_t count,
                  uint8_t* numbers);

}  // namespace waterfill

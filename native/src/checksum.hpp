// A checksum at the speed of the cache, the same number for every instruction set: enough multiplications side by side,
// in vectors that compilers divide or join as they need. It finds accidents, not forgeries.
#pragma once

#include <cstdint>
#include <cstring>

namespace waterfill {
namespace {

uint64_t checksum(const uint8_t* data, int64_t bytes) {
    typedef uint64_t Words __attribute__((vector_size(32)));
    constexpr int kVectors = 8, kWords = 4;
    constexpr int64_t kBlock = sizeof(Words) * kVectors;
    constexpr uint64_t kFactor = 0x9e3779b97f4a7c15u;
    auto mix = [](auto state, auto word) {
        state = (state ^ word) * kFactor;
        return state ^ state >> 29;
    };
    Words sums[kVectors];
    for (int i = 0; i < kVectors * kWords; ++i) sums[i / kWords][i % kWords] = kFactor * uint64_t(2 * i + 1);
    auto block = [&](const uint8_t* from) {
        for (int i = 0; i < kVectors; ++i) {
            Words words;
            std::memcpy(&words, from + i * int64_t(sizeof words), sizeof words);
            sums[i] = mix(sums[i], words);
        }
    };
    int64_t at = 0;
    for (; at + kBlock <= bytes; at += kBlock) block(data + at);
    uint8_t rest[kBlock] = {};
    if (at < bytes) std::memcpy(rest, data + at, size_t(bytes - at));
    block(rest);
    uint64_t sum = uint64_t(bytes);
    for (int i = 0; i < kVectors * kWords; ++i) sum = mix(sum, uint64_t(sums[i / kWords][i % kWords]));
    return sum;
}

}  // namespace
}  // namespace waterfill

/* Reads memory as fast as one thread can: four streams, prefetched, and little arithmetic. */
#include <stddef.h>
#include <stdint.h>

enum { LINE = 8, AHEAD = 64 * LINE }; /* 64-bit words */

uint64_t read_memory(const uint64_t* words, size_t count) {
    uint64_t sums[4 * LINE] = {0};
    const size_t part = count / 4 / LINE * LINE;
    for (size_t i = 0; i < part; i += LINE)
        for (size_t stream = 0; stream < 4; ++stream) {
            const uint64_t* line = words + stream * part + i;
            __builtin_prefetch(line + AHEAD);
            for (size_t k = 0; k < LINE; ++k) sums[stream * LINE + k] += line[k];
        }
    uint64_t sum = 0;
    for (size_t k = 0; k < 4 * LINE; ++k) sum += sums[k];
    for (size_t i = 4 * part; i < count; ++i) sum += words[i];
    return sum;
}

// Threads: in the thread that handed it over those of the process's OpenMP runtime, so that two pools do not fight for
// the same cores; elsewhere our own, which stay awake briefly: a matrix takes a tenth of a millisecond, waking a thread
// half.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>

#if defined(__x86_64__)
#include "intrinsics.hpp"
#endif

namespace waterfill {

// What a thread does that waits for another one, a moment.
inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// What threads wait for: they watch for a while before they sleep.
class News {
   public:
    uint64_t count() const { return count_.load(std::memory_order_acquire); }
    void tell();
    void wait(uint64_t seen);  // until count() is another

   private:
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> count_{0};
    std::atomic<int> asleep_{0};
};

// Calls work() in the caller's thread and in those that can begin before it is done there.
void in_all_threads(const std::function<void()>& work);

// Calls work(i) for i in 0 … tasks - 1 from several threads, the caller's among them.
void parallel(int64_t tasks, const std::function<void(int64_t)>& work);

// Threads that work is shared among; 0 leaves it to the OpenMP runtime, or takes all cores.
void set_threads(int count);

// How many that is, or about to be: OpenMP may have been told of fewer.
int threads();

// GOMP_parallel of the runtime to share, or null for threads of our own.
void set_team(void* entry);

}  // namespace waterfill

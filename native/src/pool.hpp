// Threads that wait for work, briefly awake: a matrix takes a tenth of a millisecond, waking a thread half of that.
#pragma once

#include <cstdint>
#include <functional>

namespace waterfill {

// Calls work(i) for i in 0 … tasks - 1 from the pool's threads and the caller's. Calls from several threads take turns.
void parallel(int64_t tasks, const std::function<void(int64_t)>& work);

void set_threads(int count);
int threads();

}  // namespace waterfill

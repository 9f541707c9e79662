#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace waterfill {
namespace {

// How long an idle thread watches before it sleeps: a chunk of streamed weights is often waited for that long.
constexpr auto kAwake = std::chrono::microseconds(400);

class Pool {
   public:
    explicit Pool(int helpers) {
        for (int i = 0; i < helpers; ++i) threads_.emplace_back([this] { loop(); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
            round_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    void run(int64_t tasks, const std::function<void(int64_t)>& work) {
        work_ = &work;
        tasks_ = tasks;
        next_.store(0, std::memory_order_relaxed);
        busy_.store(int(threads_.size()), std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            round_.fetch_add(1, std::memory_order_release);
        }
        if (asleep_.load()) wake_.notify_all();
        drain();
        while (busy_.load(std::memory_order_acquire)) relax();
    }

    size_t size() const { return threads_.size(); }

   private:
    void drain() {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) (*work_)(i);
    }

    void loop() {
        uint64_t seen = 0;
        for (;;) {
            const auto until = std::chrono::steady_clock::now() + kAwake;
            uint64_t round;
            for (int spins = 0; (round = round_.load(std::memory_order_acquire)) == seen; ++spins) {
                relax();
                if (spins % 64 == 63 && std::chrono::steady_clock::now() > until) {
                    std::unique_lock<std::mutex> lock(mutex_);
                    asleep_.fetch_add(1);
                    wake_.wait(lock, [&] { return round_.load() != seen; });
                    asleep_.fetch_sub(1);
                }
            }
            seen = round;
            if (stop_) return;
            drain();
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> round_{0};
    std::atomic<int> asleep_{0}, busy_{0};
    std::atomic<int64_t> next_{0};
    int64_t tasks_ = 0;
    const std::function<void(int64_t)>* work_ = nullptr;
    bool stop_ = false;
};

// libgomp's entry point, which LLVM's runtime has too: runs work(data) in every thread of a team.
using Team = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

std::atomic<Team> team{nullptr};
std::thread::id team_owner;
std::mutex turn;  // of callers
Pool* pool = nullptr;
std::atomic<int> wanted{0};

// A forked child has none of its parent's threads and must not wait for them.
void after_fork() {
    team = nullptr;
    pool = nullptr;
    new (&turn) std::mutex;
}

void expect_forks() {
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, after_fork);
    (void)registered;
#endif
}

struct Shared {
    std::atomic<int64_t> next{0};
    const int64_t tasks;
    const std::function<void(int64_t)>& work;
};

void drain_shared(void* data) {
    auto& shared = *static_cast<Shared*>(data);
    for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.tasks;) shared.work(i);
}

int default_threads() { return std::max(1, int(std::thread::hardware_concurrency())); }

}  // namespace

void set_threads(int count) { wanted = std::max(0, count); }

int threads() { return wanted ? wanted.load() : default_threads(); }

void set_team(void* entry) {
    expect_forks();
    team_owner = std::this_thread::get_id();
    team = reinterpret_cast<Team>(entry);
}

void parallel(int64_t tasks, const std::function<void(int64_t)>& work) {
    const int chosen = wanted;
    if (tasks <= 1 || chosen == 1) {
        for (int64_t i = 0; i < tasks; ++i) work(i);
        return;
    }
    // In any other thread OpenMP would start a second team, and then let both sleep between two pieces of work.
    if (const Team shared_team = team.load(); shared_team && std::this_thread::get_id() == team_owner) {
        Shared shared{{0}, tasks, work};
        shared_team(drain_shared, &shared, unsigned(chosen), 0);  // 0 threads: as many as OpenMP has been told
        return;
    }
    const int helpers = (chosen ? chosen : default_threads()) - 1;
    std::lock_guard<std::mutex> lock(turn);
    if (!pool || int(pool->size()) != helpers) {
        expect_forks();
        delete pool;
        pool = new Pool(helpers);  // never freed at exit: a thread may still be in it
    }
    pool->run(tasks, work);
}

}  // namespace waterfill

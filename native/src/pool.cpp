#include "pool.hpp"

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace waterfill {
namespace {

// How long an idle thread watches before it sleeps: a chunk of streamed weights is often waited for that long.
constexpr auto kAwake = std::chrono::microseconds(400);

// Whoever has done the last of the work does not wait for threads that have not begun: where other programs have some
// of the cores, a thread may begin milliseconds later, and a piece of work takes a tenth of one.
class Pool {
   public:
    explicit Pool(int helpers) {
        for (int i = 0; i < helpers; ++i) threads_.emplace_back([this] { loop(); });
    }

    ~Pool() {
        stop_ = true;
        rounds_.tell();
        for (auto& thread : threads_) thread.join();
    }

    void run(const std::function<void()>& work) {
        work_ = &work;
        inside_.store(0, std::memory_order_release);
        rounds_.tell();
        work();
        inside_.fetch_or(kClosed);
        for (int spins = 0; inside_.load(std::memory_order_acquire) != kClosed; ++spins)
            spins < kSpins ? relax() : std::this_thread::yield();  // the core may be the one that the other waits for
    }

    size_t size() const { return threads_.size(); }

   private:
    static constexpr int kClosed = 1 << 30;
    static constexpr int kSpins = 1024;

    void loop() {
        for (uint64_t seen = 0;;) {
            rounds_.wait(seen);
            seen = rounds_.count();
            if (stop_) return;
            if (!enter()) continue;
            (*work_)();
            inside_.fetch_sub(1, std::memory_order_release);
        }
    }

    bool enter() {
        int inside = inside_.load();
        while (inside < kClosed)
            if (inside_.compare_exchange_weak(inside, inside + 1)) return true;
        return false;
    }

    std::vector<std::thread> threads_;
    News rounds_;
    std::atomic<int> inside_{kClosed};  // threads at work, besides the caller's, and whether more may begin
    const std::function<void()>* work_ = nullptr;
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

int default_threads() { return std::max(1, int(std::thread::hardware_concurrency())); }

}  // namespace

void News::tell() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        count_.fetch_add(1, std::memory_order_release);
    }
    if (asleep_.load()) wake_.notify_all();
}

void News::wait(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kAwake;
    for (int spins = 0; count() == seen; ++spins) {
        relax();
        if (spins % 64 != 63 || std::chrono::steady_clock::now() < until) continue;
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return count_.load() != seen; });
        asleep_.fetch_sub(1);
    }
}

void set_threads(int count) { wanted = std::max(0, count); }

int threads() { return wanted ? wanted.load() : default_threads(); }

void set_team(void* entry) {
    expect_forks();
    team_owner = std::this_thread::get_id();
    team = reinterpret_cast<Team>(entry);
}

void in_all_threads(const std::function<void()>& work) {
    const int chosen = wanted;
    if (chosen == 1) return work();
    // In any other thread OpenMP would start a second team, and then let both sleep between two pieces of work.
    if (const Team shared = team.load(); shared && std::this_thread::get_id() == team_owner) {
        auto call = [](void* data) { (*static_cast<const std::function<void()>*>(data))(); };
        shared(call, const_cast<std::function<void()>*>(&work), unsigned(chosen),
               0);  // 0: as many as OpenMP has been told
        return;
    }
    const int helpers = (chosen ? chosen : default_threads()) - 1;
    std::lock_guard<std::mutex> lock(turn);
    if (!pool || int(pool->size()) != helpers) {
        expect_forks();
        delete pool;
        pool = new Pool(helpers);  // never freed at exit: a thread may still be in it
    }
    pool->run(work);
}

void parallel(int64_t tasks, const std::function<void(int64_t)>& work) {
    std::atomic<int64_t> next{0};
    auto drain = [&] {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(i);
    };
    if (tasks <= 1)
        drain();
    else
        in_all_threads(drain);
}

}  // namespace waterfill

// Chunks that are multiplied while others are still on their way from storage.
//
// The caller's thread opens tasks, as the chunks they multiply arrive; all threads take parts of open tasks. They meet
// once, behind the last task: at the end of every chunk all would wait for the slowest.
#include "tasks.hpp"

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "arrange.hpp"
#include "chunk.hpp"
#include "pool.hpp"

namespace waterfill {
namespace {

int64_t nanoseconds(std::chrono::steady_clock::time_point from, std::chrono::steady_clock::time_point to) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(to - from).count();
}

struct Share {
    int64_t task, first;
    int parts;
};

struct Step {  // from part to part, in the kernels' layout
    int64_t codes, scales;
};

class Tasks {
   public:
    Tasks(const Functions& f, const wf_task* tasks, int64_t count, int dtype)
        : f_(f), tasks_(tasks), count_(count), dtype_(dtype), workers_(threads()), states_(new State[size_t(count)]) {}

    // Returns what wf_multiply_chunks is to.
    int run(wf_ready ready, void* context, wf_flaw* flaw) {
        const std::thread::id caller = std::this_thread::get_id();
        if (!ready) asking_ = false, open(count_);
        if (!ready && unbegun_ <= 1)
            lead(nullptr, nullptr);
        else
            in_all_threads([&] { std::this_thread::get_id() == caller ? lead(ready, context) : help(); });
        if (refused_) return refused_;
        if (const int status = flaw_status(least_flaw_, flaw)) return status;
        return ended_ ? WF_ENDED : 0;
    }

    std::atomic<int64_t> decoding_ns{0}, multiplying_ns{0};

   private:
    struct State {
        int64_t parts, begun = 0;
        std::atomic<int64_t> left{0};
    };

    // The caller's thread: asks for tasks before the other threads run out of them, and works like them in between.
    void lead(wf_ready ready, void* context) {
        for (int64_t finished = 0, told = 0;;) {
            while (finished < open_ && !states_[finished].left.load(std::memory_order_acquire)) ++finished;
            if (least_flaw_ < kNoFlaw) close();
            const bool hungry = open_ < count_ && unbegun_ < 2 * kTogether * workers_;
            if (asking_ && (hungry || finished > told)) {
                told = finished;
                int64_t count = -1;
                ready(context, finished, hungry && finished == open_, &count);  // only then is there nothing else to do
                open(count);
            }
            Share share;
            if (begin(share))
                work(share);
            else if (closed_)
                return;
        }
    }

    void help() {
        for (;;) {
            const uint64_t seen = news_.count();
            const bool closed = closed_;
            for (Share share; begin(share);) work(share);
            if (closed) return;
            news_.wait(seen);
        }
    }

    // Lets the first `count` tasks begin.
    void open(int64_t count) {
        if (count < open_ || count > count_) {
            ended_ = true;
            return close();
        }
        for (int64_t i = open_; i < count; ++i) {
            const wf_task& task = tasks_[i];
            const wf_chunk& c = *task.chunk;
            if (!sound(&f_, c) || task.x->view.padded != padded_width(c.width))
                refused_ = -1;
            else if (!(task.x->form == form_of(f_, c.table->view)))
                refused_ = -2;
            if (refused_) return close();
            states_[i].parts = parts_of(c);
            states_[i].left = states_[i].parts;
        }
        if (count == open_) return;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (; open_ < count; ++open_) unbegun_ += states_[open_].parts;
        }
        closed_ = open_ == count_;
        news_.tell();
    }

    // No task will be opened any more.
    void close() {
        asking_ = false, closed_ = true;
        news_.tell();
    }

    // Takes parts that nobody has begun; false where there are none now. Towards the end they are fewer at a time, so
    // that no thread is busy long after the others.
    bool begin(Share& share) {
        std::lock_guard<std::mutex> lock(mutex_);
        while (at_ < open_ && states_[at_].begun == states_[at_].parts) ++at_;
        if (at_ == open_) return false;
        State& state = states_[at_];
        const int64_t fair = open_ < count_ ? kTogether : ceil_div(unbegun_.load(), 2 * workers_);
        const int64_t parts = least(least(kTogether, most(1, fair)), state.parts - state.begun);
        share = {at_, state.begun, int(parts)};
        state.begun += parts;
        unbegun_ -= parts;
        return true;
    }

    void work(const Share& share) {
        using std::chrono::steady_clock;
        const wf_task& task = tasks_[share.task];
        const wf_chunk& c = *task.chunk;
        const int64_t tiles = tiles_of(c.part_rows);
        const Step step{tiles * tile_code_bytes(c.table->view, c.width), tiles * groups_of(c.width) * kTile};
        const auto start = steady_clock::now();
        const uint8_t* codes;
        const uint16_t* scales;
        bool good = true;
        if (arranged(c)) {
            codes = c.data + share.first * step.codes, scales = c.scales + share.first * step.scales;
        } else {
            uint8_t* own_codes = scratch(kPartCodes, share.parts * step.codes);
            auto* own_scales = reinterpret_cast<uint16_t*>(scratch(kPartScales, share.parts * 2 * step.scales));
            good = decode(share, own_codes, own_scales, step);
            codes = own_codes, scales = own_scales;
        }
        const auto decoded = steady_clock::now();
        for (int i = 0; good && i < share.parts; ++i)
            multiply(task, share.first + i, codes + i * step.codes, scales + i * step.scales);
        decoding_ns += nanoseconds(start, decoded), multiplying_ns += nanoseconds(decoded, steady_clock::now());
        states_[share.task].left.fetch_sub(share.parts, std::memory_order_release);
    }

    // Parts -> codes and scales side by side; false where one is not what it should be.
    bool decode(const Share& share, uint8_t* codes, uint16_t* scales, Step step) {
        const wf_chunk& c = *tasks_[share.task].chunk;
        PartPlace places[kTogether] = {};
        bool good[kTogether], all = true;
        for (int i = 0; i < share.parts; ++i) places[i] = {codes + i * step.codes, scales + i * step.scales};
        decode_parts(f_, c, share.first, share.parts, places, good);
        for (int i = 0; i < share.parts; ++i) {
            const int64_t part = share.first + i;
            const uint64_t sum =
                c.sums ? checksum_of(f_, c.data, c.ends, part) : 0;  // of bytes that are in the cache now
            const bool changed = c.sums && c.sums[part] && c.sums[part] != sum;
            if (changed || !good[i])
                all = false, lower(least_flaw_, flaw_number(share.task, part, changed));
            else if (c.sums)
                c.sums[part] = sum;
        }
        return all;
    }

    void multiply(const wf_task& task, int64_t part, const uint8_t* codes, const uint16_t* scales) {
        const wf_chunk& c = *task.chunk;
        const Prepared& x = task.x->view;
        const int64_t first = part * c.part_rows, rows = rows_of(c, part);
        const Matrix m{rows, c.width, c.step, c.unit, &c.table->view, codes, scales};
        float* sums = scratch_floats(kPartSums, x.tokens * rows);
        f_.multiply(m, x, 0, tiles_of(rows), sums, scratch(kDecoded, f_.scratch_bytes(m, x)));
        for (int64_t t = 0; t < x.tokens; ++t)
            from_float(sums + t * rows, dtype_, t * task.stride + first, rows, task.y);
    }

    const Functions& f_;
    const wf_task* const tasks_;
    const int64_t count_;
    const int dtype_;
    const int64_t workers_;
    const std::unique_ptr<State[]> states_;
    News news_;
    std::mutex mutex_;                 // of begin; only the leading thread changes what is open
    int64_t open_ = 0, at_ = 0;        // tasks that may begin; the first of them that has parts to begin
    std::atomic<int64_t> unbegun_{0};  // parts
    std::atomic<bool> closed_{false};
    std::atomic<int64_t> least_flaw_{kNoFlaw};
    bool asking_ = true, ended_ = false;
    int refused_ = 0;
};

}  // namespace

wf_activations* new_activations(const Functions& f, const Table& table, const void* x, int dtype, int64_t tokens,
                                int64_t width) {
    std::unique_ptr<wf_activations> made(new (std::nothrow) wf_activations);
    if (!made) return nullptr;
    made->form = form_of(f, table);
    const int64_t data = tokens * padded_width(width) * made->form.precision / 8, parts = tokens * groups_of(width);
    made->memory.resize(size_t(data + 8 * parts + 128));  // and what aligns data and scales to 64 bytes
    uint8_t* at = made->memory.data();
    at += (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64;
    auto* scales = reinterpret_cast<float*>(at + (data + 63) / 64 * 64);
    made->view = quantise(f, rotated(f, x, dtype, tokens, width), tokens, width, made->form, at, scales,
                          reinterpret_cast<int32_t*>(scales + parts));
    return made.release();
}

int run_tasks(const Functions& f, const wf_task* tasks, int64_t count, int dtype, wf_ready ready, void* context,
              int64_t* nanoseconds, wf_flaw* flaw) {
    Tasks all(f, tasks, count, dtype);
    const int status = all.run(ready, context, flaw);
    nanoseconds[0] += all.decoding_ns, nanoseconds[1] += all.multiplying_ns;
    return status;
}

}  // namespace waterfill

// One persistent pool of threads for all operations.
//
// `run` calls a function once per thread; the caller is thread 0. Work is divided by the function itself, from (index,
// count), so that a division never depends on timing. Inside, `Worker::barrier` separates phases: an operation, or a
// whole recorded decode step, is one `run`, with no fork and join per phase. Waiting threads spin for a short while,
// then yield, then sleep, so an idle pool costs nothing and an oversubscribed machine is not burnt.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "buffer.h"
#include "common.h"

namespace fastserve {

// Memory that a thread will need soon.
struct ReadAhead {
    const uint8_t* data = nullptr;
    int64_t bytes = 0;
};

// Waits for the other threads of a team; used again and again.
class Barrier {
public:
    // `spins`: how often to look before the processor is given away. `ahead`: read into the caches while waiting.
    void wait(int count, int spins, ReadAhead ahead);

private:
    std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
};

// What a function running in the pool knows about itself.
struct Worker {
    int index;
    int count;
    Barrier* team;
    uint8_t* shared;   // scratch of all threads, as large as was asked of `run`
    uint8_t* scratch;  // this thread's own
    int spins;

    FASTSERVE_INLINE void barrier(ReadAhead ahead = {}) const {
        if (count > 1) team->wait(count, spins, ahead);
    }
};

// Bytes of scratch that an operation needs.
struct ScratchSize {
    size_t shared = 0;
    size_t per_thread = 0;
};

class ThreadPool {
public:
    // `cpus`: pin thread i to cpus[i]; empty: do not pin. The calling thread is never pinned. Throws std::runtime_error
    // when the system gives fewer threads.
    ThreadPool(int num_threads, const std::vector<int>& cpus);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return num_threads_; }

    static constexpr int64_t kLittleWork = 16384;
    static constexpr int64_t kMuchWork = int64_t{1} << 62;

    // Call body(worker) on every thread and return when all are done. One caller at a time; others wait. All round to the
    // nearest and keep denormal numbers, whatever the caller has set for itself.
    // After a fork, in the child, the threads are gone: the caller then does all the work. It also does when `work`,
    // a count of values to go through, is too small to be worth waking anybody.
    template <class Body>
    void run(ScratchSize scratch, const Body& body, int64_t work = kMuchWork) {
        dispatch(
            scratch, [](const void* object, const Worker& worker) { (*static_cast<const Body*>(object))(worker); },
            &body, work < kLittleWork);
    }

private:
    using Entry = void (*)(const void*, const Worker&);

    void dispatch(ScratchSize scratch, Entry entry, const void* object, bool is_little);
    void work(int index, int cpu);
    void stop();
    Worker worker(int index, int count);

    // A fork's child has copies of these that can be neither joined nor destroyed: it leaves them where they are.
    struct Team {
        std::mutex sleep_mutex;
        std::condition_variable wake;
        std::vector<std::thread> threads;
    };

    const int num_threads_;
    const int owner_process_;
    const int spins_;
    std::mutex callers_;
    Barrier barrier_;
    Buffer shared_;
    std::vector<Buffer> scratch_;
    Entry entry_ = nullptr;
    const void* object_ = nullptr;
    alignas(64) std::atomic<uint32_t> generation_{0};
    alignas(64) std::atomic<int> pending_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stopping_{false};
    std::unique_ptr<Team> team_;
};

}  // namespace fastserve

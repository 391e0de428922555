#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <system_error>
#ifdef FASTSERVE_X86
#include <xmmintrin.h>
#endif

namespace fastserve {

namespace {

// About 100 microseconds of polling: longer than the gap between two operations of a step. With more threads than
// processors the one that is waited for may need ours, so there it is hardly any.
constexpr int kSpins = 4000, kSpinsWhenCrowded = 20;
constexpr int64_t kReadAtOnce = 512;  // bytes that a waiting thread reads between two looks
constexpr int kYields = 2000;  // then give the processor away, but stay runnable

inline void pause_cpu() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Poll until done() or until spinning and yielding are exhausted.
template <class Done>
bool poll(const Done& done, int spins) {
    for (int i = 0; i < spins; ++i) {
        if (done()) return true;
        pause_cpu();
    }
    for (int i = 0; i < kYields; ++i) {
        if (done()) return true;
        sched_yield();
    }
    return done();
}

void pin(int cpu) {
#ifdef __linux__
    if (cpu < 0) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
#else
    (void)cpu;
#endif
}

int usable_processors() {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
    return static_cast<int>(std::thread::hardware_concurrency());
}

// Rounds to the nearest and keeps denormal numbers while it lives.
class FloatMode {
#ifdef FASTSERVE_X86
public:
    FloatMode() { _mm_setcsr(0x1f80); }
    ~FloatMode() { _mm_setcsr(before_); }

private:
    const unsigned before_ = _mm_getcsr();
#endif
};

}  // namespace

void Barrier::wait(int count, int spins, ReadAhead ahead) {
    uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    auto passed = [&] { return phase_.load(std::memory_order_acquire) != phase; };
    // Loads, for a prefetch that finds no free buffer is dropped.
    for (int64_t at = 0; at + kReadAtOnce <= ahead.bytes && !passed(); at += kReadAtOnce) {
        for (int64_t line = 0; line < kReadAtOnce; line += 64) (void)*static_cast<const volatile uint8_t*>(ahead.data + at + line);
    }
    while (!poll(passed, spins)) usleep(50);  // a team member was preempted for long
}

ThreadPool::ThreadPool(int num_threads, const std::vector<int>& cpus)
    : num_threads_(num_threads < 1 ? 1 : num_threads), owner_process_(getpid()),
      spins_(num_threads_ > usable_processors() ? kSpinsWhenCrowded : kSpins), scratch_(num_threads_) {
    team_ = std::make_unique<Team>();
    try {
        for (int index = 1; index < num_threads_; ++index) {
            int cpu = index < static_cast<int>(cpus.size()) ? cpus[index] : -1;
            team_->threads.emplace_back([this, index, cpu] { work(index, cpu); });
        }
    } catch (const std::system_error& error) {
        stop();
        throw std::runtime_error("thread " + std::to_string(team_->threads.size() + 2) + " of " + std::to_string(num_threads_) +
                                 " cannot be started: " + error.what());
    }
}

ThreadPool::~ThreadPool() {
    if (getpid() == owner_process_) stop();
    else (void)team_.release();
}

void ThreadPool::stop() {
    {
        std::lock_guard<std::mutex> lock(team_->sleep_mutex);
        stopping_.store(true);
        generation_.fetch_add(1);
    }
    team_->wake.notify_all();
    for (auto& thread : team_->threads) thread.join();
}

Worker ThreadPool::worker(int index, int count) {
    return {index, count, &barrier_, shared_.data(), scratch_[index].data(), spins_};
}

void ThreadPool::dispatch(ScratchSize scratch, Entry entry, const void* object, bool is_little) {
    [[maybe_unused]] FloatMode mode;
    if (getpid() != owner_process_) {  // who held the lock or wrote to the scratch at the fork may be no more
        Buffer shared(scratch.shared), own(scratch.per_thread);
        entry(object, {0, 1, &barrier_, shared.data(), own.data(), spins_});
        return;
    }
    std::lock_guard<std::mutex> one_caller(callers_);
    shared_.reserve(scratch.shared);
    const bool alone = is_little || num_threads_ == 1;
    for (int index = 0; index < (alone ? 1 : num_threads_); ++index) scratch_[index].reserve(scratch.per_thread);
    if (alone) {
        entry(object, worker(0, 1));
        return;
    }
    entry_ = entry;
    object_ = object;
    pending_.store(num_threads_ - 1, std::memory_order_relaxed);
    // Sequentially consistent with the sleeper's own check: either it sees the new generation or we see the sleeper.
    generation_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
        { std::lock_guard<std::mutex> lock(team_->sleep_mutex); }
        team_->wake.notify_all();
    }
    entry(object, worker(0, num_threads_));
    auto finished = [&] { return pending_.load(std::memory_order_acquire) == 0; };
    while (!poll(finished, spins_)) usleep(50);
}

void ThreadPool::work(int index, int cpu) {
    [[maybe_unused]] FloatMode mode;
    pin(cpu);
    uint32_t seen = 0;
    auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
    while (true) {
        if (!poll(called, spins_)) {
            std::unique_lock<std::mutex> lock(team_->sleep_mutex);
            sleepers_.fetch_add(1, std::memory_order_seq_cst);
            team_->wake.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
            sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        }
        seen = generation_.load(std::memory_order_acquire);
        if (stopping_.load(std::memory_order_acquire)) return;
        entry_(object_, worker(index, num_threads_));
        pending_.fetch_sub(1, std::memory_order_release);
    }
}

}  // namespace fastserve

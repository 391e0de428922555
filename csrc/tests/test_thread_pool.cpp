// The pool: every thread runs once per call, barriers separate phases, sleeping threads wake, several callers queue up,
// a fork's child goes on alone, and the caller's mode of floats is its own.
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>
#ifdef FASTSERVE_X86
#include <xmmintrin.h>
#endif

#include "../thread_pool.h"
#include "check.h"

using namespace fastserve;

namespace {

void every_thread_runs_once() {
    for (int count : {1, 2, 3, 5}) {
        ThreadPool pool(count, {});
        for (int repeat = 0; repeat < 100; ++repeat) {
            std::vector<int> calls(static_cast<size_t>(count), 0);
            pool.run({}, [&](const Worker& worker) {
                CHECK(worker.count == count, "count %d", worker.count);
                ++calls[static_cast<size_t>(worker.index)];
            });
            for (int value : calls) CHECK(value == 1, "called %d times", value);
        }
    }
}

void barriers_separate_phases() {
    constexpr int kPhases = 50;
    ThreadPool pool(3, {});
    std::vector<int> written(3, -1);
    pool.run({}, [&](const Worker& worker) {
        for (int phase = 0; phase < kPhases; ++phase) {
            written[static_cast<size_t>(worker.index)] = phase;
            worker.barrier();
            for (int value : written) CHECK(value == phase, "phase %d sees %d", phase, value);
            worker.barrier();
        }
    });
}

void sleeping_threads_wake() {
    ThreadPool pool(2, {});
    for (int repeat = 0; repeat < 3; ++repeat) {
        std::this_thread::sleep_for(std::chrono::milliseconds(60));
        std::atomic<int> calls{0};
        pool.run({}, [&](const Worker&) { calls.fetch_add(1); });
        CHECK(calls.load() == 2, "%d calls", calls.load());
    }
}

void callers_queue_up() {
    ThreadPool pool(2, {});
    std::atomic<int> inside{0}, calls{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&] {
            for (int repeat = 0; repeat < 50; ++repeat) {
                pool.run({}, [&](const Worker& worker) {
                    if (worker.index == 0) CHECK(inside.fetch_add(1) == 0, "two calls at once");
                    worker.barrier();
                    calls.fetch_add(1);
                    worker.barrier();
                    if (worker.index == 0) inside.fetch_sub(1);
                });
            }
        });
    }
    for (auto& caller : callers) caller.join();
    CHECK(calls.load() == 4 * 50 * 2, "%d calls", calls.load());
}

void scratch_is_private_and_large_enough() {
    ThreadPool pool(3, {});
    for (size_t bytes : {100u, 5000u, 3u << 20}) {
        pool.run({bytes, bytes}, [&](const Worker& worker) {
            std::memset(worker.scratch, worker.index + 1, bytes);
            if (worker.index == 0) std::memset(worker.shared, 9, bytes);
            worker.barrier();
            CHECK(worker.scratch[bytes - 1] == worker.index + 1, "scratch was overwritten");
            CHECK(worker.shared[bytes - 1] == 9, "shared scratch was overwritten");
        });
    }
}

// A child of a fork has no threads but its own; a lock may have been held by another one.
void a_fork_s_child_works_and_ends() {
    ThreadPool pool(3, {});
    std::atomic<bool> is_inside{false}, may_leave{false};
    std::thread caller([&] {
        pool.run({}, [&](const Worker&) {
            is_inside = true;
            while (!may_leave) sched_yield();
        });
    });
    while (!is_inside) sched_yield();
    const pid_t busy = fork();
    if (busy == 0) {
        alarm(20);
        int calls = 0;
        pool.run({100, 100}, [&](const Worker& worker) { calls += worker.count; });
        _exit(calls == 1 ? 0 : 1);
    }
    may_leave = true;
    caller.join();
    std::this_thread::sleep_for(std::chrono::milliseconds(60));  // the threads sleep
    const pid_t idle = fork();
    if (idle == 0) {
        alarm(20);
        pool.~ThreadPool();
        _exit(0);
    }
    for (const pid_t child : {busy, idle}) {
        int status = -1;
        CHECK(waitpid(child, &status, 0) == child && status == 0, "the child's status is %d", status);
    }
}

void denormal_numbers_are_kept_on_every_thread() {
#ifdef FASTSERVE_X86
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    ThreadPool pool(3, {});
    volatile float small = 1e-30f;
    float products[3];
    pool.run({}, [&](const Worker& worker) { products[worker.index] = small * 1e-10f; });
    CHECK(_mm_getcsr() >= 0x8040, "the caller's own mode is lost");
    _mm_setcsr(before);
    for (float product : products) CHECK(product > 0.0f, "a product is %g", product);
#endif
}

}  // namespace

int main() {
    every_thread_runs_once();
    barriers_separate_phases();
    sleeping_threads_wake();
    callers_queue_up();
    scratch_is_private_and_large_enough();
    a_fork_s_child_works_and_ends();
    denormal_numbers_are_kept_on_every_thread();
    std::puts("thread_pool: ok");
}

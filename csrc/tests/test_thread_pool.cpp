// The pool: every thread runs once per call, barriers separate phases, sleeping threads wake, several callers queue up.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

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

}  // namespace

int main() {
    every_thread_runs_once();
    barriers_separate_phases();
    sleeping_threads_wake();
    callers_queue_up();
    scratch_is_private_and_large_enough();
    std::puts("thread_pool: ok");
}

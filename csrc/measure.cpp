#include "measure.h"

#include <chrono>
#include <vector>

#include "ops.h"

namespace fastserve {

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Sums eight independent streams of a contiguous part; the compiler's widest portable vectors are enough for memory.
typedef uint64_t Words __attribute__((vector_size(64), aligned(64), may_alias));

uint64_t read_all(const uint8_t* data, size_t bytes) {
    const Words* words = reinterpret_cast<const Words*>(data);
    Words total[4] = {};
    size_t count = bytes / sizeof(Words) / 4 * 4;
    for (size_t i = 0; i < count; i += 4) {
        __builtin_prefetch(words + i + 32);
        __builtin_prefetch(words + i + 33);
        __builtin_prefetch(words + i + 34);
        __builtin_prefetch(words + i + 35);
        for (int j = 0; j < 4; ++j) total[j] += words[i + j];
    }
    uint64_t sum = 0;
    for (auto& part : total) {
        for (int j = 0; j < 8; ++j) sum += part[j];
    }
    return sum;
}

}  // namespace

ReadMeter::ReadMeter(size_t bytes, ThreadPool& pool) : buffer_(bytes / 4096 * 4096), pool_(pool) {
    pool_.run({}, [&](const Worker& worker) {
        Range range = share_of(static_cast<int64_t>(buffer_.bytes() / 4096), worker.index, worker.count);
        for (int64_t page = range.begin; page < range.end; ++page) buffer_.data()[page * 4096] = 1;
    });
}

double ReadMeter::measure() {
    const uint8_t* data = buffer_.data();
    const size_t bytes = buffer_.bytes();
    std::vector<uint64_t> sums(static_cast<size_t>(pool_.size()) * 16);
    double start = now();
    pool_.run({}, [&](const Worker& worker) {
        Range range = share_of(static_cast<int64_t>(bytes / 4096), worker.index, worker.count);
        sums[worker.index * 16] = read_all(data + range.begin * 4096, (range.end - range.begin) * 4096);
    });
    double seconds = now() - start;
    volatile uint64_t sink = sums[0];
    (void)sink;
    return static_cast<double>(bytes) / seconds;
}

double measure_peak(const OpTable& table, ThreadPool& pool, int kind, double seconds) {
    std::vector<double> rates(static_cast<size_t>(pool.size()));
    pool.run({}, [&](const Worker& worker) {
        worker.barrier();
        rates[worker.index] = table.peak_rate(kind, seconds);
    });
    double total = 0;
    for (double rate : rates) total += rate;
    return total;
}

}  // namespace fastserve

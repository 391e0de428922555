#include "measure.h"

#include <chrono>
#include <vector>

#include "ops.h"

namespace fastserve {

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

ReadMeter::ReadMeter(size_t bytes, const OpTable& table, ThreadPool& pool)
    : buffer_(bytes / 4096 * 4096), table_(table), pool_(pool) {
    pool_.run({}, [&](const Worker& worker) {
        Range range = share_of(static_cast<int64_t>(buffer_.bytes() / 4096), worker.index, worker.count);
        for (int64_t page = range.begin; page < range.end; ++page) buffer_.data()[page * 4096] = 1;
    });
}

double ReadMeter::read(bool past_caches) {
    const uint8_t* data = buffer_.data();
    const size_t bytes = buffer_.bytes();
    std::vector<uint32_t> sums(static_cast<size_t>(pool_.size()) * 16);
    double start = now();
    pool_.run({}, [&](const Worker& worker) {
        Range range = share_of(static_cast<int64_t>(bytes / 4096), worker.index, worker.count);
        sums[worker.index * 16] = table_.read_memory(data + range.begin * 4096, (range.end - range.begin) * 4096, past_caches);
    });
    double seconds = now() - start;
    volatile uint32_t sink = sums[0];
    (void)sink;
    return static_cast<double>(bytes) / seconds;
}

double ReadMeter::measure() {
    const double into_caches = read(false), past_caches = read(true);
    return into_caches > past_caches ? into_caches : past_caches;
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

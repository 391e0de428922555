// The machine's limits, measured where the kernels run: with the same threads, in the same process, in the same run.
#pragma once

#include <cstddef>

#include "buffer.h"

namespace fastserve {

class ThreadPool;
struct OpTable;

// Bytes per second that all threads together read from memory, over a buffer of `bytes` (1 GB or more).
class ReadMeter {
public:
    ReadMeter(size_t bytes, const OpTable& table, ThreadPool& pool);
    // Fetching ahead into all caches, as most programs read, or past them (see kFetchPastCaches).
    double read(bool past_caches);
    // The faster of the two.
    double measure();

private:
    Buffer buffer_;
    const OpTable& table_;
    ThreadPool& pool_;
};

// Operations per second of all threads together, operands in registers. kind as in OpTable::peak_rate.
double measure_peak(const OpTable& table, ThreadPool& pool, int kind, double seconds);

}  // namespace fastserve

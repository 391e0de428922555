// The machine's limits, measured where the kernels run: with the same threads, in the same process, in the same run.
#pragma once

#include <cstddef>

#include "buffer.h"

namespace fastserve {

class ThreadPool;
struct OpTable;

// Bytes per second that all threads together read from memory, over a buffer of `bytes` (use more than 1 GB).
class ReadMeter {
public:
    ReadMeter(size_t bytes, const OpTable& table, ThreadPool& pool);
    double measure();

private:
    Buffer buffer_;
    const OpTable& table_;
    ThreadPool& pool_;
};

// Operations per second of all threads together, operands in registers. kind as in OpTable::peak_rate.
double measure_peak(const OpTable& table, ThreadPool& pool, int kind, double seconds);

}  // namespace fastserve

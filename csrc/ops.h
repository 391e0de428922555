// The operations, as plain structs of arguments and one table of functions per instruction set.
//
// A function of the table is called by every thread of the pool at once (`Worker`), and divides the work itself.
// Strides are in elements. Nothing here allocates; what an operation needs is told by its *_scratch function.
#pragma once

#include <string>

#include "common.h"
#include "packed_weight.h"
#include "thread_pool.h"

namespace fastserve {

// out = epilogue(x W^T): plus bias, activation, then plus residual. A gated weight gives activation(gate) * up.
struct LinearArgs {
    const PackedWeight* weight;
    int64_t rows;
    const void* x;         // [rows, k]
    DType x_type;
    int64_t x_stride;
    void* out;             // [rows, out_columns]
    DType out_type;
    int64_t out_stride;
    const void* residual;  // [rows, out_columns] of out_type, or null; may be `out` itself
    int64_t residual_stride;
    Activation activation;
    bool quantize_x;       // u8 and u4: 8-bit activations, one symmetric scale per row
};

ScratchSize linear_scratch(const LinearArgs& args, int threads);

struct OpTable {
    const char* name;
    void (*linear)(const LinearArgs&, const Worker&);
    // Operations per second with every operand in registers, for one thread: what `linear` is measured against.
    // kind: 0 float multiply-add, 1 bfloat16 dot, 2 int8 dot. Two operations per multiply-add.
    double (*peak_rate)(int kind, double seconds);
};

// Null when this build or this machine lacks it. Names as in cpu_features.h.
const OpTable* op_table(const std::string& isa);

}  // namespace fastserve

// A plan: the operations of one forward pass, recorded once and run for any number of tokens in one call of the pool.
//
// A network is recorded by running it on a probe step whose operations are added here instead of computed (bind.cpp).
// What an operation writes lies in tensors that were announced by `tensor`; every such tensor has one row per token or
// per row of logits, so that its size at another step is known. Addresses in announced tensors are replaced by places
// in the plan's own buffers, which tensors that do not live at the same time share; all other addresses (weights, caches)
// stay as they are. The kernels, their order and the division of work are those of single calls: so are the results.
#pragma once

#include <array>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "ops.h"

namespace fastserve {

using Op = std::variant<LinearArgs, AttentionArgs, NormArgs, RopeArgs, StoreArgs, HeadsArgs, GatherArgs, ArgmaxArgs>;

ScratchSize op_scratch(const Op& op, int threads);
// Values to go through, for ThreadPool::run.
int64_t op_work(const Op& op);
void run_op(const Op& op, const OpTable& table, const Worker& worker);

// Why a network cannot be recorded; the message completes "because".
struct NotRecordable : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The numbers of one step; arrays are the caller's.
struct StepInputs {
    int64_t tokens, rows;
    const int64_t *input_ids, *positions, *slots;  // [tokens]
    const int64_t* logit_rows;                     // [rows]
    const int64_t *adapter_slots, *row_adapter_slots;  // [tokens], [rows], or null: no token has an adapter
    int64_t num_sequences;
    const int64_t* query_starts;
    const int64_t* context_lens;
    const int64_t* const* block_tables;
    // Attention that is not causal is over the source that a sequence was made from; null in networks without one.
    const int64_t* source_lens;
    const int64_t* const* source_tables;
};

class Plan {
public:
    static constexpr int kInputs = 4;  // input_ids, positions, slots, logit_rows

    // tokens, rows: of the probe; different, so that a count tells which of the two it is.
    Plan(const OpTable& table, ThreadPool& pool, int64_t tokens, int64_t rows);
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;

    // A tensor of `count` rows (tokens or logit rows) that operations write, or the input of that number.
    void tensor(const void* address, int64_t bytes, int64_t count, int input = -1);
    void add(Op op);
    // Nothing more comes. `logits` and `chosen` (the last operation's, one int64 per row) outlive the step.
    void finish(const void* logits, const void* chosen);

    // Run the step; `choose`: the last operation too.
    void run(const StepInputs& step, bool choose);
    const void* logits() const { return place(logits_); }
    const void* chosen() const { return place(chosen_); }
    int64_t num_ops() const { return static_cast<int64_t>(ops_.size()); }
    int64_t bytes() const;

private:
    struct Tensor {
        const uint8_t* address;
        int64_t bytes, row_bytes;
        bool per_token;
        int input;
        int64_t first_use = -1, last_use = -1;  // operations; an input is used from the start
        int64_t buffer = -1;
    };
    struct Slot {  // a buffer that several tensors use one after the other
        Buffer memory;
        int64_t row_bytes;
        bool per_token;
        int64_t free_after;
    };
    struct Place {  // of an address in an operation
        int64_t tensor = -1, offset = 0;
    };
    static constexpr int kMaxPointers = 10;
    struct Entry {
        Op op;
        bool per_token;
        std::array<Place, kMaxPointers> places;
        bool joins_next = false;  // of few rows, nobody waits between this one and the next
    };

    Place find(const void* address) const;
    const void* place(const Place& where) const;
    void join_norms();
    void join_heads();
    void keep(int64_t op, int64_t until);
    void share_buffers();
    void relocate();
    void set_step(const StepInputs& step);
    ReadAhead weights_after(int64_t op, const Worker& worker) const;
    void run_joined(NormArgs norm, LinearArgs linear, const Worker& worker, void* normed) const;

    const OpTable& table_;
    ThreadPool& pool_;
    const int64_t probe_tokens_, probe_rows_;
    int64_t capacity_tokens_ = 0, capacity_rows_ = 0;
    std::vector<Tensor> tensors_;
    std::vector<Slot> slots_;
    std::vector<Entry> ops_;
    int64_t largest_norm_ = 0;  // bytes of a row, of norms that are joined
    Place logits_, chosen_;
};

}  // namespace fastserve

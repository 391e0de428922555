// Low-rank adapters (LoRA, Hu et al., 2021) of one packed weight: out += B (A x), with another A and B in each slot.
//
// A step says for each row which slot's it is, or none. `linear` computes h = A x of those rows first, and adds B h to a
// panel's sums before the epilogue. A is [ranks, k], B is kept in strips of 16 packed columns, one after the other, each
// [ranks of the strip, 16]: of a merged weight (queries, keys and values say) a column uses the ranks of its part only.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"
#include "common.h"

namespace fastserve {

struct PackedWeight;

struct AdapterStrip {
    int64_t first_rank, ranks, offset;  // offset: of its B, in values
};

// What a kernel reads of one slot.
struct AdapterSlot {
    DType type;
    int64_t ranks;  // 0: the slot is empty
    const void *a, *b;
    const AdapterStrip* strips;
};

class Adapters {
public:
    Adapters(const PackedWeight& weight, int64_t num_slots);
    Adapters(const Adapters&) = delete;
    Adapters& operator=(const Adapters&) = delete;

    // a [ranks, k] and b [n, ranks], of rows in the source's order; kept as `type`, f32 or bf16.
    void set(int64_t slot, int64_t ranks, const float* a, const float* b, DType type);
    void clear(int64_t slot);

    FASTSERVE_INLINE int64_t max_ranks() const { return max_ranks_; }
    FASTSERVE_INLINE const AdapterSlot& slot(int64_t index) const { return slots_[index]; }
    int64_t bytes() const;

private:
    struct Memory {
        Buffer a, b;
        std::vector<AdapterStrip> strips;
    };

    void count_ranks();

    const PackedWeight& weight_;
    std::vector<Memory> memory_;
    std::vector<AdapterSlot> all_;
    const AdapterSlot* slots_;  // all_'s
    int64_t max_ranks_ = 0;
};

}  // namespace fastserve

// Bfloat16 weights of which many are zero: a bit for each weight, and the values that are not zero one after another.
//
// Panels and word rows are those of packed_weight.h. `base` holds the masks: two bits per word (32 words of a row of
// panel 0, then of panel 1, ...), the value of the smaller k first. The values lie behind all masks, panel by panel in
// the masks' order; `value_starts` says where a panel's begin. A kernel expands a piece of panel into the words that it
// was made from, so that its products have the bits of the dense ones.
#pragma once

#include "packed_weight.h"

namespace fastserve {

struct OpTable;

// Share of a packed weight's values that are zero, from every 16th row of words.
double share_of_zeros(const PackedWeight& weight);

// A weight of Format::bf16 becomes one of Format::sparse; others stay.
void drop_zeros(PackedWeight& weight, ThreadPool& pool);

// Word rows of a panel, `count` of them from `first` on, into `words`; `values`: where theirs begin, at `first` 0 in
// value_starts. Returns where the next rows' begin.
const uint16_t* expand(const PackedWeight& weight, int64_t panel, int64_t first, int64_t count, const uint16_t* values,
                       uint8_t* words);

// Products of a whole panel of 64 columns with one vector of bfloat16 pairs [k_padded / 2], into c [64], expanded in
// registers: the additions of the dense kernel of pairs. False: this processor has no such kernel, nothing was done.
bool multiply_vector(const PackedWeight& weight, int64_t panel, const char* x, float* c);

// How many times as fast as dense a product with one vector is where this share of the values is zero, weights read
// from memory: measured here and now, on random ones.
double measure_sparse_gain(double zeros, const OpTable& table, ThreadPool& pool);

}  // namespace fastserve

// Weights in the layout that the kernels stream: the same for every instruction set.
//
// Columns (output features) are cut into panels of 64; a last panel has 16, 32, 48 or 64. A panel is a sequence of
// rows of 32-bit words, one word per column, so a row is at most 256 bytes and a panel is read from front to back:
//   f32     1 value of K per word
//   bf16    2 (low half first)
//   u8      4 (byte by byte)
//   u4, c4  8: the low half-word holds k = 0 2 4 6 in its nibbles, lowest first, the high half-word k = 1 3 5 7, so
//           that shifting a word right by 4 j leaves the bfloat16-style pair (2 j, 2 j + 1) in its two low nibbles.
// Quantised formats are cut along K into groups; each group starts with a header, scales [columns] and, if asymmetric,
// zeros [columns] uint8. A weight is scale * (q - zero); zero is 128 (u8) or 8 (u4) when symmetric. c4 looks q up in a
// table of 16 values instead. u8 and c4 have one group, all of K.
// K is padded to a multiple of 64 with zeros of the quantised form; activations are padded with 0, so they add nothing.
// A gated weight (rows 0..n/2 are gate, n/2..n are up) has the two interleaved: half of each panel is gate, half up.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "buffer.h"
#include "common.h"

namespace fastserve {

class ThreadPool;
struct Worker;

enum class Format : int { f32 = 0, bf16 = 1, u8 = 2, u4 = 3, c4 = 4, sparse = 5 };  // sparse: see sparse_weight.h
enum class ScaleType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Rows of a weight that lie together, such as the queries' part of q/k/v. Row-major; the arrays stay the caller's.
struct WeightRows {
    int64_t n;
    const void* values;              // [n, k]: float, bfloat16, or one uint8 per weight for u8, u4, c4
    const void* scales = nullptr;    // [n, groups], quantised formats
    const uint8_t* zeros = nullptr;  // [n, groups]; null, in all parts alike: symmetric
};

// A weight as a model folder holds it.
struct WeightSource {
    Format format;
    int64_t k;
    std::vector<WeightRows> parts;
    int64_t group = 0;  // u4: 32, 64 or 128; 0: one group, all of K
    ScaleType scale_type = ScaleType::f32;
    const float* table = nullptr;  // [16], c4
    const float* bias = nullptr;   // [rows of all parts]
    bool gated = false;
};

struct PackedWeight {
    Format format = Format::bf16;
    ScaleType scale_type = ScaleType::f32;
    bool gated = false, has_zeros = false;
    int64_t n = 0, k = 0;            // of the source
    int64_t k_padded = 0;
    int64_t columns = 0;             // packed columns, a multiple of 16
    int64_t panels = 0;
    int64_t group = 0, groups = 0;   // in the padded K; the last group may be shorter
    int64_t panel_bytes = 0;         // of a full panel
    Buffer data;
    const uint8_t* base = nullptr;   // data's memory
    Buffer bias_data;
    const float* bias = nullptr;     // [columns], packed order, or null
    float table[16] = {};
    std::vector<int64_t> value_starts;  // sparse: [panels + 1]

    FASTSERVE_INLINE int64_t out_columns() const { return gated ? n / 2 : n; }
    FASTSERVE_INLINE int64_t panel_columns(int64_t panel) const { return min_of(kPanelColumns, columns - panel * kPanelColumns); }
    FASTSERVE_INLINE const uint8_t* panel(int64_t index) const { return base + index * panel_bytes; }
    FASTSERVE_INLINE bool is_scaled() const { return format == Format::u8 || format == Format::u4 || format == Format::c4; }
    // Values of K in one word.
    FASTSERVE_INLINE int64_t depth_per_word() const {
        return format == Format::f32 ? 1 : format == Format::bf16 || format == Format::sparse ? 2 : format == Format::u8 ? 4 : 8;
    }
    FASTSERVE_INLINE int64_t scale_bytes() const { return scale_type == ScaleType::f32 ? 4 : 2; }
    FASTSERVE_INLINE int64_t header_bytes(int64_t width) const {
        return is_scaled() ? width * (scale_bytes() + (has_zeros ? 1 : 0)) : 0;
    }
    // Row of the source that packed column c holds, or -1 for padding.
    int64_t source_row(int64_t column) const;
    // Offset in a panel of `width` columns where group g's header starts; its words follow the header.
    FASTSERVE_INLINE int64_t group_offset(int64_t g, int64_t width) const {
        return g * (header_bytes(width) + group / depth_per_word() * width * 4);
    }
    FASTSERVE_INLINE int64_t bytes() const { return static_cast<int64_t>(data.bytes()); }
};

// No weight: what a kernel gets where the words are not packed ones.
extern const PackedWeight kNoWeight;

// Throws std::invalid_argument with a sentence for the user.
std::unique_ptr<PackedWeight> pack(const WeightSource& source, ThreadPool& pool);

// The weight back as float [n, k], for tests.
void unpack(const PackedWeight& weight, float* out);

// out [count, k] of `type` = rows `ids` of a weight that is not gated: an embedding's look-up. Called by every thread.
void look_up(const PackedWeight& weight, const int64_t* ids, int64_t count, float scale, void* out, DType type, const Worker& worker);

}  // namespace fastserve

// The operations, as plain structs of arguments and one table of functions per instruction set.
//
// A function of the table is called by every thread of the pool at once (`Worker`), and divides the work itself.
// Strides are in elements. Nothing here allocates; what an operation needs is told by its *_scratch function.
#pragma once

#include <string>

#include "adapters.h"
#include "common.h"
#include "packed_weight.h"
#include "thread_pool.h"

namespace fastserve {

constexpr int64_t kPrivateRows = 4;   // up to here every thread prepares a product's activations for itself
constexpr int kSegmentWords = 128;    // words of K per piece of panel: 32 KB
constexpr int64_t kChunkRows = 192;   // rows whose partial sums stay in the L2 cache
constexpr int64_t kSampleChunk = 64;  // logits that sampling looks at together

// out = epilogue(x W^T + adapters): plus bias, activation, then plus residual. A gated weight gives activation(gate) * up.
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
    const Adapters* adapters = nullptr;
    const int64_t* adapter_slots = nullptr;  // [rows]: a slot of `adapters`, or -1; null: no row has one
};

// Bytes of the shared scratch that activations take; what adapters need comes after.
int64_t prepared_bytes(const LinearArgs& args);
ScratchSize linear_scratch(const LinearArgs& args);

// Where a cache has what: blocks of G heads one after the other and then, of s8, their float scales [G, block_size]. A
// head of the values is [block_size, D]. A head of the keys is words of four bytes, [elements of D / a word's, block_size]:
// sixteen keys are a panel of the scores' product as they lie; elements that fill no word follow, [rest, block_size].
// All in bytes.
struct CacheLayout {
    DType type;
    int64_t heads, size, block_size;

    FASTSERVE_INLINE int64_t element() const { return element_bytes(type); }
    FASTSERVE_INLINE int64_t head() const { return block_size * size * element(); }
    FASTSERVE_INLINE int64_t block() const { return heads * (head() + (type == DType::s8 ? 4 * block_size : 0)); }
    FASTSERVE_INLINE int64_t scale(int64_t head_index, int64_t offset) const { return heads * head() + 4 * (head_index * block_size + offset); }
    FASTSERVE_INLINE int64_t words() const { return size * element() / 4; }
    // Of element i of the key at `offset`, from its head on.
    FASTSERVE_INLINE int64_t key(int64_t offset, int64_t i) const {
        const int64_t each = 4 / element(), whole = words() * each;
        if (i >= whole) return (i * block_size + offset) * element();
        return (i / each * block_size + offset) * 4 + i % each * element();
    }
};

// out = attention of query over each sequence's cached keys and values, which hold this step's already.
struct AttentionArgs {
    const void* query;  // [T, H, D] of x_type; D contiguous
    DType x_type;
    int64_t query_stride, query_head_stride;
    void* out;  // [T, H, D] of x_type, contiguous
    int64_t num_heads, num_kv_heads, head_size;
    const void *keys, *values;  // as CacheLayout says
    DType cache_type;
    int64_t block_size;
    int64_t num_sequences;
    const int64_t* query_starts;         // [num_sequences + 1]
    const int64_t* context_lens;         // [num_sequences]: tokens in the cache, this step's included
    const int64_t* const* block_tables;  // [num_sequences] block ids in order
    float scale, softcap;                // softcap 0: none
    int64_t window;  // 0: none; else keys less than this far away are seen, causal or not
    bool causal;
    const float* bias;  // null, or [H, bias_stride]: bias[h, bias_origin + key - query position] is added to a score
    int64_t bias_stride, bias_origin;
};

constexpr int kKeyBlock = 64;         // keys that attention takes at a time
constexpr int64_t kSplitKeys = 512;   // keys whose sums start from nothing
constexpr int64_t kSplitQueries = 4;  // sequences with no more new tokens share their splits among threads
// Query rows (positions x query heads per key head) that a tile of attention has at most. Each tile builds the panels of
// its keys and values anew: more rows repay them, fewer leave more tiles to divide.
constexpr int64_t kTileQueryRows = 192;
static inline int64_t attention_tile_rows(const AttentionArgs& args) {
    const int64_t group = args.num_heads / args.num_kv_heads;
    return group * max_of(1, kTileQueryRows / group);
}

ScratchSize attention_scratch(const AttentionArgs& args);

// out = attention of queries over whole sequences, each seeing its own: queries query_starts[b] : query_starts[b + 1] the
// keys key_starts[b] : key_starts[b + 1], the last query standing where the last key does.
struct VarlenArgs {
    const void* query;  // [T, H, D] of type; D contiguous
    DType type;
    int64_t query_stride, query_head_stride;
    void* out;  // [T, H, D] of type, contiguous
    int64_t num_heads, num_kv_heads, head_size;
    const void *keys, *values;  // [S, G, D] of type; D contiguous
    int64_t key_stride, key_head_stride, value_stride, value_head_stride;
    int64_t num_sequences;
    const int64_t *query_starts, *key_starts;  // [num_sequences + 1]
    float scale;         // above 0
    int64_t window;      // 0: none; else keys less than this far away are seen
    const float* bias;   // as in AttentionArgs
    int64_t bias_stride, bias_origin;
};

constexpr int64_t kVarlenRows = 48;   // query rows of a tile
constexpr int64_t kVarlenKeys = 512;  // keys that share one softmax
constexpr int64_t kVarlenRowBytes = 2048;  // of one key at most: heads of 512

// Keys of the longest sequence, in whole panels.
static inline int64_t longest(const VarlenArgs& args) {
    int64_t keys = 0;
    for (int64_t i = 0; i < args.num_sequences; ++i) keys = max_of(keys, args.key_starts[i + 1] - args.key_starts[i]);
    return round_up(keys, kPanelColumns);
}

ScratchSize varlen_scratch(const VarlenArgs& args);

// Norms over the last dimension. out = (x - mean) / deviation * weight + bias, or x / root mean square * weight.
struct NormArgs {
    const void* x;  // rows: outer x inner, inner ones `inner_stride` apart
    DType type;
    int64_t outer, inner, outer_stride, inner_stride, size;
    const void* weight;    // [size] of type
    const void* bias;      // [size] or null
    void* out;             // contiguous
    float epsilon;
    bool subtract_mean;
    const void* residual;  // [outer, inner, size] contiguous, or null: added to the result
};

// out[t, h] = x[t, h] rotated by (cos, sin)[t]: halves convention, the first 2 * half entries; the rest is copied.
struct RopeArgs {
    const void* x;  // [T, H, D]
    DType type;
    int64_t tokens, heads, size, token_stride, head_stride;
    const void *cos, *sin;  // [T, half] of type, contiguous
    int64_t half;
    void* out;  // contiguous
};

// Write key and value [T, G, D] into the caches at slots (block * block_size + offset), as CacheLayout says; s8 is
// symmetric, with one scale per token and head.
struct StoreArgs {
    const void *key, *value;
    DType type, cache_type;
    int64_t tokens, heads, size, key_stride, key_head_stride, value_stride, value_head_stride;
    void *keys, *values;
    const int64_t* slots;
    int64_t block_size;
};

// Heads of a step made ready for attention: query and key heads normed (root mean square) and rotated, keys and values
// written to the cache. `store.key` and `store.value` are the heads as they come.
struct HeadsArgs {
    const void* query;  // [T, H, D] of store.type
    int64_t num_heads, query_stride, query_head_stride;
    const void *query_norm, *key_norm;  // [D] of store.type, or null
    float epsilon;
    const float *cos, *sin;  // [positions, half], or null: not rotated
    int64_t half;
    const int64_t* positions;  // [T]
    void* out;                 // the queries, contiguous
    StoreArgs store;
};

ScratchSize heads_scratch(const HeadsArgs& args);

// out[i] = table[ids[i]], plus residual[i] where there is one.
struct GatherArgs {
    const PackedWeight* packed;  // read rows of this one instead of `table`, if not null; then there is no residual
    const void* table;           // rows of `size`, contiguous
    DType type;                  // of the result, and of the table
    int64_t rows, size;
    const int64_t* ids;
    float scale;                 // of type's precision; 1: none
    const void* residual;        // [rows, size] contiguous, or null
    void* out;                   // contiguous
};

// Index of the largest of each row; the first among equals. NaN counts as -inf.
struct ArgmaxArgs {
    const void* x;
    DType type;
    int64_t rows, size, stride;
    int64_t* out;
};

ScratchSize argmax_scratch(const ArgmaxArgs& args, int threads);

// How one row of SampleArgs is drawn from; see `RowSampling` in kernels/interface.py.
struct SampleRow {
    float inverse_temperature;  // 0: the largest logit, the first among equals
    int64_t top_k;              // 0: all
    double top_p, min_p;        // 1 and 0: all
    uint64_t random;            // below 2^53
};

// One token per row of logits; exact integer sums, so that every instruction set draws the same.
struct SampleArgs {
    const void* x;
    DType type;
    int64_t rows, size, stride;
    const SampleRow* how;  // [rows]
    int64_t* out;
};

ScratchSize sample_scratch(const SampleArgs& args);

// Of each row: the logarithm of the sum of e^x, and its `count` largest values in order, the first among equals first.
struct MostProbableArgs {
    const float* x;
    int64_t rows, size, stride, count;  // 0 < count <= size
    float *log_sums, *values;           // [rows], [rows, count]
    int64_t* ids;                       // [rows, count]: where they are
};

ScratchSize most_probable_scratch(const MostProbableArgs& args);

struct OpTable {
    const char* name;
    void (*linear)(const LinearArgs&, const Worker&);
    void (*attention)(const AttentionArgs&, const Worker&);
    void (*varlen)(const VarlenArgs&, const Worker&);
    void (*norm)(const NormArgs&, const Worker&);
    void (*rope)(const RopeArgs&, const Worker&);
    void (*store)(const StoreArgs&, const Worker&);
    void (*heads)(const HeadsArgs&, const Worker&);
    void (*gather)(const GatherArgs&, const Worker&);
    void (*argmax)(const ArgmaxArgs&, const Worker&);
    void (*sample)(const SampleArgs&, const Worker&);
    void (*most_probable)(const MostProbableArgs&, const Worker&);
    // Operations per second with every operand in registers, for one thread: what `linear` is measured against.
    // kind: 0 float multiply-add, 1 bfloat16 dot, 2 int8 dot. Two operations per multiply-add.
    double (*peak_rate)(int kind, double seconds);
    // Reads memory as fast as one thread can: what a product of few rows is measured against.
    uint32_t (*read_memory)(const uint8_t* data, int64_t bytes, bool past_caches);
};

// Null when this build or this machine lacks it. Names as in cpu_features.h.
const OpTable* op_table(const std::string& isa);

}  // namespace fastserve

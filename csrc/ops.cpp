#include "ops.h"

#include <algorithm>

#include "cpu_features.h"

namespace fastserve {

extern const OpTable kTable_plain;
#ifdef FASTSERVE_X86
extern const OpTable kTable_avx2, kTable_avx512, kTable_avx512_vnni_bf16, kTable_amx;
#endif
#ifdef FASTSERVE_AMX_EMULATION
extern const OpTable kTable_amx_emulated;
#endif

const OpTable* op_table(const std::string& isa) {
    static const std::vector<std::string> available = available_isas();
#ifdef FASTSERVE_AMX_EMULATION
    // The emulation is compiled with AVX-512, VNNI and BF16 around it.
    if (isa == "amx_emulated") return op_table("avx512_vnni_bf16") ? &kTable_amx_emulated : nullptr;
#endif
    if (std::find(available.begin(), available.end(), isa) == available.end()) return nullptr;
    if (isa == "plain") return &kTable_plain;
#ifdef FASTSERVE_X86
    if (isa == "avx2") return &kTable_avx2;
    if (isa == "avx512") return &kTable_avx512;
    if (isa == "avx512_vnni_bf16") return &kTable_avx512_vnni_bf16;
    if (isa == "amx") return &kTable_amx;
#endif
    return nullptr;
}

int64_t prepared_bytes(const LinearArgs& args) {
    const PackedWeight& weight = *args.weight;
    // Scales, group sums and the activations themselves, as floats at most.
    const int64_t row = weight.k_padded * 4 + weight.groups * 4 + 4;
    return args.rows > kPrivateRows ? round_up(args.rows * row + 192, 64) : 0;
}

ScratchSize linear_scratch(const LinearArgs& args) {
    constexpr int64_t kTile = (kChunkRows + kSegmentWords) * kPanelColumns * 4;  // partial sums and an unpacked piece of panel
    const PackedWeight& weight = *args.weight;
    const int64_t row = weight.k_padded * 4 + weight.groups * 4 + 4;
    ScratchSize size;
    size.shared = static_cast<size_t>(prepared_bytes(args));
    if (args.adapter_slots) size.shared += static_cast<size_t>(args.rows * args.adapters->max_ranks() * 4);
    size.per_thread = static_cast<size_t>(kTile + kPrivateRows * row + 192);
    return size;
}

ScratchSize attention_scratch(const AttentionArgs& args) {
    const int64_t rows = attention_tile_rows(args);
    const int64_t depth = round_up(args.head_size, 32), padded = round_up(args.head_size, kPanelColumns);
    ScratchSize size;
    size.per_thread = static_cast<size_t>(4 * (rows * (depth + 2 * kKeyBlock + 2 * padded + 4) + kKeyBlock * (depth + padded + 2)) + 1024);
    for (int64_t i = 0; i < args.num_sequences; ++i) {
        const int64_t queries = args.query_starts[i + 1] - args.query_starts[i];
        if (queries > kSplitQueries) continue;
        const int64_t splits = args.context_lens[i] / kSplitKeys + 2;
        size.shared += static_cast<size_t>(4 * splits * queries * args.num_heads * (padded + 2));
    }
    return size;
}

ScratchSize varlen_scratch(const VarlenArgs& args) {
    const int64_t depth = round_up(args.head_size, 32), padded = round_up(args.head_size, kPanelColumns);
    const int64_t panels = longest(args) * (depth + padded);
    const int64_t tile = kVarlenRows * (depth + 2 * kVarlenKeys + padded + 2);
    return {0, static_cast<size_t>(4 * (panels + tile) + 1024)};
}

ScratchSize heads_scratch(const HeadsArgs& args) {
    return {0, static_cast<size_t>(round_up(args.store.size * 4, 64) * 2)};
}

ScratchSize argmax_scratch(const ArgmaxArgs& args, int threads) {
    return {static_cast<size_t>(args.rows * threads * 16), 0};
}

ScratchSize sample_scratch(const SampleArgs& args) {
    const int64_t chunks = ceil_div(args.size, kSampleChunk);
    // Weights, a list of candidates, and three numbers per chunk.
    return {0, static_cast<size_t>((2 * chunks * kSampleChunk + 3 * chunks) * 4 + 256)};
}

ScratchSize most_probable_scratch(const MostProbableArgs& args) {
    return {0, static_cast<size_t>(ceil_div(args.size, kSampleChunk) * 4)};  // the largest of each chunk
}

}  // namespace fastserve

// A plan of what a decoder's layer begins with gives the bits of its operations one by one, on one thread, two and three,
// where threads go on without waiting for each other and where they wait.
#include <cstdint>
#include <cstring>
#include <new>
#include <random>
#include <vector>

#include "../plan.h"
#include "each_table.h"

using namespace fastserve;

namespace {

constexpr int64_t kHidden = 96, kHeads = 4, kKvHeads = 2, kSize = 64, kAll = kHeads + 2 * kKvHeads;
constexpr int64_t kBlockSize = 16, kBlocks = 2, kVocabulary = 11, kProbeTokens = 5, kProbeRows = 3, kMostTokens = 6;

// Everything that one layer's operations touch, for up to kMostTokens tokens.
struct Layer {
    std::vector<float> embedding, norm, head_norm, angles, keys, values;
    std::vector<float> x, normed, projected, queries, attended;
    std::vector<int64_t> ids, positions, slots, chosen;
    std::unique_ptr<PackedWeight> weight;

    explicit Layer(ThreadPool& pool) {
        std::mt19937 random(3);
        std::normal_distribution<float> normal;
        auto fill = [&](std::vector<float>& values, int64_t count) {
            for (int64_t i = 0; i < count; ++i) values.push_back(normal(random));
        };
        fill(embedding, kVocabulary * kHidden), fill(norm, kHidden), fill(head_norm, kSize), fill(angles, kMostTokens * kSize / 2);
        std::vector<float> dense;
        fill(dense, kAll * kSize * kHidden);
        weight = pack({Format::f32, kHidden, {{kAll * kSize, dense.data()}}}, pool);
        keys.resize(kBlocks * kBlockSize * kKvHeads * kSize), values.resize(keys.size());
        for (auto* made : {&x, &normed}) made->resize(kMostTokens * kHidden);
        projected.resize(kMostTokens * kAll * kSize);
        for (auto* made : {&queries, &attended}) made->resize(kMostTokens * kHeads * kSize);
        ids.resize(kMostTokens), chosen.resize(kMostTokens);
        for (int64_t i = 0; i < kMostTokens; ++i) ids[i] = (5 * i + 2) % kVocabulary, positions.push_back(i), slots.push_back(i);
    }

    std::vector<Op> operations(int64_t tokens) {
        constexpr int64_t row = kAll * kSize;
        std::vector<Op> ops;
        ops.push_back(GatherArgs{nullptr, embedding.data(), DType::f32, tokens, kHidden, ids.data(), 1.0f, nullptr, x.data()});
        ops.push_back(NormArgs{x.data(), DType::f32, tokens, 1, kHidden, 0, kHidden, norm.data(), nullptr, normed.data(), 1e-6f,
                               false, nullptr});
        LinearArgs linear{};
        linear.weight = weight.get(), linear.rows = tokens, linear.x = normed.data(), linear.x_type = DType::f32;
        linear.x_stride = kHidden, linear.out = projected.data(), linear.out_type = DType::f32, linear.out_stride = row;
        ops.push_back(linear);
        const float *key = projected.data() + kHeads * kSize, *value = key + kKvHeads * kSize;
        StoreArgs store{key, value, DType::f32, DType::f32, tokens, kKvHeads, kSize, row, kSize, row, kSize, keys.data(),
                        values.data(), slots.data(), kBlockSize};
        ops.push_back(HeadsArgs{projected.data(), kHeads, row, kSize, head_norm.data(), head_norm.data(), 1e-6f, angles.data(),
                                angles.data(), kSize / 2, positions.data(), queries.data(), store});
        AttentionArgs attention{};
        attention.query = queries.data(), attention.x_type = attention.cache_type = DType::f32;
        attention.query_stride = kHeads * kSize, attention.query_head_stride = kSize, attention.out = attended.data();
        attention.num_heads = kHeads, attention.num_kv_heads = kKvHeads, attention.head_size = kSize;
        attention.keys = keys.data(), attention.values = values.data(), attention.block_size = kBlockSize;
        attention.scale = 0.125f, attention.causal = true;
        ops.push_back(attention);
        ops.push_back(ArgmaxArgs{attended.data(), DType::f32, tokens, kHeads * kSize, kHeads * kSize, chosen.data()});
        return ops;
    }
};

void record(Plan& plan, Layer& layer) {
    auto announce = [&](const auto& tensor, int64_t width, int input = -1) {
        plan.tensor(tensor.data(), kProbeTokens * width * static_cast<int64_t>(sizeof(tensor[0])), kProbeTokens, input);
    };
    announce(layer.ids, 1, 0), announce(layer.positions, 1, 1), announce(layer.slots, 1, 2);
    announce(layer.x, kHidden), announce(layer.normed, kHidden), announce(layer.projected, kAll * kSize);
    announce(layer.queries, kHeads * kSize), announce(layer.attended, kHeads * kSize), announce(layer.chosen, 1);
    for (Op& op : layer.operations(kProbeTokens)) plan.add(op);
    plan.finish(layer.attended.data(), layer.chosen.data());
}

// A step that no memory is large enough for, after which smaller ones go on.
void run_out_of_memory(Plan& plan) {
    StepInputs step{};
    step.tokens = int64_t{1} << 42;
    bool is_refused = false;
    try {
        plan.run(step, true);
    } catch (const std::bad_alloc&) {
        is_refused = true;
    }
    CHECK(is_refused, "four million million tokens fit");
}

void check(const OpTable& table, int threads) {
    ThreadPool pool(threads, {});
    Layer alone(pool), planned(pool);
    Plan plan(table, pool, kProbeTokens, kProbeRows);
    record(plan, planned);
    const std::vector<int64_t> blocks{1, 0};
    const int64_t* tables[] = {blocks.data()};
    for (int64_t tokens : {1, 3, 4, 5, 6, 2}) {
        if (tokens == 3) run_out_of_memory(plan);
        const int64_t starts[] = {0, tokens}, lens[] = {tokens};
        for (int64_t i = 0; i < tokens; ++i) alone.slots[i] = planned.slots[i] = kBlockSize + i;
        for (Op& op : alone.operations(tokens)) {
            if (auto* attention = std::get_if<AttentionArgs>(&op)) {
                attention->num_sequences = 1, attention->query_starts = starts;
                attention->context_lens = lens, attention->block_tables = tables;
            }
            pool.run(op_scratch(op, threads), [&](const Worker& worker) { run_op(op, table, worker); });
        }
        StepInputs step{};
        step.tokens = tokens, step.input_ids = planned.ids.data(), step.positions = planned.positions.data();
        step.slots = planned.slots.data(), step.num_sequences = 1, step.query_starts = starts, step.context_lens = lens;
        step.block_tables = tables;
        for (int repeat = 0; repeat < 20; ++repeat) plan.run(step, true);
        CHECK(plan.bytes() >= tokens * kAll * kSize * 4, "%d tokens have no room", static_cast<int>(tokens));
        const size_t bytes = static_cast<size_t>(tokens * kHeads * kSize) * sizeof(float);
        CHECK(!std::memcmp(plan.logits(), alone.attended.data(), bytes), "%d tokens, %d threads", static_cast<int>(tokens), threads);
        CHECK(!std::memcmp(plan.chosen(), alone.chosen.data(), tokens * sizeof(int64_t)), "another token is chosen");
        CHECK(alone.keys == planned.keys && alone.values == planned.values, "the caches differ");
    }
}

}  // namespace

int main() {
    for_each_table("plan", [](const OpTable& table) {
        for (int threads : {1, 2, 3}) check(table, threads);
    });
    return 0;
}

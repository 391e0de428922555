// Attention on every instruction set of this machine, the emulated tile unit included, against double; a token computed
// alone, in chunks or with its whole prompt, on one thread or three, has the same bits.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "../ops.h"
#include "each_table.h"

using namespace fastserve;

namespace {

constexpr int64_t kBlockSize = 16;

struct Problem {
    int64_t length, heads, kv_heads, size, window;
    float softcap;
    DType type;
    bool bytes = false, causal = true, biased = false;
    std::vector<float> query, keys, values;  // [length, heads, size]; [slots, kv_heads, size]
    std::vector<uint16_t> narrow_query;
    std::vector<int64_t> table;
    std::vector<char> key_cache, value_cache;
    std::vector<float> bias;  // [heads, 2 * length - 1]

    DType cache_type() const { return bytes ? DType::s8 : type; }

    int64_t visible_end(int64_t token) const {
        if (causal) return token + 1;
        return window ? min_of(length, token + window) : length;
    }
};

// A cache as the store operation makes it of rows [slots, G, D]; for bytes, the rows become what the bytes stand for.
std::vector<char> stored(const Problem& p, std::vector<float>& rows, DType type, bool is_keys) {
    const int64_t slots = static_cast<int64_t>(rows.size()) / (p.kv_heads * p.size), token = p.kv_heads * p.size;
    const CacheLayout layout{type, p.kv_heads, p.size, kBlockSize};
    std::vector<char> keys(static_cast<size_t>(slots / kBlockSize * layout.block()), 99), values = keys;
    std::vector<int64_t> order;
    for (int64_t i = 0; i < slots; ++i) order.push_back(i);
    StoreArgs args{rows.data(), rows.data(), DType::f32, type, slots, p.kv_heads, p.size, token, p.size, token,
                   p.size, keys.data(), values.data(), order.data(), kBlockSize};
    ThreadPool pool(2, {});
    pool.run({}, [&](const Worker& worker) { op_table("plain")->store(args, worker); });
    for (int64_t slot = 0; type == DType::s8 && slot < slots; ++slot) {
        const char* block = values.data() + slot / kBlockSize * layout.block();
        for (int64_t head = 0; head < p.kv_heads; ++head) {
            float scale;
            std::memcpy(&scale, block + layout.scale(head, slot % kBlockSize), 4);
            for (int64_t d = 0; d < p.size; ++d) {
                float& value = rows[(slot * p.kv_heads + head) * p.size + d];
                const auto byte = static_cast<int8_t>(block[head * layout.head() + slot % kBlockSize * p.size + d]);
                const float rounded = scale * byte;
                CHECK(std::fabs(value - rounded) <= 0.501f * scale, "a byte is far from its value");
                value = rounded;
            }
        }
    }
    return is_keys ? keys : values;
}

Problem make_problem(int64_t length, int64_t heads, int64_t kv_heads, int64_t size, int64_t window, float softcap,
                     DType type, bool bytes = false, bool causal = true, bool biased = false) {
    Problem p{};
    p.length = length, p.heads = heads, p.kv_heads = kv_heads, p.size = size, p.window = window, p.softcap = softcap;
    p.type = type, p.bytes = bytes, p.causal = causal, p.biased = biased;
    std::mt19937 random(static_cast<unsigned>(length * 7 + size));
    std::normal_distribution<float> normal;
    auto fill = [&](std::vector<float>& wide, int64_t count) {
        for (int64_t i = 0; i < count; ++i) wide.push_back(bf16_to_f32(f32_to_bf16(normal(random))));
    };
    const int64_t blocks = ceil_div(length, kBlockSize);
    for (int64_t i = 0; i < blocks; ++i) p.table.push_back((i * 7 + 3) % (blocks % 7 ? blocks : blocks + 1));
    fill(p.query, length * heads * size);
    fill(p.keys, (blocks + 1) * kBlockSize * kv_heads * size);
    fill(p.values, (blocks + 1) * kBlockSize * kv_heads * size);
    for (float value : p.query) p.narrow_query.push_back(f32_to_bf16(value));
    for (int64_t i = 0; i < heads * (2 * length - 1); ++i) p.bias.push_back(normal(random));
    p.key_cache = stored(p, p.keys, p.cache_type(), true);
    p.value_cache = stored(p, p.values, p.cache_type(), false);
    return p;
}

// Tokens [start, end) of the sequence, whose keys up to `end` are in the cache.
std::vector<float> attend(const OpTable& table, ThreadPool& pool, const Problem& p, int64_t start, int64_t end) {
    const int64_t row = p.heads * p.size;
    std::vector<float> out(static_cast<size_t>((end - start) * row), -99.0f);
    std::vector<uint16_t> narrow(out.size());
    const bool wide = p.type == DType::f32;
    const int64_t starts[2] = {0, end - start}, lens[1] = {p.causal ? end : p.length};
    if (!p.causal) CHECK(end == p.length, "without causality a sequence is seen whole");
    const int64_t* tables[1] = {p.table.data()};
    AttentionArgs args{};
    args.query = wide ? static_cast<const void*>(p.query.data() + start * row) : p.narrow_query.data() + start * row;
    args.x_type = p.type, args.cache_type = p.cache_type();
    args.query_stride = row, args.query_head_stride = p.size;
    args.out = wide ? static_cast<void*>(out.data()) : narrow.data();
    args.num_heads = p.heads, args.num_kv_heads = p.kv_heads, args.head_size = p.size;
    args.keys = p.key_cache.data(), args.values = p.value_cache.data();
    args.bias = p.biased ? p.bias.data() : nullptr;
    args.bias_stride = 2 * p.length - 1, args.bias_origin = p.length - 1;
    args.block_size = kBlockSize;
    args.num_sequences = 1;
    args.query_starts = starts, args.context_lens = lens, args.block_tables = tables;
    args.scale = 1.0f / std::sqrt(static_cast<float>(p.size));
    args.softcap = p.softcap, args.window = p.window, args.causal = p.causal;
    pool.run(attention_scratch(args), [&](const Worker& worker) { table.attention(args, worker); });
    for (size_t i = 0; !wide && i < out.size(); ++i) out[i] = bf16_to_f32(narrow[i]);
    return out;
}

double exact(const Problem& p, int64_t token, int64_t head, std::vector<double>& out) {
    const int64_t kv_head = head / (p.heads / p.kv_heads), first = p.window ? max_of(0, token - p.window + 1) : 0;
    std::vector<double> scores;
    auto at = [&](int64_t position) {
        return ((p.table[position / kBlockSize] * kBlockSize + position % kBlockSize) * p.kv_heads + kv_head) * p.size;
    };
    double top = -1e300, sum = 0;
    for (int64_t position = first; position < p.visible_end(token); ++position) {
        double dot = 0;
        for (int64_t d = 0; d < p.size; ++d) {
            dot += double(p.query[(token * p.heads + head) * p.size + d]) * p.keys[at(position) + d];
        }
        dot /= std::sqrt(static_cast<double>(p.size));
        if (p.biased) dot += p.bias[head * (2 * p.length - 1) + p.length - 1 + position - token];
        if (p.softcap > 0) dot = p.softcap * std::tanh(dot / p.softcap);
        scores.push_back(dot);
        top = std::fmax(top, dot);
    }
    out.assign(static_cast<size_t>(p.size), 0.0);
    for (double& score : scores) sum += score = std::exp(score - top);
    for (int64_t position = first; position < p.visible_end(token); ++position) {
        for (int64_t d = 0; d < p.size; ++d) out[d] += scores[position - first] / sum * p.values[at(position) + d];
    }
    return sum;
}

void check_problem(const OpTable& table, const Problem& p, ThreadPool& one, ThreadPool& three) {
    const auto whole = attend(table, three, p, 0, p.length);
    double worst = 0;
    std::vector<double> expected;
    for (int64_t token = 0; token < p.length; token += 5) {
        for (int64_t head = 0; head < p.heads; ++head) {
            exact(p, token, head, expected);
            for (int64_t d = 0; d < p.size; ++d) {
                worst = std::fmax(worst, std::fabs(expected[d] - whole[(token * p.heads + head) * p.size + d]));
            }
        }
    }
    CHECK(worst < (p.type == DType::f32 ? 1e-5 : 2e-2), "%s length %d size %d window %d: error %.2e", table.name,
          int(p.length), int(p.size), int(p.window), worst);
    const int64_t row = p.heads * p.size;
    for (int64_t chunk : {1, 3, 33, 80}) {
        for (ThreadPool* pool : {&one, &three}) {
            // Single tokens are slow to go through all of: the last ones cross a split and blocks.
            for (int64_t start = chunk < 33 ? max_of(0, p.length - 9) : 0; start < p.length; start += chunk) {
                const int64_t end = p.causal ? min_of(p.length, start + chunk) : p.length;
                const auto part = attend(table, *pool, p, start, end);
                CHECK(std::memcmp(part.data(), whole.data() + start * row, part.size() * 4) == 0,
                      "%s: tokens %d..%d of %d differ from the whole", table.name, int(start), int(end), int(p.length));
            }
        }
    }
}

}  // namespace

int main() {
    ThreadPool one(1, {}), three(3, {});
    for_each_table("attention", [&](const OpTable& table) {
        for (DType type : {DType::f32, DType::bf16}) {
            check_problem(table, make_problem(1, 2, 1, 16, 0, 0.0f, type), one, three);
            check_problem(table, make_problem(130, 4, 2, 64, 0, 0.0f, type), one, three);
            check_problem(table, make_problem(97, 3, 3, 36, 40, 10.0f, type), one, three);
            check_problem(table, make_problem(550, 2, 1, 32, 0, 0.0f, type), one, three);
            check_problem(table, make_problem(60, 2, 1, 35, 0, 0.0f, type), one, three);
            check_problem(table, make_problem(130, 4, 2, 64, 50, 0.0f, type, true), one, three);
            check_problem(table, make_problem(70, 3, 1, 36, 0, 8.0f, type, true, true, true), one, three);
            check_problem(table, make_problem(90, 4, 2, 64, 0, 0.0f, type, false, false, true), one, three);
            check_problem(table, make_problem(90, 2, 2, 32, 20, 0.0f, type, false, false, false), one, three);
        }
    });
}

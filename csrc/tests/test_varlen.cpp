// Attention over whole sequences on every instruction set of this machine, the emulated tile unit included, against
// double; a sequence alone, among others, on one thread or three has the same bits.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "../ops.h"
#include "each_table.h"

using namespace fastserve;

namespace {

struct Problem {
    int64_t heads, kv_heads, size, window;
    bool biased;
    DType type;
    std::vector<int64_t> starts;       // sequences
    std::vector<float> qkv, bias;      // [T, heads + 2 kv_heads, size]; [heads, 2 radius + 1]
    std::vector<uint16_t> narrow_qkv;
    int64_t radius = 0;

    int64_t row() const { return (heads + 2 * kv_heads) * size; }
    const float* key(int64_t token, int64_t head) const { return qkv.data() + token * row() + (heads + head) * size; }
    const float* value(int64_t token, int64_t head) const { return key(token, head + kv_heads); }
};

Problem make_problem(const std::vector<int64_t>& lengths, int64_t heads, int64_t kv_heads, int64_t size, int64_t window,
                     bool biased, DType type) {
    Problem p{heads, kv_heads, size, window, biased, type, {0}, {}, {}, {}};
    for (int64_t length : lengths) p.starts.push_back(p.starts.back() + length), p.radius = max_of(p.radius, length);
    std::mt19937 random(static_cast<unsigned>(size + window));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < p.starts.back() * p.row(); ++i) {
        p.narrow_qkv.push_back(f32_to_bf16(normal(random)));
        p.qkv.push_back(bf16_to_f32(p.narrow_qkv.back()));
    }
    for (int64_t i = 0; i < heads * (2 * p.radius + 1); ++i) p.bias.push_back(normal(random));
    return p;
}

// Sequences [first, last) of the problem.
std::vector<float> attend(const OpTable& table, ThreadPool& pool, const Problem& p, size_t first, size_t last) {
    std::vector<int64_t> starts;
    for (size_t i = first; i <= last; ++i) starts.push_back(p.starts[i] - p.starts[first]);
    std::vector<float> out(static_cast<size_t>(starts.back() * p.heads * p.size), -99.0f);
    std::vector<uint16_t> narrow(out.size());
    const bool wide = p.type == DType::f32;
    const int64_t at = p.starts[first] * p.row(), bytes = element_bytes(p.type);
    const char* base = (wide ? reinterpret_cast<const char*>(p.qkv.data()) : reinterpret_cast<const char*>(p.narrow_qkv.data()));
    base += at * bytes;
    VarlenArgs args{};
    args.type = p.type;
    args.query = base, args.keys = base + p.heads * p.size * bytes;
    args.values = base + (p.heads + p.kv_heads) * p.size * bytes;
    args.query_stride = args.key_stride = args.value_stride = p.row();
    args.query_head_stride = args.key_head_stride = args.value_head_stride = p.size;
    args.out = wide ? static_cast<void*>(out.data()) : narrow.data();
    args.num_heads = p.heads, args.num_kv_heads = p.kv_heads, args.head_size = p.size;
    args.num_sequences = static_cast<int64_t>(last - first);
    args.query_starts = args.key_starts = starts.data();
    args.scale = 1.0f / std::sqrt(static_cast<float>(p.size));
    args.window = p.window;
    args.bias = p.biased ? p.bias.data() : nullptr;
    args.bias_stride = 2 * p.radius + 1, args.bias_origin = p.radius;
    pool.run(varlen_scratch(args), [&](const Worker& worker) { table.varlen(args, worker); });
    for (size_t i = 0; !wide && i < out.size(); ++i) out[i] = bf16_to_f32(narrow[i]);
    return out;
}

// One row in double precision: query head `head` of the token, in the sequence [first, last).
std::vector<double> exact(const Problem& p, int64_t token, int64_t head, int64_t first, int64_t last) {
    const int64_t kv_head = head / (p.heads / p.kv_heads);
    if (p.window) first = max_of(first, token - p.window + 1), last = min_of(last, token + p.window);
    const float* query = p.qkv.data() + token * p.row() + head * p.size;
    std::vector<double> scores, out(static_cast<size_t>(p.size), 0.0);
    double top = -1e300, sum = 0;
    for (int64_t key = first; key < last; ++key) {
        double dot = 0;
        for (int64_t d = 0; d < p.size; ++d) dot += double(query[d]) * p.key(key, kv_head)[d];
        dot /= std::sqrt(static_cast<double>(p.size));
        if (p.biased) dot += p.bias[head * (2 * p.radius + 1) + p.radius + key - token];
        scores.push_back(dot);
        top = std::fmax(top, dot);
    }
    for (double& score : scores) sum += score = std::exp(score - top);
    for (int64_t key = first; key < last; ++key) {
        for (int64_t d = 0; d < p.size; ++d) out[d] += scores[key - first] / sum * p.value(key, kv_head)[d];
    }
    return out;
}

void check_problem(const OpTable& table, const Problem& p, ThreadPool& one, ThreadPool& three) {
    const size_t count = p.starts.size() - 1;
    const auto whole = attend(table, three, p, 0, count);
    double worst = 0;
    for (size_t sequence = 0; sequence < count; ++sequence) {
        const int64_t first = p.starts[sequence], last = p.starts[sequence + 1];
        for (int64_t token = first; token < last; token += token + 5 < last ? 5 : 1) {
            for (int64_t head = 0; head < p.heads; ++head) {
                const auto expected = exact(p, token, head, first, last);
                for (int64_t d = 0; d < p.size; ++d) {
                    worst = std::fmax(worst, std::fabs(expected[d] - whole[(token * p.heads + head) * p.size + d]));
                }
            }
        }
        for (ThreadPool* pool : {&one, &three}) {
            const auto alone = attend(table, *pool, p, sequence, sequence + 1);
            CHECK(std::memcmp(alone.data(), whole.data() + first * p.heads * p.size, alone.size() * 4) == 0,
                  "%s: sequence %d alone differs", table.name, int(sequence));
        }
    }
    CHECK(worst < (p.type == DType::f32 ? 1e-5 : 2e-2), "%s size %d window %d: error %.2e", table.name, int(p.size),
          int(p.window), worst);
}

}  // namespace

int main() {
    ThreadPool one(1, {}), three(3, {});
    for_each_table("varlen", [&](const OpTable& table) {
        for (DType type : {DType::f32, DType::bf16}) {
            check_problem(table, make_problem({1, 47, 2, 49, 64, 130}, 4, 4, 64, 0, false, type), one, three);
            check_problem(table, make_problem({600, 33}, 2, 1, 32, 0, false, type), one, three);   // two segments
            check_problem(table, make_problem({97, 5}, 3, 3, 36, 0, true, type), one, three);      // an odd head, a bias
            check_problem(table, make_problem({700, 20}, 2, 2, 16, 40, false, type), one, three);  // a window
            check_problem(table, make_problem({150}, 2, 2, 80, 30, true, type), one, three);       // two panels of values
        }
    });
}

// The operations that move each value once, sampling, and what packing keeps, on every instruction set of this machine:
// against plain double arithmetic, over odd sizes and strided rows, with one thread and three.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "../ops.h"
#include "each_table.h"

using namespace fastserve;

namespace {

std::mt19937 source(7);

// Values of `type`; what they stand for as floats.
struct Values {
    DType type;
    std::vector<float> wide;
    std::vector<uint16_t> narrow;

    Values(DType of, int64_t count, float deviation = 1.0f) : type(of) {
        std::normal_distribution<float> normal(0.0f, deviation);
        for (int64_t i = 0; i < count; ++i) {
            narrow.push_back(f32_to_bf16(normal(source)));
            wide.push_back(bf16_to_f32(narrow.back()));
        }
    }
    void* data() { return type == DType::f32 ? static_cast<void*>(wide.data()) : narrow.data(); }
    double at(int64_t i) const { return type == DType::f32 ? wide[i] : bf16_to_f32(narrow[i]); }
};

void check_near(const char* table, const char* what, DType type, int64_t size, double result, double expected) {
    const double step = type == DType::f32 ? 4e-6 : 1.3e-2;  // three roundings of bfloat16, where the reference has them
    CHECK(std::fabs(result - expected) <= step * std::fmax(1.0, std::fabs(expected)), "%s %s size %d: %g is not %g", table,
          what, int(size), result, expected);
}

void check_norms(const OpTable& table, ThreadPool& pool, DType type, int64_t size, bool subtract_mean) {
    const int64_t outer = 5, inner = 3, stride = size + 7;
    Values x(type, outer * inner * stride), weight(type, size), bias(type, size), out(type, outer * inner * size);
    NormArgs args{x.data(), type, outer, inner, inner * stride, stride, size, weight.data(),
                  subtract_mean ? bias.data() : nullptr, out.data(), 1e-5f, subtract_mean};
    pool.run({}, [&](const Worker& worker) { table.norm(args, worker); });
    for (int64_t row = 0; row < outer * inner; ++row) {
        double mean = 0, square = 0;
        for (int64_t i = 0; i < size; ++i) mean += x.at(row * stride + i) / double(size);
        if (!subtract_mean) mean = 0;
        for (int64_t i = 0; i < size; ++i) square += std::pow(x.at(row * stride + i) - mean, 2) / double(size);
        for (int64_t i = 0; i < size; ++i) {
            const double value = (x.at(row * stride + i) - mean) / std::sqrt(square + 1e-5) * weight.at(i);
            check_near(table.name, "norm", type, size, out.at(row * size + i), value + (subtract_mean ? bias.at(i) : 0.0));
        }
    }
}

void check_rope(const OpTable& table, ThreadPool& pool, DType type, int64_t size, int64_t half) {
    const int64_t tokens = 4, heads = 3, head_stride = size + 1, token_stride = heads * head_stride + 5;
    Values x(type, tokens * token_stride), cos(type, tokens * half), sin(type, tokens * half), out(type, tokens * heads * size);
    RopeArgs args{x.data(), type, tokens, heads, size, token_stride, head_stride, cos.data(), sin.data(), half, out.data()};
    pool.run({}, [&](const Worker& worker) { table.rope(args, worker); });
    for (int64_t row = 0; row < tokens * heads; ++row) {
        const int64_t token = row / heads, at = token * token_stride + row % heads * head_stride;
        for (int64_t i = 0; i < size; ++i) {
            const int64_t j = i % half;
            double value = x.at(at + i);
            if (i < 2 * half) {
                const double c = cos.at(token * half + j), s = sin.at(token * half + j);
                value = i < half ? value * c - x.at(at + half + i) * s : value * c + x.at(at + j) * s;
            }
            check_near(table.name, "rope", type, size, out.at(row * size + i), value);
        }
    }
}

void check_store(const OpTable& table, ThreadPool& pool, DType type, DType cache_type, int64_t size) {
    const int64_t tokens = 5, heads = 2, stride = heads * size + 3;
    const int64_t slots[tokens] = {3, 0, 9, 4, 7};
    Values key(type, tokens * stride), value(type, tokens * stride), keys(cache_type, 10 * heads * size), values(keys);
    StoreArgs args{key.data(), value.data(), type, cache_type, tokens, heads, size, stride, size, stride, size,
                   keys.data(), values.data(), slots, 5};
    pool.run({}, [&](const Worker& worker) { table.store(args, worker); });
    const int64_t each = cache_type == DType::f32 ? 1 : 2, whole = size / each * each;  // elements of a word, and in words
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t i = 0; i < heads * size; ++i) {
            const int64_t offset = slots[token] % 5, d = i % size, from = token * stride + i;
            const int64_t head = (slots[token] / 5 * heads + i / size) * 5 * size;
            const int64_t to = head + (d < whole ? d / each * 5 * each + offset * each + d % each : whole * 5 + offset);
            CHECK(keys.at(to) == key.at(from), "%s keys size %d", table.name, int(size));
            CHECK(values.at(head + offset * size + d) == value.at(from), "%s values size %d", table.name, int(size));
        }
    }
}

void check_most_probable(const OpTable& table, ThreadPool& pool, int64_t size, int64_t count) {
    const int64_t rows = 5, stride = size + 3;
    Values x(DType::f32, rows * stride, 2.0f), sums(DType::f32, rows), values(DType::f32, rows * count);
    std::vector<int64_t> ids(rows * count, -1);
    auto* in = static_cast<float*>(x.data());
    for (int64_t i = size / 3; i < size; i += 7) in[i] = 1.5f;  // row 0 has equals
    MostProbableArgs args{in, rows, size, stride, count, static_cast<float*>(sums.data()), static_cast<float*>(values.data()), ids.data()};
    pool.run(most_probable_scratch(args), [&](const Worker& worker) { table.most_probable(args, worker); });
    for (int64_t row = 0; row < rows; ++row) {
        std::vector<int64_t> order(size);
        for (int64_t i = 0; i < size; ++i) order[i] = i;
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.at(row * stride + a) > x.at(row * stride + b); });
        double sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += std::exp(x.at(row * stride + i));
        CHECK(std::fabs(sums.at(row) - std::log(sum)) < 1e-5, "%s log sum of %d", table.name, int(size));
        for (int64_t i = 0; i < count; ++i) {
            CHECK(ids[row * count + i] == order[i] && values.at(row * count + i) == x.at(row * stride + order[i]),
                  "%s place %d of the largest of %d", table.name, int(i), int(size));
        }
    }
}

void check_argmax_and_sample(const OpTable& table, ThreadPool& pool, DType type, int64_t size) {
    const int64_t rows = 8, stride = size + 3;
    Values x(type, rows * stride, 2.0f);
    std::vector<int64_t> best(rows, -1), drawn(rows, -1), plain(rows, -1);
    ArgmaxArgs arguments{x.data(), type, rows, size, stride, best.data()};
    pool.run(argmax_scratch(arguments, pool.size()), [&](const Worker& worker) { table.argmax(arguments, worker); });
    std::vector<SampleRow> how;
    for (int64_t row = 0; row < rows; ++row) {
        const float cold = row == 0 ? 0.0f : 0.5f + float(row % 3);
        how.push_back({cold, row % 4 == 1 ? 5 : 0, row % 4 == 2 ? 0.8 : 1.0, row == 6 ? 0.1 : 0.0, (uint64_t{1} << 53) / 8 * row});
    }
    SampleArgs args{x.data(), type, rows, size, stride, how.data(), drawn.data()};
    pool.run(sample_scratch(args), [&](const Worker& worker) { table.sample(args, worker); });
    args.out = plain.data();
    pool.run(sample_scratch(args), [&](const Worker& worker) { op_table("plain")->sample(args, worker); });
    CHECK(drawn == plain && drawn[0] == best[0], "%s draws other tokens than plain, size %d", table.name, int(size));
    for (int64_t row = 0; row < rows; ++row) {
        int64_t first = 0;
        for (int64_t i = 1; i < size; ++i) first = x.at(row * stride + i) > x.at(row * stride + first) ? i : first;
        CHECK(best[row] == first, "%s argmax size %d", table.name, int(size));
        if (how[row].inverse_temperature == 0.0f || how[row].top_k || how[row].top_p < 1.0 || how[row].min_p > 0.0) continue;
        // Inverse of the distribution function, in double: the drawn token's interval holds the random number.
        double sum = 0, before = 0, upto = 0;
        for (int64_t i = 0; i < size; ++i) {
            if (i == drawn[row]) before = sum;
            sum += std::exp((x.at(row * stride + i) - x.at(row * stride + first)) * how[row].inverse_temperature);
            if (i == drawn[row]) upto = sum;
        }
        const double target = double(how[row].random) / std::pow(2.0, 53);
        CHECK(before / sum < target + 1e-6 && target < upto / sum + 1e-6, "%s sample size %d", table.name, int(size));
    }
}

void check_packing(ThreadPool& pool, Format format, int64_t group, int64_t n, int64_t k) {
    const int64_t groups = group ? ceil_div(k, group) : 1, levels = format == Format::u8 ? 256 : 16;
    Values floats(format == Format::bf16 ? DType::bf16 : DType::f32, n * k), table(DType::f32, 16), scales(DType::f32, n * groups);
    std::vector<uint8_t> codes, zeros;
    for (int64_t i = 0; i < n * k; ++i) codes.push_back(static_cast<uint8_t>(source() % levels));
    for (int64_t i = 0; i < n * groups; ++i) zeros.push_back(static_cast<uint8_t>(source() % levels));
    const bool is_float = format == Format::f32 || format == Format::bf16;
    const bool has_zeros = !is_float && format != Format::c4;
    WeightSource weight{format, k, {}};
    for (int64_t first = 0; first < n; first += ceil_div(n, 2)) {  // in two parts, as merged matrices come
        const int64_t bytes = first * k * (format == Format::f32 ? 4 : format == Format::bf16 ? 2 : 1);
        const uint8_t* values = is_float ? static_cast<const uint8_t*>(floats.data()) : codes.data();
        weight.parts.push_back({min_of(n - first, ceil_div(n, 2)), values + bytes,
                                is_float ? nullptr : static_cast<const float*>(scales.data()) + first * groups,
                                has_zeros ? zeros.data() + first * groups : nullptr});
    }
    weight.group = group;
    weight.table = format == Format::c4 ? table.wide.data() : nullptr;
    const auto packed = pack(weight, pool);
    std::vector<float> out(static_cast<size_t>(n * k), -1.0f);
    unpack(*packed, out.data());
    for (int64_t i = 0; i < n * k; ++i) {
        const int64_t g = i / k * groups + (group ? i % k / group : 0);
        double expected = floats.at(i);
        if (format == Format::c4) expected = scales.at(g) * table.at(codes[i]);
        else if (!is_float) expected = scales.at(g) * (int(codes[i]) - int(zeros[g]));
        CHECK(std::fabs(out[i] - expected) <= 1e-6 * std::fmax(1.0, std::fabs(expected)),
              "format %d n %d k %d: weight %d is %g, not %g", int(format), int(n), int(k), int(i), out[i], expected);
    }
}

}  // namespace

int main() {
    ThreadPool one(1, {}), three(3, {});
    for (int64_t n : {1, 16, 33, 130}) {
        for (int64_t k : {1, 63, 64, 200}) {
            for (Format format : {Format::f32, Format::bf16, Format::u8, Format::u4, Format::c4}) check_packing(three, format, 0, n, k);
            for (int64_t group : {32, 64, 128}) check_packing(three, Format::u4, group, n, k);
        }
    }
    for_each_table("ops", [&](const OpTable& table) {
        for (DType type : {DType::f32, DType::bf16}) {
            for (ThreadPool* pool : {&one, &three}) {
                for (int64_t size : {1, 15, 64, 130}) {
                    check_norms(table, *pool, type, size, false);
                    if (size > 1) check_norms(table, *pool, type, size, true);
                    check_store(table, *pool, type, DType::f32, size);
                    check_store(table, *pool, type, DType::bf16, size);
                    check_argmax_and_sample(table, *pool, type, size);
                    for (const int64_t count : {int64_t{1}, min_of(size, 9)}) check_most_probable(table, *pool, size, count);
                }
                for (int64_t half : {1, 8, 19}) check_rope(table, *pool, type, 40, half);
                check_argmax_and_sample(table, *pool, type, 3001);
            }
        }
    });
}

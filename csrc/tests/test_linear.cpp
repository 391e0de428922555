// Products of every format on every instruction set of this machine, the emulated tile unit included, against double;
// every number of rows and threads must give a row the same bits.
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../ops.h"
#include "../sparse_weight.h"
#include "each_table.h"

using namespace fastserve;

namespace {

struct Case {
    Format format;
    int64_t group;
    bool zeros, quantize_x;
};

constexpr Case kCases[] = {
    {Format::f32, 0, false, false},  {Format::bf16, 0, false, false}, {Format::u8, 0, false, false},
    {Format::u8, 0, true, false},    {Format::u8, 0, false, true},    {Format::u8, 0, true, true},
    {Format::u4, 32, false, false},  {Format::u4, 64, true, false},   {Format::u4, 128, false, false},
    {Format::u4, 0, true, false},    {Format::u4, 32, true, true},    {Format::u4, 64, false, true},
    {Format::u4, 128, true, true},   {Format::u4, 0, false, true},    {Format::c4, 0, false, false},
};

struct Layer {
    int64_t n, k, groups;
    std::vector<float> wide;      // f32 values
    std::vector<uint16_t> narrow; // bf16 values
    std::vector<uint8_t> bytes, zeros;
    std::vector<float> scales, table;
    std::vector<double> exact;    // [n, k]
    WeightSource source;
};

Layer make_layer(const Case& c, int64_t n, int64_t k, bool gated, std::mt19937& random) {
    Layer layer{};
    layer.n = n, layer.k = k;
    layer.groups = c.group ? ceil_div(k, c.group) : 1;
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    for (int i = 0; i < 16; ++i) layer.table.push_back(bf16_to_f32(f32_to_bf16(uniform(random))));
    for (int64_t i = 0; i < n * layer.groups; ++i) {
        layer.scales.push_back(0.5f + 0.4f * uniform(random));
        layer.zeros.push_back(static_cast<uint8_t>(random() % (c.format == Format::u8 ? 256 : 16)));
    }
    for (int64_t row = 0; row < n; ++row) {
        for (int64_t i = 0; i < k; ++i) {
            int64_t g = row * layer.groups + (c.group ? i / c.group : 0);
            float value = uniform(random);
            uint8_t q = static_cast<uint8_t>(random() % (c.format == Format::u8 ? 256 : 16));
            layer.wide.push_back(value);
            layer.narrow.push_back(f32_to_bf16(value));
            layer.bytes.push_back(q);
            int zero = c.zeros ? layer.zeros[g] : c.format == Format::u8 ? 128 : 8;
            layer.exact.push_back(c.format == Format::f32    ? value
                                  : c.format == Format::bf16 ? bf16_to_f32(f32_to_bf16(value))
                                  : c.format == Format::c4   ? double(layer.scales[g]) * layer.table[q]
                                                             : double(layer.scales[g]) * (q - zero));
        }
    }
    const void* values = layer.bytes.data();
    if (c.format == Format::f32) values = layer.wide.data();
    if (c.format == Format::bf16) values = layer.narrow.data();
    layer.source = {c.format, k, {}};
    const int64_t first = n > 1 ? n / 3 : 0, value_bytes = c.format == Format::f32 ? 4 : c.format == Format::bf16 ? 2 : 1;
    for (auto [begin, end] : {std::pair{int64_t{0}, first}, std::pair{first, n}}) {  // two parts
        if (begin == end) continue;
        const uint8_t* zeros = c.zeros ? layer.zeros.data() + begin * layer.groups : nullptr;
        layer.source.parts.push_back({end - begin, static_cast<const uint8_t*>(values) + begin * k * value_bytes,
                                      layer.scales.data() + begin * layer.groups, zeros});
    }
    layer.source.group = c.group;
    layer.source.table = c.format == Format::c4 ? layer.table.data() : nullptr;
    layer.source.gated = gated;
    return layer;
}

std::vector<float> product(const OpTable& table, ThreadPool& pool, const PackedWeight& weight, const void* x, DType type,
                           int64_t rows, bool quantize_x) {
    int64_t columns = weight.out_columns();
    std::vector<float> out(static_cast<size_t>(rows * columns), -77.0f);
    LinearArgs args{&weight, rows, x, type, weight.k, out.data(), DType::f32, columns, nullptr, 0,
                    weight.gated ? Activation::relu : Activation::none, quantize_x};
    pool.run(linear_scratch(args), [&](const Worker& worker) { table.linear(args, worker); });
    return out;
}

void check_case(const OpTable& table, const Case& c, int64_t n, int64_t k, bool gated, DType type, ThreadPool& one,
                ThreadPool& three) {
    std::mt19937 random(static_cast<unsigned>(n * 131 + k));
    Layer layer = make_layer(c, n, k, gated, random);
    auto weight = pack(layer.source, three);
    constexpr int64_t kRows = 53;
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    std::vector<float> wide;
    std::vector<uint16_t> narrow;
    for (int64_t i = 0; i < kRows * k; ++i) {
        narrow.push_back(f32_to_bf16(uniform(random)));
        wide.push_back(bf16_to_f32(narrow.back()));
    }
    const void* x = type == DType::f32 ? static_cast<void*>(wide.data()) : narrow.data();
    auto whole = product(table, three, *weight, x, type, kRows, c.quantize_x);
    int64_t columns = weight->out_columns();

    double worst = 0, largest = 1e-9;
    for (int64_t r = 0; r < kRows; ++r) {
        float top = 0;
        for (int64_t i = 0; i < k; ++i) top = std::fmax(top, std::fabs(wide[r * k + i]));
        double step = top / 127.0;
        auto exact = [&](int64_t row) {
            double sum = 0;
            for (int64_t i = 0; i < k; ++i) {
                double a = wide[r * k + i];
                if (c.quantize_x) a = std::nearbyint(a / step) * step;
                sum += a * layer.exact[row * k + i];
            }
            return sum;
        };
        for (int64_t column = 0; column < columns; ++column) {
            double expected = exact(column);
            if (gated) expected = std::fmax(expected, 0.0) * exact(columns + column);
            worst = std::fmax(worst, std::fabs(expected - whole[r * columns + column]));
            largest = std::fmax(largest, std::fabs(expected));
        }
    }
    double tolerance = c.quantize_x ? 2e-3 : 4e-6;  // a tie of the quantiser may fall the other way
    CHECK(worst / largest < tolerance, "%s format %d group %d zeros %d x8 %d type %d n %d k %d: error %.2e", table.name,
          int(c.format), int(c.group), c.zeros, c.quantize_x, int(type), int(n), int(k), worst / largest);

    for (int64_t rows : {1, 2, 4, 5, 15, 16, 17, 33}) {
        for (ThreadPool* pool : {&one, &three}) {
            auto part = product(table, *pool, *weight, x, type, rows, c.quantize_x);
            CHECK(std::memcmp(part.data(), whole.data(), part.size() * 4) == 0,
                  "%s format %d group %d: %d rows on %d threads differ from %d rows", table.name, int(c.format),
                  int(c.group), int(rows), pool->size(), int(kRows));
        }
    }
}

// A weight without its zeros multiplies to the bits of the dense one, and unpacks to the same values.
void check_sparse(const OpTable& table, int64_t n, int64_t k, bool gated, double zeros, ThreadPool& one, ThreadPool& three) {
    std::mt19937 random(static_cast<unsigned>(n * 137 + k));
    Layer layer = make_layer({Format::bf16, 0, false, false}, n, k, gated, random);
    std::uniform_real_distribution<double> uniform(0, 1);
    for (uint16_t& value : layer.narrow) {
        if (uniform(random) < zeros) value = random() % 8 ? 0 : 0x8000u;
    }
    auto dense = pack(layer.source, three), sparse = pack(layer.source, three);
    CHECK(std::fabs(share_of_zeros(*dense) - zeros) < 0.2, "zeros %f of %f", share_of_zeros(*dense), zeros);
    drop_zeros(*sparse, three);
    CHECK(sparse->format == Format::sparse && (zeros < 0.5 || sparse->bytes() < dense->bytes()), "%d bytes", int(sparse->bytes()));
    std::vector<float> values[2];
    for (auto& item : values) item.resize(static_cast<size_t>(n * k));
    unpack(*dense, values[0].data());
    unpack(*sparse, values[1].data());
    CHECK(values[0] == values[1], "%s: n %d k %d unpacks differently", table.name, int(n), int(k));
    std::vector<uint16_t> narrow(static_cast<size_t>(40 * k));
    std::vector<float> wide;
    for (uint16_t& value : narrow) wide.push_back(bf16_to_f32(value = f32_to_bf16(static_cast<float>(uniform(random) - 0.5))));
    for (DType type : {DType::f32, DType::bf16}) {
        const void* x = type == DType::f32 ? static_cast<void*>(wide.data()) : narrow.data();
        for (int64_t rows : {1, 3, 7, 40}) {
            auto wanted = product(table, three, *dense, x, type, rows, false);
            for (ThreadPool* pool : {&one, &three}) {
                auto found = product(table, *pool, *sparse, x, type, rows, false);
                CHECK(std::memcmp(found.data(), wanted.data(), found.size() * 4) == 0,
                      "%s: %d rows, n %d k %d: a sparse product differs from the dense one", table.name, int(rows), int(n), int(k));
            }
        }
    }
}

}  // namespace

int main() {
    ThreadPool one(1, {}), three(3, {});
    for_each_table("linear", [&](const OpTable& table) {
        for (const Case& c : kCases) {
            for (DType type : {DType::f32, DType::bf16}) {
                if (c.format == Format::f32 && type == DType::bf16) continue;
                check_case(table, c, 1, 3, false, type, one, three);
                check_case(table, c, 70, 90, false, type, one, three);
                check_case(table, c, 130, 320, false, type, one, three);
                check_case(table, c, 82, 192, true, type, one, three);
            }
        }
        for (double zeros : {0.0, 0.5, 0.8, 1.0}) {
            check_sparse(table, 70, 90, false, zeros, one, three);
            check_sparse(table, 130, 640, false, zeros, one, three);
            check_sparse(table, 82, 192, true, zeros, one, three);
        }
    });
}

#include "sparse_weight.h"

#include <algorithm>
#include <chrono>
#include <utility>
#include <vector>

#ifdef FASTSERVE_X86
#include <immintrin.h>
#endif

#include "ops.h"
#include "thread_pool.h"

namespace fastserve {

namespace {

constexpr int64_t kVectorWords = 16;  // words that a 32-bit mask stands for

// Expand masks of 32 values each into vectors of 64 bytes.
using Expand = const uint16_t* (*)(const uint32_t* masks, int64_t count, const uint16_t* values, uint8_t* out);

const uint16_t* expand_plain(const uint32_t* masks, int64_t count, const uint16_t* values, uint8_t* out) {
    std::memset(out, 0, static_cast<size_t>(count) * 64);
    for (int64_t i = 0; i < count; ++i, out += 64) {
        for (uint32_t left = masks[i]; left; left &= left - 1) std::memcpy(out + 2 * __builtin_ctz(left), values++, 2);
    }
    return values;
}

#ifdef FASTSERVE_X86
// Values are loaded whole (the buffer is longer by a vector) and spread in the register: spread by the load, which the
// compiler would make of it without the empty asm, it takes several times as long on AMD's processors. Four vectors at a
// time, so that where values begin does not wait for each one before.
__attribute__((target("avx512f,avx512bw,avx512vbmi2,popcnt"))) const uint16_t* expand_vbmi2(
    const uint32_t* masks, int64_t count, const uint16_t* values, uint8_t* out) {
    for (; count >= 4; count -= 4, masks += 4, out += 256) {
        uint64_t low, high;
        std::memcpy(&low, masks, 8);
        std::memcpy(&high, masks + 2, 8);
        const uint16_t* middle = values + _mm_popcnt_u64(low);
        __m512i a = _mm512_loadu_si512(values), b = _mm512_loadu_si512(values + _mm_popcnt_u32(masks[0]));
        __m512i c = _mm512_loadu_si512(middle), d = _mm512_loadu_si512(middle + _mm_popcnt_u32(masks[2]));
        _mm_prefetch(reinterpret_cast<const char*>(values) + 2048, _MM_HINT_T0);
        asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d));
        _mm512_store_si512(out, _mm512_maskz_expand_epi16(masks[0], a));
        _mm512_store_si512(out + 64, _mm512_maskz_expand_epi16(masks[1], b));
        _mm512_store_si512(out + 128, _mm512_maskz_expand_epi16(masks[2], c));
        _mm512_store_si512(out + 192, _mm512_maskz_expand_epi16(masks[3], d));
        values = middle + _mm_popcnt_u64(high);
    }
    for (; count > 0; --count, ++masks, out += 64) {
        __m512i packed = _mm512_loadu_si512(values);
        asm volatile("" : "+v"(packed));
        _mm512_store_si512(out, _mm512_maskz_expand_epi16(masks[0], packed));
        values += _mm_popcnt_u32(masks[0]);
    }
    return values;
}

__attribute__((target("avx512f,avx512bw,avx512vbmi2,avx512bf16,popcnt"))) void multiply_vbmi2(
    const uint32_t* masks, int64_t word_rows, const uint16_t* values, const char* x, float* c) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < word_rows; ++i, masks += 4, x += 4) {
        uint64_t low, high;
        std::memcpy(&low, masks, 8);
        std::memcpy(&high, masks + 2, 8);
        const uint16_t* middle = values + _mm_popcnt_u64(low);
        __m512i row[4] = {_mm512_loadu_si512(values), _mm512_loadu_si512(values + _mm_popcnt_u32(masks[0])),
                          _mm512_loadu_si512(middle), _mm512_loadu_si512(middle + _mm_popcnt_u32(masks[2]))};
        _mm_prefetch(reinterpret_cast<const char*>(values) + 2048, _MM_HINT_T0);
        asm volatile("" : "+v"(row[0]), "+v"(row[1]), "+v"(row[2]), "+v"(row[3]));
        int32_t pair;
        std::memcpy(&pair, x, 4);
        const __m512i both = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const __m512i words = _mm512_maskz_expand_epi16(masks[v], row[v]);
            sums[v] = _mm512_dpbf16_ps(sums[v], (__m512bh)words, (__m512bh)both);
        }
        values = middle + _mm_popcnt_u64(high);
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) _mm512_storeu_ps(c + 16 * v, sums[v]);
}
#endif

bool has_vbmi2() {
#ifdef FASTSERVE_X86
    return __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw");
#else
    return false;
#endif
}

const uint16_t* values_of(const PackedWeight& weight, int64_t panel) {
    const uint8_t* all = weight.base + weight.panels * weight.panel_bytes;
    return reinterpret_cast<const uint16_t*>(all) + weight.value_starts[panel];
}

Expand best_expand() {
#ifdef FASTSERVE_X86
    if (has_vbmi2()) return expand_vbmi2;
#endif
    return expand_plain;
}

// Masks of one panel; values are counted, and written where `values` is not null.
int64_t compress_panel(const PackedWeight& dense, int64_t panel, uint32_t* masks, uint16_t* values) {
    const int64_t width = dense.panel_columns(panel), vectors = dense.k_padded / 2 * width / kVectorWords;
    const uint8_t* from = dense.panel(panel);
    int64_t count = 0;
    for (int64_t i = 0; i < vectors; ++i, from += 64) {
        uint16_t lanes[32];
        std::memcpy(lanes, from, 64);
        uint32_t mask = 0;
        for (int lane = 0; lane < 32; ++lane) {
            if (!(lanes[lane] & 0x7fffu)) continue;  // a negative zero is one, too
            mask |= 1u << lane;
            if (values) values[count] = lanes[lane];
            ++count;
        }
        masks[i] = mask;
    }
    return count;
}

// Pseudo-random words, the given share of the halves zero.
void fill(uint8_t* data, int64_t bytes, double zeros) {
    const uint32_t limit = static_cast<uint32_t>(zeros * 65536.0);
    uint64_t state = 88172645463325252ull;
    for (int64_t i = 0; i < bytes; i += 2) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        const uint16_t value = (state & 0xffffu) < limit ? 0 : static_cast<uint16_t>(0x3c00u | (state >> 20 & 0x83ffu));
        std::memcpy(data + i, &value, 2);
    }
}

double seconds_of_vector(const PackedWeight& weight, const OpTable& table, ThreadPool& pool) {
    std::vector<uint16_t> x(static_cast<size_t>(weight.k), 0x3f80u);
    std::vector<float> out(static_cast<size_t>(weight.n));
    const LinearArgs args{&weight, 1, x.data(), DType::bf16, weight.k, out.data(), DType::f32, weight.n, nullptr, 0,
                          Activation::none, false};
    const auto start = std::chrono::steady_clock::now();
    pool.run(linear_scratch(args), [&](const Worker& worker) { table.linear(args, worker); });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double share_of_zeros(const PackedWeight& weight) {
    if (weight.format != Format::bf16) return 0;
    int64_t zeros = 0, count = 0;
    for (int64_t panel = 0; panel < weight.panels; ++panel) {
        const int64_t width = weight.panel_columns(panel);
        for (int64_t row = 0; row < weight.k / 2; row += 16) {
            for (int64_t i = 0; i < 2 * width; ++i, ++count) {
                uint16_t value;
                std::memcpy(&value, weight.panel(panel) + row * width * 4 + 2 * i, 2);
                zeros += !(value & 0x7fffu);
            }
        }
    }
    return count ? static_cast<double>(zeros) / static_cast<double>(count) : 0;
}

void drop_zeros(PackedWeight& weight, ThreadPool& pool) {
    if (weight.format != Format::bf16) return;
    const int64_t mask_bytes = weight.k_padded / 2 * kPanelColumns / kVectorWords * 4;
    Buffer masks(static_cast<size_t>(weight.panels * mask_bytes));
    std::vector<int64_t> starts(static_cast<size_t>(weight.panels + 1));
    auto each_panel = [&](auto&& body) {
        pool.run({}, [&](const Worker& worker) {
            const Range range = share_of(weight.panels, worker.index, worker.count);
            for (int64_t panel = range.begin; panel < range.end; ++panel) body(panel);
        });
    };
    auto masks_of = [&](uint8_t* base, int64_t panel) { return reinterpret_cast<uint32_t*>(base + panel * mask_bytes); };
    each_panel([&](int64_t panel) {
        starts[panel + 1] = compress_panel(weight, panel, masks_of(masks.data(), panel), nullptr);
    });
    for (int64_t panel = 0; panel < weight.panels; ++panel) starts[panel + 1] += starts[panel];
    Buffer data(masks.bytes() + static_cast<size_t>(starts.back()) * 2 + 64);
    uint16_t* values = reinterpret_cast<uint16_t*>(data.data() + masks.bytes());
    each_panel([&](int64_t panel) {
        compress_panel(weight, panel, masks_of(data.data(), panel), values + starts[panel]);
    });
    weight.format = Format::sparse;
    weight.panel_bytes = mask_bytes;
    weight.data = std::move(data);
    weight.base = weight.data.data();
    weight.value_starts = std::move(starts);
}

const uint16_t* expand(const PackedWeight& weight, int64_t panel, int64_t first, int64_t count, const uint16_t* values,
                       uint8_t* words) {
    static const Expand best = best_expand();
    const int64_t vectors = weight.panel_columns(panel) / kVectorWords;
    if (!values) values = values_of(weight, panel);
    const uint32_t* masks = reinterpret_cast<const uint32_t*>(weight.panel(panel)) + first * vectors;
    return best(masks, count * vectors, values, words);
}

bool multiply_vector(const PackedWeight& weight, int64_t panel, const char* x, float* c) {
#ifdef FASTSERVE_X86
    static const bool can = has_vbmi2() && __builtin_cpu_supports("avx512bf16");
    if (!can) return false;
    const uint32_t* masks = reinterpret_cast<const uint32_t*>(weight.panel(panel));
    multiply_vbmi2(masks, weight.k_padded / 2, values_of(weight, panel), x, c);
    return true;
#else
    (void)weight, (void)panel, (void)x, (void)c;
    return false;
#endif
}

double measure_sparse_gain(double zeros, const OpTable& table, ThreadPool& pool) {
    constexpr int64_t kColumns = 12288, kDepth = 2048;  // 48 MB: more than caches hold
    std::vector<uint16_t> values(static_cast<size_t>(kDepth * 64));
    fill(reinterpret_cast<uint8_t*>(values.data()), kDepth * 128, zeros);
    WeightSource source{Format::bf16, kDepth, {}};
    for (int64_t n = 0; n < kColumns; n += 64) source.parts.push_back({64, values.data()});
    const auto dense = pack(source, pool), sparse = pack(source, pool);
    drop_zeros(*sparse, pool);
    double best[2] = {1e9, 1e9};
    for (int round = 0; round < 4; ++round) {
        best[0] = std::min(best[0], seconds_of_vector(*dense, table, pool));
        best[1] = std::min(best[1], seconds_of_vector(*sparse, table, pool));
    }
    return best[0] / best[1];
}

}  // namespace fastserve

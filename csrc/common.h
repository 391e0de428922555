// Small things that every file of the library needs: element types, bfloat16 and float16 conversion, integer helpers.
// Plain C++; no instruction set is assumed, and nothing here is a template from the standard library (see isa/README.md).
#pragma once

#include <cstdint>
#include <cstring>

// Members that kernels call are inlined always: an out-of-line copy would be shared between instruction sets.
#define FASTSERVE_INLINE __attribute__((always_inline)) inline

namespace fastserve {

enum class DType : int { f32 = 0, bf16 = 1, s8 = 2 };  // s8: caches only, with scales
enum class Activation : int { none = 0, silu = 1, gelu = 2, gelu_tanh = 3, relu = 4 };

constexpr int kPanelColumns = 64;   // columns of one packed panel
constexpr int kColumnMultiple = 16; // a last, narrower panel has a multiple of this many columns
constexpr int kDepthMultiple = 64;  // K is padded to this: one tile row of int8, two of bfloat16

// Whether memory that is read once is best fetched by prefetches that leave no trace in the second- and third-level caches,
// so that what is read again (keys, values, code) stays there. Known of AMD's processors (decision 12); elsewhere unmeasured.
extern const bool kFetchPastCaches;

static inline int64_t element_bytes(DType type) { return type == DType::f32 ? 4 : type == DType::bf16 ? 2 : 1; }

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

static inline float bf16_to_f32(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// Round to nearest even; a NaN stays a NaN.
static inline uint16_t f32_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float f16_to_f32(uint16_t bits) {
    uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    uint32_t exponent = (bits >> 10) & 31u;
    uint32_t mantissa = bits & 1023u;
    uint32_t wide;
    if (exponent == 31u) {
        wide = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent) {
        wide = sign | ((exponent + 112u) << 23) | (mantissa << 13);
    } else {
        float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
        std::memcpy(&wide, &value, 4);
        wide |= sign;
    }
    float result;
    std::memcpy(&result, &wide, 4);
    return result;
}

// The part of `count` things that thread `index` of `threads` takes: contiguous, the same in every run.
struct Range {
    int64_t begin, end;
};
static inline Range share_of(int64_t count, int index, int threads) {
    return {count * index / threads, count * (index + 1) / threads};
}

}  // namespace fastserve

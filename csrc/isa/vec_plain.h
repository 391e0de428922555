// 4 lanes in the compiler's own vector types: runs on any processor (SSE2, NEON, or scalar code).
#pragma once

#include "../common.h"

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

constexpr int W = 4;
constexpr bool kHasBf16Dot = false;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));

static inline F f_set(float v) { return F{v, v, v, v}; }
static inline F f_zero() { return f_set(0.0f); }
static inline F f_load(const float* p) {
    F v;
    std::memcpy(&v, p, 16);
    return v;
}
static inline void f_store(float* p, F v) { std::memcpy(p, &v, 16); }
static inline I i_set(int v) { return I{v, v, v, v}; }
static inline I i_zero() { return i_set(0); }
static inline I i_load(const void* p) {
    I v;
    std::memcpy(&v, p, 16);
    return v;
}
static inline void i_store(void* p, I v) { std::memcpy(p, &v, 16); }
static inline F f_bits(I v) { return (F)v; }
static inline I i_bits(F v) { return (I)v; }
static inline I i_add(I a, I b) { return (I)((U)a + (U)b); }
static inline I i_sub(I a, I b) { return (I)((U)a - (U)b); }
static inline I i_mul(I a, I b) { return (I)((U)a * (U)b); }
static inline I i_max(I a, I b) { return a > b ? a : b; }
static inline I i_and(I a, I b) { return a & b; }
static inline I i_or(I a, I b) { return a | b; }
static inline I i_xor(I a, I b) { return a ^ b; }
template <int N> static inline I i_shl(I a) { return (I)((U)a << N); }
template <int N> static inline I i_shr(I a) { return (I)((U)a >> N); }
template <int N> static inline I i_sra(I a) { return a >> N; }
static inline I i_from_u8(const uint8_t* p) { return I{p[0], p[1], p[2], p[3]}; }

static inline F f_add(F a, F b) { return a + b; }
static inline F f_sub(F a, F b) { return a - b; }
static inline F f_mul(F a, F b) { return a * b; }
static inline F f_div(F a, F b) { return a / b; }
static inline F f_max(F a, F b) { return a > b ? a : b; }
static inline F f_min(F a, F b) { return a < b ? a : b; }
static inline F f_fma(F a, F b, F c) { return a * b + c; }
static inline F f_abs(F a) { return f_bits(i_and(i_bits(a), i_set(0x7fffffff))); }
static inline F f_convert(I v) { return __builtin_convertvector(v, F); }
// Nearest even, for |v| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits.
static inline I i_round(F v) { return i_sub(i_bits(v + f_set(12582912.0f)), i_set(0x4b400000)); }

static inline F f_load_bf16(const uint16_t* p) { return f_bits(i_shl<16>(I{p[0], p[1], p[2], p[3]})); }
static inline F f_load_f16(const uint16_t* p) {
    return F{f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
}
static inline void f_store_bf16(uint16_t* p, F v) {
    for (int i = 0; i < W; ++i) p[i] = f32_to_bf16(v[i]);
}
static inline void i_store_s8(int8_t* p, I v) {
    for (int i = 0; i < W; ++i) p[i] = static_cast<int8_t>(v[i]);
}
// v * 2^n, in two factors, so that n = 128 does not overflow the exponent field.
static inline F f_scale(F v, I n, F) {
    I half = i_sra<1>(n);
    F low = f_bits(i_shl<23>(i_add(half, i_set(127))));
    F high = f_bits(i_shl<23>(i_add(i_sub(n, half), i_set(127))));
    return f_mul(f_mul(v, low), high);
}
static inline F f_where_positive(F x, F yes, F no) { return x > 0.0f ? yes : no; }
// 0 where v <= limit, else p.
static inline F f_zero_below(F v, F limit, F p) { return f_bits(i_and(~(I)(v <= limit), i_bits(p))); }
static inline float f_sum(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }
static inline int32_t i_sum(I v) { return v[0] + v[1] + v[2] + v[3]; }
static inline float f_largest(F v) {
    float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}

// acc + the four products of unsigned bytes w with signed bytes a, per word.
static inline I i_dot(I acc, I w, I a) {
    const I byte = i_set(0xff);
    acc = i_add(acc, i_mul(i_and(w, byte), i_sra<24>(i_shl<24>(a))));
    acc = i_add(acc, i_mul(i_and(i_shr<8>(w), byte), i_sra<24>(i_shl<16>(a))));
    acc = i_add(acc, i_mul(i_and(i_shr<16>(w), byte), i_sra<24>(i_shl<8>(a))));
    return i_add(acc, i_mul(i_shr<24>(w), i_sra<24>(a)));
}

constexpr bool kHasTranspose = false;
static inline void transpose_words(const char* const*, int64_t, uint32_t*, int64_t) {}

// Sixteen floats, looked up by the low four bits of each word.
struct Table {
    float values[16];
    explicit Table(const float* v) { std::memcpy(values, v, sizeof(values)); }
    F look_up(I index) const {
        return F{values[index[0] & 15], values[index[1] & 15], values[index[2] & 15], values[index[3] & 15]};
    }
};

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

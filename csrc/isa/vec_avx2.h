// 8 lanes: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include "../common.h"

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

constexpr int W = 8;
constexpr bool kHasBf16Dot = false;
using F = __m256;
using I = __m256i;

static inline F f_zero() { return _mm256_setzero_ps(); }
static inline F f_set(float v) { return _mm256_set1_ps(v); }
static inline F f_load(const float* p) { return _mm256_loadu_ps(p); }
static inline void f_store(float* p, F v) { _mm256_storeu_ps(p, v); }
static inline F f_add(F a, F b) { return _mm256_add_ps(a, b); }
static inline F f_sub(F a, F b) { return _mm256_sub_ps(a, b); }
static inline F f_mul(F a, F b) { return _mm256_mul_ps(a, b); }
static inline F f_div(F a, F b) { return _mm256_div_ps(a, b); }
static inline F f_max(F a, F b) { return _mm256_max_ps(a, b); }
static inline F f_min(F a, F b) { return _mm256_min_ps(a, b); }
static inline F f_fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
static inline F f_abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }

static inline I i_zero() { return _mm256_setzero_si256(); }
static inline I i_set(int v) { return _mm256_set1_epi32(v); }
static inline I i_load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline void i_store(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
static inline I i_add(I a, I b) { return _mm256_add_epi32(a, b); }
static inline I i_sub(I a, I b) { return _mm256_sub_epi32(a, b); }
static inline I i_mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
static inline I i_max(I a, I b) { return _mm256_max_epi32(a, b); }
static inline I i_and(I a, I b) { return _mm256_and_si256(a, b); }
static inline I i_or(I a, I b) { return _mm256_or_si256(a, b); }
static inline I i_xor(I a, I b) { return _mm256_xor_si256(a, b); }
template <int N> static inline I i_shl(I a) { return _mm256_slli_epi32(a, N); }
template <int N> static inline I i_shr(I a) { return _mm256_srli_epi32(a, N); }
template <int N> static inline I i_sra(I a) { return _mm256_srai_epi32(a, N); }
static inline I i_from_u8(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

static inline F f_convert(I v) { return _mm256_cvtepi32_ps(v); }
static inline I i_round(F v) { return _mm256_cvtps_epi32(v); }
static inline F f_bits(I v) { return _mm256_castsi256_ps(v); }
static inline I i_bits(F v) { return _mm256_castps_si256(v); }

static inline F f_load_bf16(const uint16_t* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return f_bits(_mm256_slli_epi32(wide, 16));
}
static inline F f_load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void f_store_bf16(uint16_t* p, F v) {
    __m256i bits = i_bits(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = i_bits(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}
static inline void i_store_s8(int8_t* p, I v) {
    __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
}
// v * 2^n, in two factors, so that n = 128 does not overflow the exponent field.
static inline F f_scale(F v, I n, F) {
    I half = i_sra<1>(n);
    F low = f_bits(i_shl<23>(i_add(half, i_set(127))));
    F high = f_bits(i_shl<23>(i_add(i_sub(n, half), i_set(127))));
    return f_mul(f_mul(v, low), high);
}
static inline F f_where_positive(F x, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, f_zero(), _CMP_GT_OQ));
}
// 0 where v <= limit, else p.
static inline F f_zero_below(F v, F limit, F p) { return _mm256_and_ps(_mm256_cmp_ps(v, limit, _CMP_NLE_UQ), p); }
static inline float f_sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline int32_t i_sum(I v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
static inline float f_largest(F v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// acc + the four products of unsigned bytes w with signed bytes a, per word. 16-bit products: nothing saturates.
static inline I i_dot(I acc, I w, I a) {
    __m256i w_even = _mm256_and_si256(w, _mm256_set1_epi16(0xff)), w_odd = _mm256_srli_epi16(w, 8);
    __m256i a_even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), a_odd = _mm256_srai_epi16(a, 8);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(w_even, a_even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w_odd, a_odd));
}

constexpr bool kHasTranspose = false;
static inline void transpose_words(const char* const*, int64_t, uint32_t*, int64_t) {}

// Sixteen floats, looked up by the low four bits of each word.
struct Table {
    __m256 low, high;
    explicit Table(const float* v) : low(_mm256_loadu_ps(v)), high(_mm256_loadu_ps(v + 8)) {}
    F look_up(I index) const {
        __m256 from_low = _mm256_permutevar8x32_ps(low, index), from_high = _mm256_permutevar8x32_ps(high, index);
        return _mm256_blendv_ps(from_low, from_high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }
};

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

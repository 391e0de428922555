// 16 lanes: AVX-512 F, BW, VL, DQ; with VNNI and BF16 when the flags allow.
#pragma once

#include <immintrin.h>

#include "../common.h"

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

constexpr int W = 16;
using F = __m512;
using I = __m512i;

#if defined(__AVX512BF16__)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

static inline F f_zero() { return _mm512_setzero_ps(); }
static inline F f_set(float v) { return _mm512_set1_ps(v); }
static inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
static inline void f_store(float* p, F v) { _mm512_storeu_ps(p, v); }
static inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F f_div(F a, F b) { return _mm512_div_ps(a, b); }
static inline F f_max(F a, F b) { return _mm512_max_ps(a, b); }
static inline F f_min(F a, F b) { return _mm512_min_ps(a, b); }
static inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static inline F f_abs(F a) { return _mm512_abs_ps(a); }

static inline I i_zero() { return _mm512_setzero_si512(); }
static inline I i_set(int v) { return _mm512_set1_epi32(v); }
static inline I i_load(const void* p) { return _mm512_loadu_si512(p); }
static inline void i_store(void* p, I v) { _mm512_storeu_si512(p, v); }
static inline I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
static inline I i_sub(I a, I b) { return _mm512_sub_epi32(a, b); }
static inline I i_mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
static inline I i_max(I a, I b) { return _mm512_max_epi32(a, b); }
static inline I i_and(I a, I b) { return _mm512_and_si512(a, b); }
static inline I i_or(I a, I b) { return _mm512_or_si512(a, b); }
static inline I i_xor(I a, I b) { return _mm512_xor_si512(a, b); }
template <int N> static inline I i_shl(I a) { return _mm512_slli_epi32(a, N); }
template <int N> static inline I i_shr(I a) { return _mm512_srli_epi32(a, N); }
template <int N> static inline I i_sra(I a) { return _mm512_srai_epi32(a, N); }
static inline I i_from_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

static inline F f_convert(I v) { return _mm512_cvtepi32_ps(v); }
static inline I i_round(F v) { return _mm512_cvtps_epi32(v); }
static inline F f_bits(I v) { return _mm512_castsi512_ps(v); }
static inline I i_bits(F v) { return _mm512_castps_si512(v); }

static inline F f_load_bf16(const uint16_t* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return f_bits(_mm512_slli_epi32(wide, 16));
}
static inline F f_load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void f_store_bf16(uint16_t* p, F v) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
#else
    __m512i bits = i_bits(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
#endif
}
static inline void i_store_s8(int8_t* p, I v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v));
}
// v * 2^n; n as integers and as floats.
static inline F f_scale(F v, I, F n) { return _mm512_scalef_ps(v, n); }
static inline F f_where_positive(F x, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, f_zero(), _CMP_GT_OQ), no, yes);
}
// 0 where v <= limit, else p.
static inline F f_zero_below(F v, F limit, F p) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, limit, _CMP_NLE_UQ), p);
}
static inline float f_sum(F v) { return _mm512_reduce_add_ps(v); }
static inline int32_t i_sum(I v) { return _mm512_reduce_add_epi32(v); }
static inline float f_largest(F v) { return _mm512_reduce_max_ps(v); }

// acc + the four products of unsigned bytes w with signed bytes a, per word.
static inline I i_dot(I acc, I w, I a) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(acc, w, a);
#else
    const __m512i bytes = _mm512_set1_epi16(0xff);
    __m512i w_even = _mm512_and_si512(w, bytes), w_odd = _mm512_srli_epi16(w, 8);
    __m512i a_even = _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8), a_odd = _mm512_srai_epi16(a, 8);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(w_even, a_even));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(w_odd, a_odd));
#endif
}

// Sixteen floats, looked up by the low four bits of each word.
struct Table {
    __m512 values;
    explicit Table(const float* v) : values(_mm512_loadu_ps(v)) {}
    F look_up(I index) const { return _mm512_permutexvar_ps(index, values); }
};

constexpr bool kHasTranspose = true;

// Words [word, word + 16) of 16 rows -> out [16 words, 16 rows], `stride` words apart.
static inline void transpose_words(const char* const* rows, int64_t word, uint32_t* out, int64_t stride) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + 4 * word);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        _mm512_storeu_si512(out + j * stride, _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88));
        _mm512_storeu_si512(out + (8 + j) * stride, _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd));
        _mm512_storeu_si512(out + (4 + j) * stride, _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88));
        _mm512_storeu_si512(out + (12 + j) * stride, _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd));
    }
}

#if defined(__AVX512BF16__)
// acc + the two products of bfloat16 per word.
static inline F f_dot(F acc, I w, I a) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)a); }

// Half-words of a and b side by side, a's low: a0 b0 a1 b1 ... in `low`, from the middle on in `high`.
static inline void interleave_halves(I a, I b, I& low, I& high) {
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                           5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    low = _mm512_permutex2var_epi16(a, order, b);
    high = _mm512_permutex2var_epi16(a, _mm512_add_epi16(order, _mm512_set1_epi16(16)), b);
}

// Sixteen bfloat16, looked up by the low four bits of each half-word; the fifth bit, which the instruction also takes,
// does not matter since the table is held twice.
struct PairTable {
    __m512i values;
    explicit PairTable(const float* v) {
        uint16_t bits[32];
        for (int i = 0; i < 32; ++i) bits[i] = f32_to_bf16(v[i & 15]);
        values = _mm512_loadu_si512(bits);
    }
    I look_up(I index) const { return _mm512_permutexvar_epi16(index, values); }
};
#endif

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

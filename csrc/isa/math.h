// Exponential, normal distribution and the activations built on them, over this instruction set's lanes.
#pragma once

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

// e^x to about 2 units in the last place; about 1.2e-38 below -87.3, about 2.4e38 above 88.4. NaN in, NaN out.
static inline F f_exp(F x) {
    F clamped = f_max(f_set(-87.33654f), f_min(f_set(88.37626f), x));  // min and max return the second of a NaN pair
    I n = i_round(f_mul(clamped, f_set(1.44269504f)));
    F nf = f_convert(n);
    F r = f_fma(nf, f_set(-0.693359375f), clamped);
    r = f_fma(nf, f_set(2.12194440e-4f), r);
    F p = f_set(1.9875691500e-4f);
    p = f_fma(p, r, f_set(1.3981999507e-3f));
    p = f_fma(p, r, f_set(8.3334519073e-3f));
    p = f_fma(p, r, f_set(4.1665795894e-2f));
    p = f_fma(p, r, f_set(1.6666665459e-1f));
    p = f_fma(p, r, f_set(5.0000001201e-1f));
    p = f_fma(p, f_mul(r, r), f_add(r, f_set(1.0f)));
    return f_scale(p, n, nf);
}

// 2^x for x <= 0 to about 4 units in the last place; exactly 0 from -127 on, however far. NaN in, NaN out.
static inline F f_exp2_below(F x) {
#if defined(__AVX512F__)
    F n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    F r = f_sub(x, n);
    F p = f_set(1.34004e-3f);
    p = f_fma(p, r, f_set(9.67604e-3f));
    p = f_fma(p, r, f_set(5.550327e-2f));
    p = f_fma(p, r, f_set(2.4022107e-1f));
    p = f_fma(p, r, f_set(6.9314721e-1f));
    p = f_fma(p, r, f_set(1.0000001f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, f_set(-127.0f), _CMP_NLE_UQ), p, n);
#else
    return f_zero_below(x, f_set(-127.0f), f_exp(f_mul(f_max(f_set(-126.0f), x), f_set(0.69314718f))));
#endif
}

static inline F f_sigmoid(F x) { return f_div(f_set(1.0f), f_add(f_set(1.0f), f_exp(f_sub(f_zero(), x)))); }

static inline F f_tanh(F x) {
    F e = f_exp(f_add(x, x));
    return f_sub(f_set(1.0f), f_div(f_set(2.0f), f_add(e, f_set(1.0f))));
}

// The normal distribution's integral, by Abramowitz and Stegun 7.1.26: absolute error below 1e-7, and no cancellation
// where it is small.
static inline F f_normal(F x) {
    F magnitude = f_mul(f_abs(x), f_set(0.70710678f));
    F t = f_div(f_set(1.0f), f_fma(f_set(0.3275911f), magnitude, f_set(1.0f)));
    F p = f_set(1.061405429f);
    p = f_fma(p, t, f_set(-1.453152027f));
    p = f_fma(p, t, f_set(1.421413741f));
    p = f_fma(p, t, f_set(-0.284496736f));
    p = f_mul(f_fma(p, t, f_set(0.254829592f)), f_mul(t, f_set(0.5f)));
    F outer = f_mul(p, f_exp(f_sub(f_zero(), f_mul(magnitude, magnitude))));
    return f_where_positive(x, f_sub(f_set(1.0f), outer), outer);
}

static inline F activate(F x, Activation activation) {
    switch (activation) {
        case Activation::silu: return f_mul(x, f_sigmoid(x));
        case Activation::gelu: return f_mul(x, f_normal(x));
        case Activation::gelu_tanh: {
            F cube = f_mul(f_mul(x, x), x);
            F inner = f_mul(f_set(2.0f * 0.79788456f), f_fma(f_set(0.044715f), cube, x));
            return f_mul(x, f_sigmoid(inner));  // (1 + tanh(z)) / 2 = sigmoid(2 z)
        }
        case Activation::relu: return f_max(f_zero(), x);  // the second of a NaN pair
        default: return x;
    }
}

// The larger of `largest` and the magnitude of v. As integers, so that a NaN is larger than all and stays.
static FASTSERVE_INLINE I larger_magnitude(I largest, F v) { return i_max(largest, i_bits(f_abs(v))); }
// The largest lane of magnitudes; NaN if one of them is a NaN or infinite.
static inline float top_magnitude(I magnitudes) {
    const F values = f_bits(magnitudes);
    return f_largest(values) + f_sum(f_mul(values, f_zero()));
}

static FASTSERVE_INLINE F load_as_float(const void* p, DType type, int64_t at) {
    if (type == DType::f32) return f_load(static_cast<const float*>(p) + at);
    return f_load_bf16(static_cast<const uint16_t*>(p) + at);
}
static FASTSERVE_INLINE void store_as(void* p, DType type, int64_t at, F v) {
    if (type == DType::f32) f_store(static_cast<float*>(p) + at, v);
    else f_store_bf16(static_cast<uint16_t*>(p) + at, v);
}
// The first `count` < W lanes only; the others are 0.
static __attribute__((noinline)) F load_some(const void* p, DType type, int64_t at, int64_t count) {
    alignas(64) float lanes[W] = {};
    for (int64_t i = 0; i < count; ++i) {
        lanes[i] = type == DType::f32 ? static_cast<const float*>(p)[at + i]
                                      : bf16_to_f32(static_cast<const uint16_t*>(p)[at + i]);
    }
    return f_load(lanes);
}
static __attribute__((noinline)) void store_some(void* p, DType type, int64_t at, int64_t count, F v) {
    alignas(64) float lanes[W];
    f_store(lanes, v);
    for (int64_t i = 0; i < count; ++i) {
        if (type == DType::f32) static_cast<float*>(p)[at + i] = lanes[i];
        else static_cast<uint16_t*>(p)[at + i] = f32_to_bf16(lanes[i]);
    }
}
static FASTSERVE_INLINE F load_lanes(const void* p, DType type, int64_t at, int64_t left) {
    return left >= W ? load_as_float(p, type, at) : load_some(p, type, at, left);
}
static FASTSERVE_INLINE void store_lanes(void* p, DType type, int64_t at, int64_t left, F v) {
    if (left >= W) store_as(p, type, at, v);
    else store_some(p, type, at, left, v);
}

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

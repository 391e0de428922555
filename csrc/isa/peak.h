// The fastest this instruction set multiplies and adds, with every operand in registers.
#pragma once

#include <time.h>

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

// Of this thread, so that a busy machine lowers the rate as little as it does for the kernels measured the same way.
static inline double thread_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Reads `bytes` (a multiple of 1024) from front to back, as a product of one row does, and nothing else.
static uint32_t read_memory(const uint8_t* data, int64_t bytes, bool past_caches) {
    constexpr int kStep = 256 / (4 * W);
    I sums[kStep];
    for (int i = 0; i < kStep; ++i) sums[i] = i_zero();
    for (int64_t at = 0; at < bytes; at += 256) {
#pragma GCC unroll 16
        for (int i = 0; i < kStep; ++i) sums[i] = i_xor(sums[i], i_load(data + at + i * 4 * W));
        past_caches ? fetch_once<Fetch::past_caches>(data + at) : fetch_once<Fetch::into_caches>(data + at);
    }
    for (int i = 1; i < kStep; ++i) sums[0] = i_xor(sums[0], sums[i]);
    return static_cast<uint32_t>(i_sum(sums[0]));
}

template <class Acc, class Step>
static double rate_of(Acc zero, const Step& step, double operations, double seconds) {
    constexpr int kChains = W == 16 ? 24 : 12;
    Acc acc[kChains];
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = zero;
    const double start = thread_seconds();
    double steps = 0, spent = 0;
    while (spent < seconds) {
        for (int repeat = 0; repeat < 2000; ++repeat) {
#pragma GCC unroll 24
            for (int i = 0; i < kChains; ++i) acc[i] = step(acc[i]);
            // Opaque to the optimiser, and no instruction: the chains must really advance.
#pragma GCC unroll 24
            for (int i = 0; i < kChains; ++i) FASTSERVE_OPAQUE(acc[i]);
        }
        steps += 2000.0 * kChains;
        spent = thread_seconds() - start;
    }
    return steps * operations / spent;
}

#ifdef FASTSERVE_TILES
template <class D>
static double tile_rate(double seconds) {
    TileShape shape;
    configure_tiles(shape, 32, 16);
    alignas(64) static const uint8_t zeros[1024] = {};
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    tile_load<4>(zeros, 64), tile_load<5>(zeros, 64), tile_load<6>(zeros, 64), tile_load<7>(zeros, 64);
    const double start = thread_seconds();
    double steps = 0, spent = 0;
    while (spent < seconds) {
        for (int repeat = 0; repeat < 500; ++repeat) {
            tile_multiply<D, 0, 4, 6>(), tile_multiply<D, 1, 4, 7>();
            tile_multiply<D, 2, 5, 6>(), tile_multiply<D, 3, 5, 7>();
        }
        steps += 2000.0;
        spent = thread_seconds() - start;
    }
    tile_release();
    return steps * 2.0 * 16 * 16 * (D::kInteger ? 64 : 32) / spent;
}
#endif

static double peak_rate(int kind, double seconds) {
#ifdef FASTSERVE_TILES
    if (kind == 1) return tile_rate<PairBf16>(seconds);
    if (kind == 2) return tile_rate<ByteU8>(seconds);
#endif
    if (kind == 0) {
        F a = f_set(0.5f), b = f_set(1.0f);
        FASTSERVE_OPAQUE(a);
        FASTSERVE_OPAQUE(b);
        return rate_of(f_zero(), [&](F acc) { return f_fma(a, b, acc); }, 2.0 * W, seconds);
    }
    I a = i_set(0x01010101), b = i_set(0x01010101);
    FASTSERVE_OPAQUE(a);
    FASTSERVE_OPAQUE(b);
#if defined(__AVX512BF16__)
    if (kind == 1) return rate_of(f_zero(), [&](F acc) { return f_dot(acc, a, b); }, 4.0 * W, seconds);
#endif
    if (kind == 2) return rate_of(i_zero(), [&](I acc) { return i_dot(acc, a, b); }, 8.0 * W, seconds);
    return 0.0;
}

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

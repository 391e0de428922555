// The tile unit (AMX) behind seven functions, or the same in plain C++.
//
// With FASTSERVE_TILES_EMULATED the tiles are arrays and every access is checked against the configuration, so that
// indices, packing and tails are tested on machines without the unit. The emulation sums in the order of the
// instruction's definition; the unit's own results may differ from it in the last bit, never in what is multiplied.
#pragma once

#include "../common.h"

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

// The 64 bytes that the configuration instruction reads.
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int64_t num_rows, int64_t bytes) {
        rows[tile] = static_cast<uint8_t>(num_rows);
        row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};

#ifndef FASTSERVE_TILES_EMULATED

// Not the intrinsics: gcc 12's put the register's name together from the text of the argument, which a template's is not,
// and its _tile_loadconfig tells the compiler that 8 of the 64 bytes are read, which drops the stores of the others.
static inline void tile_configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
}
static inline void tile_release() { asm volatile("tilerelease" : : : "memory"); }
template <int T> static inline void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T> static inline void tile_load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T> static inline void tile_store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
// C += A B: bfloat16 pairs; signed bytes A times unsigned bytes B.
template <int C, int A, int B> static inline void tile_multiply_pairs() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B> static inline void tile_multiply_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#else

struct Tile {
    int rows = 0, bytes = 0;
    uint8_t data[16][64];
};
static thread_local Tile tiles[8];
static thread_local bool tiles_configured = false;

static inline void tile_require(bool holds) {
    if (!holds) __builtin_trap();
}
static inline void tile_configure(const TileConfig& config) {
    tile_require(config.palette == 1);
    for (int t = 0; t < 8; ++t) {
        tile_require(config.rows[t] <= 16 && config.row_bytes[t] <= 64);
        tiles[t].rows = config.rows[t];
        tiles[t].bytes = config.row_bytes[t];
        std::memset(tiles[t].data, 0, sizeof(tiles[t].data));
    }
    tiles_configured = true;
}
static inline void tile_release() { tiles_configured = false; }
template <int T> static inline void tile_zero() {
    tile_require(tiles_configured && tiles[T].rows && tiles[T].bytes);
    std::memset(tiles[T].data, 0, sizeof(tiles[T].data));
}
template <int T> static inline void tile_load(const void* p, int64_t stride) {
    tile_zero<T>();
    for (int r = 0; r < tiles[T].rows; ++r) {
        std::memcpy(tiles[T].data[r], static_cast<const uint8_t*>(p) + r * stride, tiles[T].bytes);
    }
}
template <int T> static inline void tile_store(void* p, int64_t stride) {
    tile_require(tiles_configured);
    for (int r = 0; r < tiles[T].rows; ++r) {
        std::memcpy(static_cast<uint8_t*>(p) + r * stride, tiles[T].data[r], tiles[T].bytes);
    }
}
template <int C, int A, int B> static inline void tile_check() {
    tile_require(tiles_configured && tiles[C].rows == tiles[A].rows && tiles[C].bytes == tiles[B].bytes);
    tile_require(tiles[A].bytes == 4 * tiles[B].rows);
}
template <int C, int A, int B> static inline void tile_multiply_pairs() {
    tile_check<C, A, B>();
    for (int m = 0; m < tiles[C].rows; ++m) {
        for (int n = 0; n < tiles[C].bytes / 4; ++n) {
            float even = 0.0f, odd = 0.0f, c;
            for (int k = 0; k < tiles[B].rows; ++k) {
                uint16_t a[2], b[2];
                std::memcpy(a, tiles[A].data[m] + 4 * k, 4);
                std::memcpy(b, tiles[B].data[k] + 4 * n, 4);
                even += bf16_to_f32(a[0]) * bf16_to_f32(b[0]);
                odd += bf16_to_f32(a[1]) * bf16_to_f32(b[1]);
            }
            std::memcpy(&c, tiles[C].data[m] + 4 * n, 4);
            c += even + odd;
            std::memcpy(tiles[C].data[m] + 4 * n, &c, 4);
        }
    }
}
template <int C, int A, int B> static inline void tile_multiply_bytes() {
    tile_check<C, A, B>();
    for (int m = 0; m < tiles[C].rows; ++m) {
        for (int n = 0; n < tiles[C].bytes / 4; ++n) {
            int32_t c;
            std::memcpy(&c, tiles[C].data[m] + 4 * n, 4);
            for (int k = 0; k < tiles[B].rows; ++k) {
                for (int i = 0; i < 4; ++i) {
                    c += static_cast<int8_t>(tiles[A].data[m][4 * k + i]) * static_cast<int>(tiles[B].data[k][4 * n + i]);
                }
            }
            std::memcpy(tiles[C].data[m] + 4 * n, &c, 4);
        }
    }
}

#endif

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

// Matrix products on the tile unit: up to 32 rows x 64 columns per call, the same Blocks as linear.h.
//
// Every row count takes this path, so that a row's sum has one order: within a tile step the unit's, over the steps from
// front to back. Tiles 0-3 are sums, 4-5 activations, 6-7 weights. Words must be native (two bfloat16 or four bytes).
#pragma once

#include "tiles.h"

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 16;

static void configure_tiles(TileShape& shape, int64_t rows, int64_t words) {
    if (shape.rows == rows && shape.words == words) return;
    shape = {rows, words};
    const int64_t upper = min_of(rows, kTileRows), lower = rows > kTileRows ? rows - kTileRows : upper;
    TileConfig config;
    for (int tile = 0; tile < 4; ++tile) config.set(tile, tile < 2 ? upper : lower, kTileColumns * 4);
    config.set(4, upper, words * 4);
    config.set(5, lower, words * 4);
    for (int tile = 6; tile < 8; ++tile) config.set(tile, words, kTileColumns * 4);
    tile_configure(config);
}

template <class D, int C, int A, int B>
static inline void tile_multiply() {
    if constexpr (D::kInteger) tile_multiply_bytes<C, A, B>();
    else tile_multiply_pairs<C, A, B>();
}

// One run of K for up to 16 rows x 64 columns (Wide) or 16 columns, or 17..32 rows x 32 or 16 columns.
struct TileRun {
    const uint8_t* words;
    int64_t word_stride, steps, words_per_step;
    const char* a;
    int64_t a_stride;
    float* c;
    bool load;
    const uint8_t *ahead, *ahead_end;  // to be fetched meanwhile
    int64_t ahead_lines_at_once;       // per step

    FASTSERVE_INLINE void fetch() {
        for (int64_t i = 0; i < ahead_lines_at_once && ahead < ahead_end; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    }
};

template <int T>
static inline void start_tile(const TileRun& run, int64_t row, int64_t column) {
    if (run.load) tile_load<T>(run.c + row * kPanelColumns + column, kPanelColumns * 4);
    else tile_zero<T>();
}
template <int T>
static inline void end_tile(const TileRun& run, int64_t row, int64_t column) {
    tile_store<T>(run.c + row * kPanelColumns + column, kPanelColumns * 4);
}

template <class D>
static void tiles_1x4(TileRun& run) {
    start_tile<0>(run, 0, 0);
    start_tile<1>(run, 0, 16);
    start_tile<2>(run, 0, 32);
    start_tile<3>(run, 0, 48);
    const uint8_t* words = run.words;
    const int64_t step_bytes = run.words_per_step * run.word_stride;
    for (int64_t s = 0; s < run.steps; ++s, words += step_bytes) {
        run.fetch();
        tile_load<4>(run.a + s * run.words_per_step * 4, run.a_stride);
        tile_load<6>(words, run.word_stride);
        tile_multiply<D, 0, 4, 6>();
        tile_load<7>(words + 64, run.word_stride);
        tile_multiply<D, 1, 4, 7>();
        tile_load<6>(words + 128, run.word_stride);
        tile_multiply<D, 2, 4, 6>();
        tile_load<7>(words + 192, run.word_stride);
        tile_multiply<D, 3, 4, 7>();
    }
    end_tile<0>(run, 0, 0);
    end_tile<1>(run, 0, 16);
    end_tile<2>(run, 0, 32);
    end_tile<3>(run, 0, 48);
}

template <class D>
static void tiles_2x2(TileRun& run) {
    start_tile<0>(run, 0, 0);
    start_tile<1>(run, 0, 16);
    start_tile<2>(run, 16, 0);
    start_tile<3>(run, 16, 16);
    const uint8_t* words = run.words;
    for (int64_t s = 0; s < run.steps; ++s, words += run.words_per_step * run.word_stride) {
        run.fetch();
        const char* a = run.a + s * run.words_per_step * 4;
        tile_load<6>(words, run.word_stride);
        tile_load<4>(a, run.a_stride);
        tile_multiply<D, 0, 4, 6>();
        tile_load<7>(words + 64, run.word_stride);
        tile_multiply<D, 1, 4, 7>();
        tile_load<5>(a + kTileRows * run.a_stride, run.a_stride);
        tile_multiply<D, 2, 5, 6>();
        tile_multiply<D, 3, 5, 7>();
    }
    end_tile<0>(run, 0, 0);
    end_tile<1>(run, 0, 16);
    end_tile<2>(run, 16, 0);
    end_tile<3>(run, 16, 16);
}

// 16 columns: the narrow last panel.
template <class D, bool TwoRows>
static void tiles_nx1(TileRun& run) {
    start_tile<0>(run, 0, 0);
    if constexpr (TwoRows) start_tile<2>(run, 16, 0);
    const uint8_t* words = run.words;
    for (int64_t s = 0; s < run.steps; ++s, words += run.words_per_step * run.word_stride) {
        run.fetch();
        const char* a = run.a + s * run.words_per_step * 4;
        tile_load<6>(words, run.word_stride);
        tile_load<4>(a, run.a_stride);
        tile_multiply<D, 0, 4, 6>();
        if constexpr (TwoRows) {
            tile_load<5>(a + kTileRows * run.a_stride, run.a_stride);
            tile_multiply<D, 2, 5, 6>();
        }
    }
    end_tile<0>(run, 0, 0);
    if constexpr (TwoRows) end_tile<2>(run, 16, 0);
}

template <class D>
static void run_tiles(TileRun& run, int64_t rows, int64_t columns) {
    const uint8_t* words = run.words;
    float* c = run.c;
    const bool two_rows = rows > kTileRows;
    const int64_t step = columns < kPanelColumns ? 16 : two_rows ? 32 : 64;
    for (int64_t column = 0; column < columns; column += step) {
        run.words = words + column * 4;
        run.c = c + column;
        if (step == 64) tiles_1x4<D>(run);
        else if (step == 32) tiles_2x2<D>(run);
        else if (two_rows) tiles_nx1<D, true>(run);
        else tiles_nx1<D, false>(run);
    }
}

// Sums of one group [rows, 64] -> totals, as finish_group in linear.h.
template <class D>
static void finish_tiles(const Block& b, const float* raw, const uint8_t* header, int64_t group, bool add) {
    for (int64_t column = 0; column < b.columns; column += W) {
        const int lane = static_cast<int>(column);
        const F scale = load_scale(*b.weight, header, lane);
        for (int64_t r = 0; r < b.rows; ++r) {
            const char* sum = b.sums + r * b.sums_stride + 4 * group;
            auto acc = D::load(raw + r * kPanelColumns + column);
            F value;
            if (b.weight->has_zeros) {
                value = centre_group<D, true>(b, acc, header, lane, sum);
            } else {
                if constexpr (D::kInteger) acc = i_add(acc, start_of<D, true>(b, sum));
                value = centre_group<D, false>(b, acc, header, lane, sum);
            }
            float* c = b.c + r * kPanelColumns + column;
            f_store(c, add ? f_fma(scale, value, f_load(c)) : f_mul(scale, value));
        }
    }
}

template <class D, bool Scaled>
static void tile_kernel(const Block& b) {
    alignas(64) float group_sums[2 * kTileRows * kPanelColumns];
    const bool grouped = Scaled && b.weight->groups > 1;
    const uint8_t* words = b.words;
    const char* a = b.a;
    TileRun run{};
    run.ahead = b.ahead, run.ahead_end = b.ahead + 64 * b.ahead_lines;
    for (int64_t g = 0; g < b.groups; ++g) {
        const int64_t count = g == b.groups - 1 ? b.last_words : b.words_per_group;
        const int64_t per_step = min_of(count, 16);
        configure_tiles(*b.tiles, b.rows, per_step);
        float* raw = grouped ? group_sums : b.c;
        run = {words, b.word_stride, count / per_step, per_step, a, b.a_stride, raw, b.load && !grouped,
               run.ahead, run.ahead_end, per_step * b.ahead_lines_at_once};
        run_tiles<D>(run, b.rows, b.columns);
        if (Scaled && b.finish) {
            finish_tiles<D>(b, raw, b.header + g * b.header_stride, g, grouped && (b.load || g > 0));
        }
        words += b.group_stride;
        a += count * 4;
    }
}

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

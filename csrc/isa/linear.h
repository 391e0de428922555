// Matrix products over packed weights: activations [rows, K] x panels -> [rows, N], with a fused epilogue.
//
// An output element is one chain of additions over K in a fixed order (within a group for grouped weights, then over
// the groups), whatever the number of rows or threads: rows only choose how many chains advance together. Partial
// chains may rest in memory as float or int32, which loses nothing. So results are batch-invariant to the bit.
//
// Few rows: a panel is read once, from front to back, unpacked in registers. Many rows: K is cut so that the piece of
// panel stays in the L1 cache; four-bit words are unpacked there once and used by every row.
#pragma once

#include "../ops.h"
#include "../sparse_weight.h"

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

constexpr int kMaxRows = W == 4 ? 4 : 6;     // rows of a register tile
constexpr int kDirectRows = 4;               // rows of a register tile that unpacks its words itself
constexpr int kDirectLimit = 24;             // rows from which it pays to unpack a piece of panel once for all
constexpr int kPrefetchBytes = 8192;            // how far ahead a word that is read once is fetched
constexpr int kPrefetchBytesPastCaches = 6144;

enum class Fetch { nothing, into_caches, past_caches };

// Fetches the 256 bytes that lie ahead of `at` by so much.
template <Fetch How>
static FASTSERVE_INLINE void fetch_once(const uint8_t* at) {
    if constexpr (How != Fetch::nothing) {
        constexpr bool kPast = How == Fetch::past_caches;
        at += kPast ? kPrefetchBytesPastCaches : kPrefetchBytes;
#pragma GCC unroll 4
        for (int line = 0; line < 4; ++line) __builtin_prefetch(at + line * 64, 0, kPast ? 0 : 3);
    }
}

// How the tile unit is configured, where there is one.
struct TileShape {
    int64_t rows = 0, words = 0;
};

// One register tile over a run of K.
struct Block {
    const PackedWeight* weight;
    const uint8_t* words;      // first word row, at this tile's first column
    int64_t word_stride;       // bytes from one word row to the next
    int64_t words_per_group, last_words;  // word rows of each group here; of the last one
    int64_t group_stride;      // bytes from one group's words to the next
    const uint8_t* header;     // first group's scales, at this tile's first column
    int64_t header_stride, zeros_offset;
    const char* a;             // first row's activations at the first k
    int64_t a_stride;          // bytes
    const char* sums;          // [rows, groups] 4 bytes each, at the first group
    int64_t sums_stride;       // bytes
    float* c;                  // [rows, 64]: totals, or unfinished sums
    int64_t groups;            // here
    int centre;                // zero point of symmetric weights
    bool load;                 // c holds what came before
    bool finish;               // the (only) group ends here: apply its scale
    bool stream;               // the words come from memory: fetch ahead
    const uint8_t* ahead;      // what is read next, to be fetched into the L2 cache meanwhile
    int64_t ahead_lines, ahead_lines_at_once;  // in all; per word row
    int64_t rows, columns;     // of this tile; the kernels in registers are made for theirs
    TileShape* tiles;
};

using Kernel = void (*)(const Block&);

template <class D, int P, int R, int NV>
static inline __attribute__((always_inline)) void multiply_parts(
    const D& dot, typename D::Acc (&acc)[R][NV], const I (&words)[NV], const char* a, int64_t a_stride) {
    if constexpr (P < D::kParts) {
        typename D::Part parts[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) parts[v] = dot.template part<P>(words[v]);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            auto activation = D::broadcast(a + r * a_stride + 4 * P);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) acc[r][v] = D::multiply(acc[r][v], parts[v], activation);
        }
        multiply_parts<D, P + 1>(dot, acc, words, a, a_stride);
    }
}

static inline F load_scale(const PackedWeight& weight, const uint8_t* header, int lane) {
    if (weight.scale_type == ScaleType::bf16) return f_load_bf16(reinterpret_cast<const uint16_t*>(header) + lane);
    if (weight.scale_type == ScaleType::f32) return f_load(reinterpret_cast<const float*>(header) + lane);
    return f_load_f16(reinterpret_cast<const uint16_t*>(header) + lane);
}

// The group's sum without its zero point: sum(a q) - zero * sum(a). Symmetric groups need nothing here: float sums are
// made with centred q, and integer sums start at -centre * sum(a).
template <class D, bool Zeros>
static inline __attribute__((always_inline)) F centre_group(const Block& b, typename D::Acc acc, const uint8_t* header,
                                                            int lane, const char* sum) {
    if constexpr (!D::kInteger) {
        if constexpr (!Zeros) return acc;
        float total;
        std::memcpy(&total, sum, 4);
        I zero = i_sub(i_from_u8(header + b.zeros_offset + lane), i_set(b.centre));
        return f_fma(f_convert(zero), f_set(-total), acc);
    } else {
        if constexpr (!Zeros) return f_convert(acc);
        int32_t total;
        std::memcpy(&total, sum, 4);
        return f_convert(i_sub(acc, i_mul(i_from_u8(header + b.zeros_offset + lane), i_set(total))));
    }
}

template <class D, bool Zeros, int R, int NV>
static inline __attribute__((always_inline)) void finish_group(const Block& b, const typename D::Acc (&acc)[R][NV],
                                                               const uint8_t* header, const char* sums, bool add) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
        const F scale = load_scale(*b.weight, header, v * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            float* c = b.c + r * kPanelColumns + v * W;
            F value = centre_group<D, Zeros>(b, acc[r][v], header, v * W, sums + r * b.sums_stride);
            f_store(c, add ? f_fma(scale, value, f_load(c)) : f_mul(scale, value));
        }
    }
}

// Where row r's sums start: at zero, or for symmetric integer groups so that they come out centred.
template <class D, bool Scaled>
static inline __attribute__((always_inline)) typename D::Acc start_of(const Block& b, const char* sum) {
    if constexpr (D::kInteger && Scaled) {
        if (b.weight->has_zeros) return D::zero();
        int32_t total;
        std::memcpy(&total, sum, 4);
        return i_set(-b.centre * total);
    } else {
        return D::zero();
    }
}

template <class D, bool Scaled, int R, int NV, Fetch How>
static FASTSERVE_INLINE void multiply_block(const Block& b) {
    const D dot(*b.weight);
    const uint8_t* words = b.words;
    const char* a = b.a;
    const bool grouped = Scaled && b.weight->groups > 1;
    const uint8_t *ahead = b.ahead, *ahead_end = b.ahead + 64 * b.ahead_lines;
    for (int64_t g = 0; g < b.groups; ++g) {
        typename D::Acc acc[R][NV];
        if (b.load && !grouped) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) acc[r][v] = D::load(b.c + r * kPanelColumns + v * W);
            }
        } else {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                auto start = start_of<D, Scaled>(b, b.sums + r * b.sums_stride + 4 * g);
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) acc[r][v] = start;
            }
        }
        const uint8_t* at = words;
        const int64_t steps = g == b.groups - 1 ? b.last_words : b.words_per_group;
        for (int64_t s = 0; s < steps; ++s) {
            for (int64_t i = 0; i < b.ahead_lines_at_once && ahead < ahead_end; ++i, ahead += 64) {
                __builtin_prefetch(ahead, 0, 2);
            }
            I row[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) row[v] = i_load(at + v * W * 4);
            fetch_once<How>(at);
            multiply_parts<D, 0>(dot, acc, row, a, b.a_stride);
            at += b.word_stride;
            a += 4 * D::kParts;
        }
        words += b.group_stride;
        if (!Scaled || !b.finish) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) D::store(b.c + r * kPanelColumns + v * W, acc[r][v]);
            }
            continue;
        }
        const uint8_t* header = b.header + g * b.header_stride;
        const bool add = grouped && (b.load || g > 0);
        if (b.weight->has_zeros) finish_group<D, true, R, NV>(b, acc, header, b.sums + 4 * g, add);
        else finish_group<D, false, R, NV>(b, acc, header, b.sums + 4 * g, add);
    }
}

template <class D, bool Scaled, int R, int NV>
static void block_kernel(const Block& b) {
    if (NV * W != kPanelColumns || !b.stream) return multiply_block<D, Scaled, R, NV, Fetch::nothing>(b);
    if (kFetchPastCaches) return multiply_block<D, Scaled, R, NV, Fetch::past_caches>(b);
    multiply_block<D, Scaled, R, NV, Fetch::into_caches>(b);
}

// Kernels for 1..kMaxRows rows: over a whole panel of 64 columns where registers allow, and over 16.
struct Kernels {
    Kernel wide[kMaxRows];
    Kernel narrow[kMaxRows];
    int parts;
};

template <class D, bool Scaled, int Rows, int R = 1>
static void fill_kernels(Kernels& kernels) {
    if constexpr (R <= Rows) {
        constexpr int kAll = kPanelColumns / W;
        if constexpr (W == 16 || (W == 8 && R == 1)) kernels.wide[R - 1] = block_kernel<D, Scaled, R, kAll>;
        kernels.narrow[R - 1] = block_kernel<D, Scaled, R, kColumnMultiple / W>;
        fill_kernels<D, Scaled, Rows, R + 1>(kernels);
    }
}

template <class D, bool Scaled, int Rows>
static const Kernels& kernels_of() {
    static const Kernels table = [] {
        Kernels kernels{};
        kernels.parts = D::kParts;
        fill_kernels<D, Scaled, Rows>(kernels);
        return kernels;
    }();
    return table;
}

// Split every word of a piece of panel into its parts, each a word row of D::Native.
using Unpack = void (*)(const PackedWeight&, const uint8_t* words, int64_t count, int64_t width, uint8_t* out);

template <class D, int P>
static inline void store_parts(const D& dot, I word, uint8_t* out, int64_t stride) {
    if constexpr (P < D::kParts) {
        D::store_part(out + P * stride, dot.template part<P>(word));
        store_parts<D, P + 1>(dot, word, out, stride);
    }
}

template <class D>
static void unpack_words(const PackedWeight& weight, const uint8_t* words, int64_t count, int64_t width, uint8_t* out) {
    const D dot(weight);
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t column = 0; column < width; column += W) {
            store_parts<D, 0>(dot, i_load(words + column * 4), out + column * 4, width * 4);
        }
        words += width * 4;
        out += D::kParts * width * 4;
    }
}

enum class Path { floats, pairs, bytes };

// How one product is computed.
struct Recipe {
    Path path;
    const Kernels* direct;   // over the packed words; up to kDirectLimit rows unless `unpack` is null
    const Kernels* native;   // over unpacked words
    Unpack unpack;           // null: the packed words are native
    int64_t element;         // bytes of a prepared activation
    Kernel tiles = nullptr;  // over native words, on the tile unit: then for every number of rows
};

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

#ifdef FASTSERVE_TILES
#include "linear_tiles.h"
#endif

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

// In registers, or on the tile unit for what it can multiply.
template <class D, bool Scaled>
static Recipe recipe_of(Path path, int64_t element) {
    using N = typename D::Native;
    constexpr bool kIsNative = __is_same(D, N);
    Recipe recipe{path, &kernels_of<D, Scaled, kIsNative ? kMaxRows : kDirectRows>(), nullptr, nullptr, element};
    recipe.native = &kernels_of<N, Scaled, kMaxRows>();
    if constexpr (!kIsNative) recipe.unpack = unpack_words<D>;
#ifdef FASTSERVE_TILES
    if constexpr (!__is_same(typename D::Acc, F) || __is_same(typename D::Part, I)) recipe.tiles = tile_kernel<N, Scaled>;
#endif
    return recipe;
}

static Recipe choose_recipe(const LinearArgs& args) {
    Format format = args.weight->format;
    if (args.quantize_x && format == Format::u8) return recipe_of<ByteU8, true>(Path::bytes, 1);
    if (args.quantize_x && format == Format::u4) return recipe_of<ByteU4, true>(Path::bytes, 1);
#if defined(__AVX512BF16__)
    if (args.x_type == DType::bf16) {
        if (format == Format::bf16 || format == Format::sparse) return recipe_of<PairBf16, false>(Path::pairs, 2);
        if (format == Format::u8) return recipe_of<PairU8, true>(Path::pairs, 2);
        if (format != Format::f32) return recipe_of<PairNibbles, true>(Path::pairs, 2);
    }
#endif
    switch (format) {
        case Format::f32: return recipe_of<FloatF32, false>(Path::floats, 4);
        case Format::sparse:
        case Format::bf16: return recipe_of<FloatBf16, false>(Path::floats, 4);
        case Format::u8: return recipe_of<FloatU8, true>(Path::floats, 4);
        case Format::u4: return recipe_of<FloatU4, true>(Path::floats, 4);
        default: return recipe_of<FloatC4, true>(Path::floats, 4);
    }
}

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

#include "linear_prepare.h"

#include "adapters.h"

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

// Products of one panel with rows [first, last) into c [rows, 64].
static void multiply_panel(const LinearArgs& args, const Recipe& recipe, const Prepared& x, int64_t first, int64_t last,
                           int64_t panel, float* c, uint8_t* unpacked, TileShape& tiles) {
    const PackedWeight& weight = *args.weight;
    const int64_t rows = last - first, width = weight.panel_columns(panel), groups = weight.groups;
    const bool sparse = weight.format == Format::sparse;  // expanded to what dense words are, and multiplied as they
    const bool direct = !sparse && (!recipe.unpack || (rows <= kDirectLimit && !recipe.tiles));
    const int64_t max_rows = recipe.tiles ? 32 : direct && recipe.unpack ? kDirectRows : kMaxRows;
    const Kernels& kernels = direct ? *recipe.direct : *recipe.native;
    // Native words per packed word, unless direct.
    const int64_t parts = sparse ? 1 : direct ? kernels.parts : recipe.direct->parts;
    const int64_t depth = weight.depth_per_word();
    const int64_t group_words = weight.group / depth, all_words = weight.k_padded / depth;
    const int64_t header_bytes = weight.header_bytes(width), word_row = width * 4;
    // Packed words per piece of K.
    int64_t piece = all_words;
    if (rows > max_rows || !direct) {
        piece = direct ? kSegmentWords : kSegmentWords / parts;
        if (groups > 1) piece = piece < group_words ? group_words : piece / group_words * group_words;
    }
    const int64_t row_blocks = ceil_div(rows, max_rows);
    if (sparse && rows == 1 && width == kPanelColumns && recipe.path == Path::pairs && !recipe.tiles &&
        multiply_vector(weight, panel, x.data + first * x.stride, c)) {
        return;
    }
    const uint16_t* values = nullptr;
    for (int64_t start = 0; start < all_words; start += piece) {
        const int64_t count = min_of(piece, all_words - start);
        const int64_t group = groups > 1 ? start / group_words : 0;
        const int64_t groups_here = groups > 1 ? ceil_div(count, group_words) : 1;
        const uint8_t* block = weight.panel(panel) + weight.group_offset(group, width);
        const uint8_t* words = block + header_bytes + (groups > 1 ? 0 : start * word_row);
        const int64_t block_bytes = header_bytes + group_words * word_row;
        Block b{};
        b.weight = &weight;
        b.tiles = &tiles;
        b.word_stride = word_row;
        b.header_stride = block_bytes;
        b.a_stride = x.stride;
        b.sums_stride = groups * 4;
        b.groups = groups_here;
        b.centre = weight.format == Format::u8 ? 128 : 8;
        b.load = start > 0;
        b.finish = groups > 1 || start + count == all_words;
        b.words_per_group = group_words;
        b.last_words = count - (groups_here - 1) * group_words;
        b.group_stride = block_bytes;
        // Pieces and panels follow one another in memory.
        const uint8_t* ahead = block + groups_here * block_bytes;
        int64_t ahead_lines = ceil_div(groups_here * block_bytes, 64);
        if (groups == 1) ahead = words + count * word_row, ahead_lines = ceil_div(count * word_row, 64);
        const int64_t steps = (direct ? count : count * parts);
        if (sparse) {
            values = expand(weight, panel, start, count, values, unpacked);  // it fetches its own
            words = unpacked;
            ahead_lines = 0;
        } else if (!direct) {
            for (int64_t g = 0; g < groups_here; ++g) {
                int64_t here = g == groups_here - 1 ? b.last_words : group_words;
                recipe.unpack(weight, words + g * block_bytes, here, width, unpacked + g * group_words * parts * word_row);
            }
            words = unpacked;
            b.words_per_group *= parts;
            b.last_words *= parts;
            b.group_stride = b.words_per_group * word_row;
        }
        for (int64_t i = 0; i < row_blocks; ++i) {
            // Register tiles of equal height; the tile unit wants full ones and a rest.
            Range range{rows * i / row_blocks, rows * (i + 1) / row_blocks};
            if (recipe.tiles) range = {i * max_rows, min_of((i + 1) * max_rows, rows)};
            const int64_t r = range.end - range.begin, row = first + range.begin;
            b.a = x.data + row * x.stride + start * depth * recipe.element;
            b.sums = x.sums + row * b.sums_stride + group * 4;
            const bool wide = recipe.tiles || (width == kPanelColumns && kernels.wide[r - 1]);
            const int64_t step = recipe.tiles ? width : wide ? kPanelColumns : kColumnMultiple;
            b.rows = r;
            b.columns = step;
            // A panel that is read once is fetched a little ahead; one that rows share, evenly while the one before it is used.
            b.stream = direct && row_blocks == 1;
            const Range lines{ahead_lines * i / row_blocks, ahead_lines * (i + 1) / row_blocks};
            b.ahead = b.stream ? words + kPrefetchBytes : ahead + 64 * lines.begin;
            b.ahead_lines = b.stream && !recipe.tiles ? 0 : lines.end - lines.begin;
            b.ahead_lines_at_once = ceil_div(b.ahead_lines, steps);
            for (int64_t column = 0; column < width; column += step) {
                b.words = words + column * 4;
                b.header = block + column * weight.scale_bytes();
                b.zeros_offset = (width - column) * weight.scale_bytes() + column;  // from this tile's scales
                b.c = c + range.begin * kPanelColumns + column;
                (recipe.tiles ? recipe.tiles : (wide ? kernels.wide : kernels.narrow)[r - 1])(b);
                b.ahead_lines = b.ahead_lines_at_once = 0;
            }
        }
    }
}

// Totals at c -> NV vectors of an output row; what of a vector lies past `left` columns is not written.
template <Activation A, int NV>
static FASTSERVE_INLINE void finish_columns(const LinearArgs& args, const float* c, F a_scale, const float* bias,
                                            int64_t half, int64_t row, int64_t to, int64_t left) {
    const bool gated = args.weight->gated;
    F values[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
        values[v] = f_mul(f_load(c + v * W), a_scale);
        if (bias) values[v] = f_add(values[v], f_load(bias + v * W));
        values[v] = activate(values[v], A);
        if (gated) {
            F up = f_mul(f_load(c + half + v * W), a_scale);
            if (bias) up = f_add(up, f_load(bias + half + v * W));
            values[v] = f_mul(values[v], up);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
        const int64_t at = row * args.residual_stride + to + v * W, here = NV > 1 ? W : left;
        if (args.residual) values[v] = f_add(values[v], load_lanes(args.residual, args.out_type, at, here));
        store_lanes(args.out, args.out_type, row * args.out_stride + to + v * W, here, values[v]);
    }
}

// Totals c [rows, 64] -> the output's columns of this panel.
template <Activation A>
static void write_panel(const LinearArgs& args, const Prepared& x, int64_t first, int64_t last, int64_t panel,
                        const float* c) {
    constexpr int kTogether = 2;  // vectors whose long chains of operations overlap
    const PackedWeight& weight = *args.weight;
    const int64_t width = weight.panel_columns(panel);
    const int64_t half = weight.gated ? width / 2 : width;
    const int64_t out_first = panel * (weight.gated ? kPanelColumns / 2 : kPanelColumns);
    const int64_t real = min_of(half, weight.out_columns() - out_first);
    const float* bias = weight.bias ? weight.bias + panel * kPanelColumns : nullptr;
    for (int64_t row = first; row < last; ++row, c += kPanelColumns) {
        const F a_scale = f_set(x.scales ? x.scales[row] : 1.0f);
        int64_t column = 0;
        for (; column + kTogether * W <= real; column += kTogether * W) {
            finish_columns<A, kTogether>(args, c + column, a_scale, bias ? bias + column : nullptr, half, row, out_first + column, W);
        }
        for (; column < real; column += W) {
            finish_columns<A, 1>(args, c + column, a_scale, bias ? bias + column : nullptr, half, row, out_first + column,
                                 real - column);
        }
    }
}

static void write_panel(const LinearArgs& args, const Prepared& x, int64_t first, int64_t last, int64_t panel,
                        const float* c) {
    switch (args.activation) {
        case Activation::silu: return write_panel<Activation::silu>(args, x, first, last, panel, c);
        case Activation::gelu: return write_panel<Activation::gelu>(args, x, first, last, panel, c);
        case Activation::gelu_tanh: return write_panel<Activation::gelu_tanh>(args, x, first, last, panel, c);
        case Activation::relu: return write_panel<Activation::relu>(args, x, first, last, panel, c);
        default: return write_panel<Activation::none>(args, x, first, last, panel, c);
    }
}

static void linear(const LinearArgs& args, const Worker& worker) {
    const Recipe recipe = choose_recipe(args);
    const Prepared x = prepare(args, recipe, worker);
    float* c = reinterpret_cast<float*>(worker.scratch);
    uint8_t* unpacked = worker.scratch + kChunkRows * kPanelColumns * 4;
    float* h = nullptr;
    if (args.adapter_slots && args.adapters->max_ranks()) {
        h = reinterpret_cast<float*>(worker.shared + prepared_bytes(args));
        args.x_type == DType::f32 ? shrink<DType::f32>(args, h, worker) : shrink<DType::bf16>(args, h, worker);
        worker.barrier();
    }
    const int64_t panels = args.weight->panels;
    TileShape tiles;
    // Enough units of work for every thread, but no chunk smaller than a register tile.
    int64_t chunks = max_of(ceil_div(args.rows, kChunkRows), ceil_div(4 * worker.count, panels));
    chunks = max_of(ceil_div(args.rows, kChunkRows), min_of(chunks, args.rows / kMaxRows));
    const Range units = share_of(chunks * panels, worker.index, worker.count);
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
        const int64_t chunk = unit / panels, panel = unit % panels;
        const int64_t first = args.rows * chunk / chunks, last = args.rows * (chunk + 1) / chunks;
        multiply_panel(args, recipe, x, first, last, panel, c, unpacked, tiles);
        if (h) {
            auto add = args.x_type == DType::f32 ? expand<DType::f32> : expand<DType::bf16>;
            add(args, x.scales, h, first, last, panel, c);
        }
        write_panel(args, x, first, last, panel, c);
    }
#ifdef FASTSERVE_TILES
    if (tiles.rows) tile_release();
#endif
}

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

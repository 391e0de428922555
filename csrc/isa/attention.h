// Attention over paged keys and values: tiles of query rows against blocks of 64 keys, softmax kept as running sums.
//
// The result of a query row depends on that row's query and on the keys it sees, to the bit: not on the chunk, the batch
// or the threads. Blocks start at multiples of 64 of the absolute position, every 512 positions (a split) start from
// nothing, and splits are added up in order. A block that a row does not see leaves the row's sums untouched.
// A block's keys are laid beside each other as a panel [D words, 64 keys], its values as panels [key pairs, D]: so both
// products run on the kernels of linear.h, on the tile unit too. Few rows read both where they lie.
// Rows of a tile are (position, query head) of one key head, positions outermost. Of few rows, as in decoding, a tile has
// several key heads, and goes through them block by block: so memory is read from front to back.
#pragma once

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

constexpr int64_t kFewRows = 12;     // rows that do not repay a panel of values
constexpr float kNever = -3.0e38f;    // a masked score; any real one is larger

// Limits of scores: kNever before a position, or from it on; none on the other side. Read from where the position is 64.
struct Bounds {
    float from[2 * kKeyBlock]{}, to[2 * kKeyBlock]{};
    constexpr Bounds() {
        for (int64_t i = 0; i < kKeyBlock; ++i) {
            from[i] = to[kKeyBlock + i] = kNever;
            from[kKeyBlock + i] = to[i] = __builtin_inff();
        }
    }
};
static constexpr Bounds kBounds;

// Where one thread's working memory lies.
struct AttentionScratch {
    char* queries;     // [rows, depth] of the dot's elements
    uint8_t* keys;     // [words, 64]
    uint8_t* values;   // per 64 columns of D: [words, width]
    float* scores;     // [rows, 64]
    char* probs;       // [rows, 64] of the dot's elements
    float* out;        // per 64 columns of D: [rows, 64]; of the running split
    float* total;      // the same, of all splits so far
    float* top;        // [rows] largest score of the split
    float* sum;        // [rows]
    float* total_top;
    float* total_sum;
    float* key_scales;    // [64] of the block's keys; s8 caches only
    float* value_scales;  // [64]
};

struct AttentionSizes {
    bool pairs;              // bfloat16 dots
    int64_t group;           // query heads per key head
    int64_t depth;           // D padded for the scores' product
    int64_t columns;         // D padded to 16
    int64_t element;         // bytes of a query or a probability
    int64_t ahead;           // positions after its own that a query sees
};

static AttentionSizes attention_sizes(const AttentionArgs& args) {
    AttentionSizes sizes{};
    sizes.pairs = kHasBf16Dot && args.x_type == DType::bf16 && args.cache_type != DType::f32;
    sizes.element = sizes.pairs ? 2 : 4;
    sizes.group = args.num_heads / args.num_kv_heads;
    sizes.depth = round_up(args.head_size, 32);
    sizes.columns = round_up(args.head_size, kColumnMultiple);
    sizes.ahead = args.causal ? 0 : args.window ? args.window - 1 : int64_t{1} << 40;
    return sizes;
}

static AttentionScratch place_scratch(uint8_t* base, const AttentionArgs& args) {
    const int64_t rows = attention_tile_rows(args);
    const int64_t columns = round_up(args.head_size, kColumnMultiple), padded = round_up(columns, kPanelColumns);
    AttentionScratch s{};
    auto take = [&](int64_t bytes) {
        uint8_t* here = base;
        base += round_up(bytes, 64);
        return here;
    };
    s.queries = reinterpret_cast<char*>(take(rows * round_up(args.head_size, 32) * 4));
    s.keys = take(round_up(args.head_size, 32) * kKeyBlock * 4);
    s.values = take(kKeyBlock * padded * 4);
    s.scores = reinterpret_cast<float*>(take(rows * kKeyBlock * 4));
    s.probs = reinterpret_cast<char*>(take(rows * kKeyBlock * 4));
    s.out = reinterpret_cast<float*>(take(rows * padded * 4));
    s.total = reinterpret_cast<float*>(take(rows * padded * 4));
    s.top = reinterpret_cast<float*>(take(rows * 4));
    s.sum = reinterpret_cast<float*>(take(rows * 4));
    s.total_top = reinterpret_cast<float*>(take(rows * 4));
    s.total_sum = reinterpret_cast<float*>(take(rows * 4));
    s.key_scales = reinterpret_cast<float*>(take(kKeyBlock * 4));
    s.value_scales = reinterpret_cast<float*>(take(kKeyBlock * 4));
    return s;
}

// c [rows, 64] (+)= a [rows, words] x panel [words, width].
struct PanelProduct {
    const Kernels* kernels;
    Kernel tile_kernel;
    const PackedWeight* nothing;  // what the kernels look up in a weight: no scales, no groups
    TileShape* tiles;

    void run(const uint8_t* panel, int64_t width, int64_t words, const char* a, int64_t a_stride, float* c, int64_t rows,
             bool load) const {
        Block b{};
        b.weight = nothing;
        b.tiles = tiles;
        b.word_stride = width * 4;
        b.words_per_group = b.last_words = words;
        b.a_stride = a_stride;
        b.groups = 1;
        b.load = load;
        const int64_t most = tile_kernel ? 32 : kMaxRows;
        const int64_t blocks = ceil_div(rows, most);
        for (int64_t i = 0; i < blocks; ++i) {
            Range range{rows * i / blocks, rows * (i + 1) / blocks};
            if (tile_kernel) range = {i * most, min_of((i + 1) * most, rows)};
            b.rows = range.end - range.begin;
            b.a = a + range.begin * a_stride;
            const bool wide = tile_kernel || (width == kPanelColumns && kernels->wide[b.rows - 1]);
            b.columns = tile_kernel ? width : wide ? kPanelColumns : kColumnMultiple;
            for (int64_t column = 0; column < width; column += b.columns) {
                b.words = panel + column * 4;
                b.c = c + range.begin * kPanelColumns + column;
                (tile_kernel ? tile_kernel : (wide ? kernels->wide : kernels->narrow)[b.rows - 1])(b);
            }
        }
    }
};

// One tile: some query positions of one sequence, one key head or (for few rows) several.
struct QueryTile {
    int64_t sequence, kv_head, num_heads;
    int64_t first_query, num_queries;  // among the sequence's new tokens
    int64_t first_position;            // of the first query
    int64_t rows;                      // of each key head
};

// Keys that a tile sees at all. `ahead`: how many after its last query.
static Range visible_keys(const AttentionArgs& args, int64_t ahead, const QueryTile& tile) {
    const int64_t last = tile.first_position + tile.num_queries + ahead;
    return {args.window ? max_of(0, tile.first_position - args.window + 1) : 0, min_of(last, args.context_lens[tile.sequence])};
}

class TileAttention {
public:
    TileAttention(const AttentionArgs& args, const AttentionScratch& scratch, TileShape& tiles)
        : args_(args), sizes_(attention_sizes(args)),
          layout_{args.cache_type, args.num_kv_heads, args.head_size, args.block_size}, all_(scratch), s_(scratch) {
        product_.nothing = &kNoWeight;
        product_.tiles = &tiles;
        product_.tile_kernel = nullptr;
        product_.kernels = &kernels_of<FloatF32, false, kMaxRows>();
#if defined(__AVX512BF16__)
        if (sizes_.pairs) {
            product_.kernels = &kernels_of<PairBf16, false, kMaxRows>();
#ifdef FASTSERVE_TILES
            product_.tile_kernel = tile_kernel<PairBf16, false>;
#endif
        }
#endif
    }

    // Gather the tile's queries and forget all sums. `next`: the tile that comes after it, or null.
    void start(const QueryTile& tile, const QueryTile* next = nullptr) {
        tile_ = tile;
        next_tile_ = next;
        first_head_ = tile.kv_head;
        for_heads([&](int64_t) { start_head(); });
    }

    // Keys this tile sees at all: [first, last).
    Range visible() const { return visible_keys(args_, sizes_.ahead, tile_); }

    // All visible keys of split `split`, from nothing, into out, top and sum.
    void attend_split(int64_t split) {
        for_heads([&](int64_t) {
            for (int64_t row = 0; row < tile_.rows; ++row) s_.top[row] = kNever, s_.sum[row] = 0.0f;
            std::memset(s_.out, 0, panels() * panel_stride() * 4);
        });
        const Range keys = visible();
        const int64_t begin = max_of(split * kSplitKeys, keys.begin / kKeyBlock * kKeyBlock);
        const int64_t end = min_of((split + 1) * kSplitKeys, keys.end);
        for (int64_t block = begin; block < end; block += kKeyBlock) {
            for_heads([&](int64_t) { attend_block(block); });
        }
    }

    // total += the split's sums.
    void merge() {
        for_heads([&](int64_t) { merge_sums(s_.top, s_.sum, s_.out); });
    }

    // The split's sums of all heads.
    void save(float* to) const {
        const int64_t rows = tile_.num_heads * tile_.rows;
        std::memcpy(to, all_.top, rows * 4);
        std::memcpy(to + rows, all_.sum, rows * 4);
        std::memcpy(to + 2 * rows, all_.out, rows * panels() * kPanelColumns * 4);
    }

    // total += sums that were saved.
    void merge_saved(const float* from) {
        const int64_t rows = tile_.num_heads * tile_.rows;
        for_heads([&](int64_t head) {
            const int64_t first = head * tile_.rows;
            merge_sums(from + first, from + rows + first, from + 2 * rows + first * panels() * kPanelColumns);
        });
    }

    void write() {
        for_heads([&](int64_t) { write_head(); });
    }

private:
    // Calls body(index) for each key head of the tile, with kv_head and the working memory being that head's.
    template <class Body> void for_heads(const Body& body) {
        const int64_t row_bytes = sizes_.depth * sizes_.element;
        for (int64_t head = 0; head < tile_.num_heads; ++head) {
            const int64_t row = head * tile_.rows, columns = row * panels() * kPanelColumns;
            tile_.kv_head = first_head_ + head;
            s_.queries = all_.queries + row * row_bytes;
            s_.out = all_.out + columns, s_.total = all_.total + columns;
            s_.top = all_.top + row, s_.sum = all_.sum + row;
            s_.total_top = all_.total_top + row, s_.total_sum = all_.total_sum + row;
            body(head);
        }
    }

    void start_head() {
        const int64_t row_bytes = sizes_.depth * sizes_.element;
        for (int64_t row = 0; row < tile_.rows; ++row) {
            const int64_t token = args_.query_starts[tile_.sequence] + tile_.first_query + row / sizes_.group;
            const int64_t head = tile_.kv_head * sizes_.group + row % sizes_.group;
            const int64_t from = token * args_.query_stride + head * args_.query_head_stride;
            char* to = s_.queries + row * row_bytes;
            std::memset(to, 0, row_bytes);
            if (sizes_.pairs) {
                std::memcpy(to, static_cast<const uint16_t*>(args_.query) + from, args_.head_size * 2);
            } else {
                widen(args_.query, args_.x_type, from, args_.head_size, reinterpret_cast<float*>(to));
            }
            s_.total_top[row] = kNever;
            s_.total_sum[row] = 0.0f;
        }
        std::memset(s_.total, 0, panels() * panel_stride() * 4);
    }

    void merge_sums(const float* top, const float* sum, const float* out) {
        for (int64_t row = 0; row < tile_.rows; ++row) {
            if (sum[row] == 0.0f) continue;
            const float highest = top[row] > s_.total_top[row] ? top[row] : s_.total_top[row];
            const float old_share = exp_one(s_.total_top[row] - highest), new_share = exp_one(top[row] - highest);
            s_.total_top[row] = highest;
            s_.total_sum[row] = s_.total_sum[row] * old_share + sum[row] * new_share;
            const F a = f_set(old_share), b = f_set(new_share);
            for (int64_t panel = 0; panel < panels(); ++panel) {
                const float* from = out + panel * panel_stride() + row * kPanelColumns;
                float* to = s_.total + panel * panel_stride() + row * kPanelColumns;
                for (int64_t column = 0; column < panel_width(panel); column += W) {
                    f_store(to + column, f_fma(f_load(from + column), b, f_mul(f_load(to + column), a)));
                }
            }
        }
    }

    void write_head() {
        for (int64_t row = 0; row < tile_.rows; ++row) {
            const int64_t token = args_.query_starts[tile_.sequence] + tile_.first_query + row / sizes_.group;
            const int64_t head = tile_.kv_head * sizes_.group + row % sizes_.group;
            const int64_t at = (token * args_.num_heads + head) * args_.head_size;
            const F share = f_set(s_.total_sum[row] > 0.0f ? 1.0f / s_.total_sum[row] : 0.0f);
            for (int64_t column = 0; column < args_.head_size; column += W) {
                const int64_t panel = column / kPanelColumns;
                const float* from = s_.total + panel * panel_stride() + row * kPanelColumns + column % kPanelColumns;
                store_lanes(args_.out, args_.x_type, at + column, args_.head_size - column, f_mul(f_load(from), share));
            }
        }
    }

    int64_t panels() const { return ceil_div(sizes_.columns, kPanelColumns); }
    int64_t context() const { return args_.context_lens[tile_.sequence]; }
    int64_t panel_stride() const { return tile_.rows * kPanelColumns; }
    int64_t panel_width(int64_t panel) const { return min_of(kPanelColumns, sizes_.columns - panel * kPanelColumns); }

    static void widen(const void* from, DType type, int64_t at, int64_t count, float* to) {
        for (int64_t i = 0; i < count; i += W) {
            F value = load_lanes(from, type, at + i, count - i);
            if (count - i >= W) f_store(to + i, value);
            else store_some(to, DType::f32, i, count - i, value);
        }
    }

    static float exp_one(float x) {
        alignas(64) float lanes[W];
        f_store(lanes, f_exp(f_set(x)));
        return x < -87.0f ? 0.0f : lanes[0];
    }

    // Where up to 64 keys (their first words) and their values start, and the scales of s8: bytes into a cache.
    struct Places {
        int64_t first_key = -1, kv_head = -1, sequence = -1, count = 0;
        int64_t keys[kKeyBlock], values[kKeyBlock], scales[kKeyBlock];
    };

    void find(int64_t first_key, int64_t keys, Places& places) const {
        const int64_t value_bytes = args_.head_size * layout_.element();
        int64_t index = first_key / args_.block_size, offset = first_key % args_.block_size;
        for (int64_t i = 0; i < keys; ++i) {
            const int64_t block = args_.block_tables[tile_.sequence][index] * layout_.block();
            const int64_t head = block + tile_.kv_head * layout_.head();
            places.keys[i] = head + 4 * offset;
            places.values[i] = head + offset * value_bytes;
            places.scales[i] = block + layout_.scale(tile_.kv_head, offset);
            if (++offset == args_.block_size) ++index, offset = 0;
        }
        places.first_key = first_key, places.kv_head = tile_.kv_head, places.sequence = tile_.sequence, places.count = keys;
    }

    // The places of a block's keys of one head; those of the next head lie beside them.
    void find_block(int64_t first_key, int64_t keys) {
        Places& now = places_;
        if (now.first_key != first_key || now.sequence != tile_.sequence || now.count != keys) {
            return find(first_key, keys, now);
        }
        const int64_t heads = tile_.kv_head - now.kv_head, bytes = heads * layout_.head(), scales = 4 * heads * args_.block_size;
        for (int64_t i = 0; i < keys; ++i) now.keys[i] += bytes, now.values[i] += bytes, now.scales[i] += scales;
        now.kv_head = tile_.kv_head;
    }

    // What is read next is fetched meanwhile.
    struct Ahead {
        const char* pieces[kKeyBlock];
        int64_t count = 0, bytes = 0;  // of each piece
        int64_t at = 0, step = 0;

        // The next `times` calls of `fetch` bring everything.
        void divide(int64_t times) { step = round_up(ceil_div(bytes, times), 64); }
        FASTSERVE_INLINE void fetch() {
            const int64_t end = min_of(at + step, bytes);
            for (; at < end; at += 64) {
                for (int64_t i = 0; i < count; ++i) __builtin_prefetch(pieces[i] + at, 0, 3);
            }
        }
    };

    // Prepare to fetch the keys (or values) of one head in a block of keys.
    void look_ahead(const void* cache, const QueryTile& tile, int64_t kv_head, int64_t first_key, int64_t end) {
        ahead_.count = ahead_.at = 0;
        if (args_.block_size > kKeyBlock) return;  // a piece is more than what is read next
        end = min_of(end, first_key + kKeyBlock);
        for (int64_t index = first_key / args_.block_size; index * args_.block_size < end; ++index) {
            const int64_t block = args_.block_tables[tile.sequence][index];
            ahead_.pieces[ahead_.count++] = static_cast<const char*>(cache) + block * layout_.block() + kv_head * layout_.head();
        }
        ahead_.bytes = layout_.head();
    }

    // The keys of the next head, or of the next block of keys, of this tile or of the next.
    void look_ahead_at_keys(int64_t first_key) {
        const int64_t end = visible().end;
        if (tile_.kv_head + 1 < first_head_ + tile_.num_heads) return look_ahead(args_.keys, tile_, tile_.kv_head + 1, first_key, end);
        if (first_key + kKeyBlock < end) return look_ahead(args_.keys, tile_, first_head_, first_key + kKeyBlock, end);
        ahead_.count = 0;
        if (!next_tile_) return;
        const Range keys = visible_keys(args_, sizes_.ahead, *next_tile_);
        look_ahead(args_.keys, *next_tile_, next_tile_->kv_head, keys.begin / kKeyBlock * kKeyBlock, keys.end);
    }

    void attend_block(int64_t first_key) {
        const int64_t keys = min_of(kKeyBlock, context() - first_key);
        Range rows{0, tile_.rows};
        rows.begin = max_of(0, first_key - sizes_.ahead - tile_.first_position) * sizes_.group;
        if (args_.window) {
            // The last position that still sees this block's last key.
            const int64_t last = first_key + kKeyBlock - 1 + args_.window - 1;
            rows.end = min_of(rows.end, (last - tile_.first_position + 1) * sizes_.group);
        }
        if (rows.begin >= rows.end) return;
        find_block(first_key, keys);
        if (is_s8()) load_scales(keys);
        look_ahead(args_.values, tile_, tile_.kv_head, first_key, first_key + keys);
        multiply_keys(rows, keys);
        look_ahead_at_keys(first_key);
        for (int64_t row = rows.begin; row < rows.end; ++row) soften(row, first_key, keys);
#if defined(__AVX512BF16__)
        if (reads_directly()) {
            for_four_rows(rows, [&](auto count, int64_t row) { add_values<count.value>(row, keys); });
            return;
        }
#endif
        load_values(keys);
        const int64_t value_words = sizes_.pairs ? kKeyBlock / 2 : kKeyBlock, prob_bytes = kKeyBlock * sizes_.element;
        const int64_t count = rows.end - rows.begin;
        for (int64_t panel = 0; panel < panels(); ++panel) {
            product_.run(s_.values + panel * value_words * kPanelColumns * 4, panel_width(panel), value_words,
                         s_.probs + rows.begin * prob_bytes, prob_bytes,
                         s_.out + panel * panel_stride() + rows.begin * kPanelColumns, count, true);
        }
    }

    // Scores [rows, 64] = queries x keys.
    void multiply_keys(Range rows, int64_t keys) {
#if defined(__AVX512BF16__)
        if (reads_directly() && args_.block_size % W == 0) {
            return for_four_rows(rows, [&](auto count, int64_t row) {
                is_s8() ? score_keys<count.value, S8Words>(row, keys) : score_keys<count.value, PairBf16>(row, keys);
            });
        }
#endif
        load_keys(keys);
        const int64_t words = sizes_.pairs ? sizes_.depth / 2 : args_.head_size;
        const int64_t query_bytes = sizes_.depth * sizes_.element;
        product_.run(s_.keys, kKeyBlock, words, s_.queries + rows.begin * query_bytes, query_bytes,
                     s_.scores + rows.begin * kPanelColumns, rows.end - rows.begin, false);
    }

#if defined(__AVX512BF16__)
    bool reads_directly() const {
        return sizes_.pairs && !product_.tile_kernel && tile_.rows <= kFewRows && args_.head_size % kPanelColumns == 0;
    }

    // Calls body(constant, row) for four rows at a time, and for what is left.
    template <class Body> static void for_four_rows(Range rows, const Body& body) {
        for (; rows.end - rows.begin >= 4; rows.begin += 4) body(std::integral_constant<int, 4>{}, rows.begin);
        switch (rows.end - rows.begin) {
            case 3: return body(std::integral_constant<int, 3>{}, rows.begin);
            case 2: return body(std::integral_constant<int, 2>{}, rows.begin);
            case 1: return body(std::integral_constant<int, 1>{}, rows.begin);
        }
    }

    // Words of four signed bytes as two parts of two bfloat16.
    struct S8Words : PairU8 {
        using PairU8::PairU8;
        template <int P> I part(I word) const { return PairU8::part<P>(i_xor(word, i_set(static_cast<int>(0x80808080)))); }
    };

    // Scores of R rows, the keys read where they lie; the same products in the same order as over a panel.
    template <int R, class Words> void score_keys(int64_t row, int64_t keys) {
        constexpr int kVectors = kKeyBlock / W, kParts = Words::kParts;
        const Words unpack(kNoWeight);
        const int64_t words = args_.head_size / 2 / kParts, row_bytes = sizes_.depth * 2, stride = 4 * args_.block_size;
        const char* panels[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            panels[v] = static_cast<const char*>(args_.keys) + places_.keys[v * W < keys ? v * W : 0];
        }
        const char* queries = s_.queries + row * row_bytes;
        ahead_.divide(ceil_div(tile_.rows, 4) * words);
        F acc[R][kVectors];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) acc[r][v] = f_zero();
        }
        for (int64_t word = 0; word < words; ++word) {
            ahead_.fetch();
            I loaded[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) loaded[v] = i_load(panels[v] + word * stride);
            const auto multiply = [&](auto part) {
                I panel[kVectors];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) panel[v] = unpack.template part<part.value>(loaded[v]);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    int32_t two;
                    std::memcpy(&two, queries + r * row_bytes + (word * kParts + part.value) * 4, 4);
                    const I a = i_set(two);
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; ++v) acc[r][v] = f_dot(acc[r][v], panel[v], a);
                }
            };
            multiply(std::integral_constant<int, 0>{});
            if constexpr (kParts == 2) multiply(std::integral_constant<int, 1>{});
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) f_store(s_.scores + (row + r) * kPanelColumns + v * W, acc[r][v]);
        }
    }

    // out += probabilities x values, read where they lie; the same products in the same order as over a panel.
    template <int R> void add_values(int64_t row, int64_t keys) {
        if (R <= 2 && panels() % 2 == 0) add_panels<R, R <= 2 ? 2 : 1>(row, keys);
        else add_panels<R, 1>(row, keys);
    }

    // P panels at a time: independent sums enough to keep the units busy.
    template <int R, int P> void add_panels(int64_t row, int64_t keys) {
        constexpr int kVectors = kPanelColumns / W;
        const char* probs = s_.probs + row * kKeyBlock * 2;
        const int64_t whole = keys / 2;
        ahead_.divide(panels() / P * ceil_div(tile_.rows, 4) * max_of(whole, 1));
        for (int64_t panel = 0; panel < panels(); panel += P) {
            float* out = s_.out + panel * panel_stride() + row * kPanelColumns;
            F acc[P][R][kVectors];
            for_vectors<P, R>([&](int p, int r, int v) { acc[p][r][v] = f_load(out + p * panel_stride() + r * kPanelColumns + v * W); });
            const auto multiply = [&](int64_t pair, int64_t first, int64_t second) {
                I words[P][kVectors];
#pragma GCC unroll 2
                for (int p = 0; p < P; ++p) value_words(first, second, (panel + p) * kPanelColumns, words[p]);
                for_vectors<P, R>([&](int p, int r, int v) {
                    int32_t two;
                    std::memcpy(&two, probs + r * kKeyBlock * 2 + pair * 4, 4);
                    acc[p][r][v] = f_dot(acc[p][r][v], words[p][v], i_set(two));
                });
            };
            for (int64_t pair = 0; pair < whole; ++pair) {
                ahead_.fetch();
                multiply(pair, places_.values[2 * pair], places_.values[2 * pair + 1]);
            }
            if (keys % 2) multiply(whole, places_.values[keys - 1], -1);
            if (keys + 1 < kKeyBlock) multiply(kKeyBlock / 2 - 1, -1, -1);  // adds zero; once is as good as often
            for_vectors<P, R>([&](int p, int r, int v) { f_store(out + p * panel_stride() + r * kPanelColumns + v * W, acc[p][r][v]); });
        }
    }

    template <int P, int R, class Body> static FASTSERVE_INLINE void for_vectors(const Body& body) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
                for (int v = 0; v < kPanelColumns / W; ++v) body(p, r, v);
            }
        }
    }

    // 64 columns of two values, a bfloat16 of each in a word; 0 for one that is not there (-1).
    FASTSERVE_INLINE void value_words(int64_t first, int64_t second, int64_t column, I* words) const {
        if (!is_s8()) {
            const char* values = static_cast<const char*>(args_.values) + 2 * column;
            for (int half = 0; half < 2; ++half) {
                const I a = first < 0 ? i_set(0) : i_load(values + first + 64 * half);
                const I b = second < 0 ? i_set(0) : i_load(values + second + 64 * half);
                interleave_halves(a, b, words[2 * half], words[2 * half + 1]);
            }
            return;
        }
#pragma GCC unroll 4
        for (int v = 0; v < kPanelColumns / W; ++v) {
            const F a = value_lanes(first, column + v * W), b = value_lanes(second, column + v * W);
            words[v] = PairU8::upper_halves(i_bits(a), i_bits(b));
        }
    }
#endif

    // Scores of one row -> probabilities relative to the running maximum; the row's sums are brought to it.
    void soften(int64_t row, int64_t first_key, int64_t keys) {
        const int64_t position = tile_.first_position + row / sizes_.group;
        int64_t end = min_of(keys, position + sizes_.ahead + 1 - first_key);
        int64_t begin = args_.window ? max_of(0, position - args_.window + 1 - first_key) : 0;
        float* scores = s_.scores + row * kPanelColumns;
        const float* bias = args_.bias;
        if (bias) {
            const int64_t head = tile_.kv_head * sizes_.group + row % sizes_.group;
            bias += head * args_.bias_stride + args_.bias_origin + first_key - position;
        }
        const F scale = f_set(args_.scale), cap = f_set(args_.softcap), inverse_cap = f_set(1.0f / args_.softcap);
        constexpr int kVectors = kKeyBlock / W;
        F values[kVectors];
        const float* there = kBounds.to + kKeyBlock - keys;  // what has been in place of a key that is not may be a NaN
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            F value = f_mul(f_zero_below(f_load(there + v * W), f_zero(), f_load(scores + v * W)), scale);
            if (is_s8()) value = f_mul(value, f_load(s_.key_scales + v * W));
            if (bias && v * W < end) value = f_add(value, load_lanes(bias, DType::f32, v * W, end - v * W));
            if (args_.softcap > 0.0f) value = f_mul(cap, f_tanh(f_mul(value, inverse_cap)));
            values[v] = value;
        }
        if (begin > 0 || end < kKeyBlock) {
            const float* first = kBounds.from + kKeyBlock - min_of(begin, kKeyBlock);
            const float* last = kBounds.to + kKeyBlock - max_of(end, 0);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                const F most = f_min(f_load(last + v * W), f_load(first + v * W));
                values[v] = f_min(most, f_zero_below(most, f_zero(), values[v]));  // a NaN that is seen stays one
            }
        }
        F highest = f_set(kNever);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) highest = f_max(highest, values[v]);
        const float block_top = f_largest(highest);
        const float top = block_top > s_.top[row] ? block_top : s_.top[row];
        const F top_v = f_set(top);
        F sum = f_zero();
        char* probs = s_.probs + row * kKeyBlock * sizes_.element;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            // exp is clamped, so that a masked score would leave a trace: it is zeroed instead.
            F p = f_zero_below(values[v], f_set(kNever * 0.5f), f_exp(f_sub(values[v], top_v)));
            sum = f_add(sum, p);
            if (is_s8()) p = f_mul(p, f_load(s_.value_scales + v * W));
            store_as(probs, sizes_.pairs ? DType::bf16 : DType::f32, v * W, p);
        }
        if (top > s_.top[row]) {
            const float share = s_.top[row] <= kNever ? 0.0f : exp_one(s_.top[row] - top);
            s_.sum[row] *= share;
            const F factor = f_set(share);
            for (int64_t panel = 0; panel < panels(); ++panel) {
                float* out = s_.out + panel * panel_stride() + row * kPanelColumns;
                for (int64_t column = 0; column < panel_width(panel); column += W) {
                    f_store(out + column, f_mul(f_load(out + column), factor));
                }
            }
            s_.top[row] = top;
        }
        s_.sum[row] += f_sum(sum);
    }

    // A block's keys -> panel [D words, 64]; what comes after the last key is anything.
    void load_keys(int64_t keys) {
        const int64_t rows = sizes_.pairs ? sizes_.depth / 2 : args_.head_size;
        uint32_t* panel = reinterpret_cast<uint32_t*>(s_.keys);
        ahead_.divide(kKeyBlock / 16);
        for (int64_t key = 0; key < kKeyBlock; key += 16) {
            ahead_.fetch();
            int64_t row = 0;
            if (key < keys && args_.block_size % 16 == 0) row = load_16_keys(places_.keys[key], panel + key);
            for (; row < rows; ++row) {
                for (int64_t i = key; i < key + 16; ++i) panel[row * kKeyBlock + i] = i < keys ? key_word(i, row) : 0;
            }
        }
    }

    // Sixteen keys of one block -> their columns of the panel, widened; returns the rows that their whole words make.
    int64_t load_16_keys(int64_t at, uint32_t* panel) const {
        const char* from = static_cast<const char*>(args_.keys) + at;
        const int64_t words = layout_.words(), stride = 4 * args_.block_size;
        const bool as_it_is = args_.cache_type == (sizes_.pairs ? DType::bf16 : DType::f32);
        const int64_t each = as_it_is ? 1 : is_s8() && !sizes_.pairs ? 4 : 2;  // rows of a word
        for (int64_t word = 0; word < words; ++word) {
            uint32_t* to = panel + word * each * kKeyBlock;
            for (int64_t column = 0; column < 16; column += W) {
                const I bits = i_load(from + word * stride + 4 * column);
                if (as_it_is) i_store(to + column, bits);
                else if (is_s8()) widen_s8(bits, to + column);
                else {
                    i_store(to + column, i_shl<16>(bits));
                    i_store(to + kKeyBlock + column, i_shl<16>(i_shr<16>(bits)));
                }
            }
        }
        return words * each;
    }

    // Four bytes of each of W keys -> rows of a panel.
    void widen_s8(I four, uint32_t* to) const {
        const F a = f_convert(i_sra<24>(i_shl<24>(four))), b = f_convert(i_sra<24>(i_shl<16>(four)));
        const F c = f_convert(i_sra<24>(i_shl<8>(four))), d = f_convert(i_sra<24>(four));
        if (sizes_.pairs) {  // eight bits are exact in bfloat16
            i_store(to, i_or(i_shr<16>(i_bits(a)), i_bits(b)));
            i_store(to + kKeyBlock, i_or(i_shr<16>(i_bits(c)), i_bits(d)));
            return;
        }
        i_store(to, i_bits(a));
        i_store(to + kKeyBlock, i_bits(b));
        i_store(to + 2 * kKeyBlock, i_bits(c));
        i_store(to + 3 * kKeyBlock, i_bits(d));
    }

    // Of the block's keys and values; 0 where there are none.
    void load_scales(int64_t keys) {
        const Places& now = places_;
        const char *of_keys = static_cast<const char*>(args_.keys), *of_values = static_cast<const char*>(args_.values);
        if (args_.block_size % W == 0) {
            for (int64_t i = 0; i < kKeyBlock; i += W) {
                const F there = f_load(kBounds.to + kKeyBlock - keys + i);  // a block's last ones may be anything
                f_store(s_.key_scales + i, f_zero_below(there, f_zero(), f_load_at(of_keys, i < keys ? now.scales[i] : -1)));
                f_store(s_.value_scales + i, f_zero_below(there, f_zero(), f_load_at(of_values, i < keys ? now.scales[i] : -1)));
            }
            return;
        }
        for (int64_t i = 0; i < kKeyBlock; ++i) {
            s_.key_scales[i] = s_.value_scales[i] = 0.0f;
            if (i >= keys) continue;
            std::memcpy(s_.key_scales + i, of_keys + now.scales[i], 4);
            std::memcpy(s_.value_scales + i, of_values + now.scales[i], 4);
        }
    }

    static F f_load_at(const char* base, int64_t at) {
        return at < 0 ? f_zero() : f_load(reinterpret_cast<const float*>(base + at));
    }

    bool is_s8() const { return args_.cache_type == DType::s8; }

    // Row `row` of the panel for one of the block's keys; 0 beyond the head.
    uint32_t key_word(int64_t key, int64_t row) const {
        if (sizes_.pairs) {
            const uint32_t second = f32_to_bf16(key_element(key, 2 * row + 1));
            return f32_to_bf16(key_element(key, 2 * row)) | second << 16;
        }
        const float value = key_element(key, row);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        return bits;
    }

    // Element i of a key, widened; all types are exact.
    float key_element(int64_t key, int64_t i) const {
        if (i >= args_.head_size) return 0.0f;
        const int64_t offset = (places_.first_key + key) % args_.block_size;
        const char* at = static_cast<const char*>(args_.keys) + places_.keys[key] - 4 * offset + layout_.key(offset, i);
        if (is_s8()) return *reinterpret_cast<const int8_t*>(at);
        if (args_.cache_type == DType::f32) {
            float value;
            std::memcpy(&value, at, 4);
            return value;
        }
        uint16_t bits;
        std::memcpy(&bits, at, 2);
        return bf16_to_f32(bits);
    }

    // Values [64, D] -> per 64 columns of D a panel [words, width], a word being one float or two keys' bfloat16.
    void load_values(int64_t keys) {
        const int64_t* places = places_.values;
        const int64_t step = sizes_.pairs ? 2 : 1, words = kKeyBlock / step;
        ahead_.divide(words);
        for (int64_t word = 0; word < words; ++word) {
            const int64_t key = word * step;
            const int64_t first = key < keys ? places[key] : -1;
            const int64_t second = step == 2 && key + 1 < keys ? places[key + 1] : -1;
            ahead_.fetch();
            for (int64_t column = 0; column < sizes_.columns; column += W) {
                const int64_t panel = column / kPanelColumns, width = panel_width(panel);
                uint8_t* to = s_.values + panel * words * kPanelColumns * 4 +
                              (word * width + column % kPanelColumns) * 4;
                I bits = i_bits(value_lanes(first, column));
                if (step == 2) bits = i_or(i_shr<16>(bits), i_bits(value_lanes(second, column)));
                i_store(to, bits);
            }
        }
    }

    // W columns of the value at `at`, widened; 0 where there is none.
    FASTSERVE_INLINE F value_lanes(int64_t at, int64_t column) const {
        const int64_t left = args_.head_size - column;
        if (at < 0 || left <= 0) return f_zero();
        const uint8_t* from = static_cast<const uint8_t*>(args_.values) + at + column * layout_.element();
        if (!is_s8()) return load_lanes(from, args_.cache_type, 0, left);
        alignas(64) uint8_t some[W] = {};
        if (left < W) {
            std::memcpy(some, from, left);
            from = some;
        }
        // A float of the byte + 128 below the bits of 2^23, less both.
        return f_sub(f_bits(i_xor(i_from_u8(from), i_set(0x4b000080))), f_set(8388608.0f + 128.0f));
    }

    const AttentionArgs& args_;
    const AttentionSizes sizes_;
    const CacheLayout layout_;
    const AttentionScratch all_;  // of all heads of the tile
    AttentionScratch s_;          // of one
    int64_t first_head_ = 0;
    PanelProduct product_;
    QueryTile tile_{};
    const QueryTile* next_tile_ = nullptr;
    Ahead ahead_;
    Places places_;
};

// Calls visit(tile, splits, is_split, index) for every tile in a fixed order; `splits` are those it sees.
template <class Visit>
static void for_each_tile(const AttentionArgs& args, int threads, const Visit& visit) {
    const int64_t group = args.num_heads / args.num_kv_heads;
    const int64_t queries_per_tile = max_of(1, kTileQueryRows / group);
    for (int64_t sequence = 0; sequence < args.num_sequences; ++sequence) {
        const int64_t queries = args.query_starts[sequence + 1] - args.query_starts[sequence];
        if (!queries) continue;
        const int64_t before = args.context_lens[sequence] - queries;
        int64_t heads = 1;
        if (queries * group <= kFewRows) {
            // One sequence is divided among the threads by its heads.
            heads = args.num_sequences >= threads ? args.num_kv_heads : ceil_div(args.num_kv_heads, threads);
            heads = min_of(heads, attention_tile_rows(args) / (queries * group));
        }
        for (int64_t kv_head = 0; kv_head < args.num_kv_heads; kv_head += heads) {
            for (int64_t first = 0; first < queries; first += queries_per_tile) {
                QueryTile tile{sequence, kv_head, min_of(heads, args.num_kv_heads - kv_head), first, min_of(queries_per_tile, queries - first), before + first, 0};
                tile.rows = tile.num_queries * group;
                const Range keys = visible_keys(args, attention_sizes(args).ahead, tile);
                visit(tile, Range{keys.begin / kSplitKeys, ceil_div(keys.end, kSplitKeys)}, queries <= kSplitQueries,
                      (keys.end - keys.begin + 64) * (tile.rows + 8) * tile.num_heads);
            }
        }
    }
}

// Which thread takes the next piece of work: pieces in order, cut into parts of equal cost.
struct CostShare {
    int64_t total, before = 0;
    int count;
    int next(int64_t cost) {
        const int thread = static_cast<int>((before + cost / 2) * count / total);
        before += cost;
        return thread < count ? thread : count - 1;
    }
};

static void attention(const AttentionArgs& args, const Worker& worker) {
    TileShape tiles;
    const AttentionSizes sizes = attention_sizes(args);
    TileAttention tile_attention(args, place_scratch(worker.scratch, args), tiles);
    const int64_t padded = round_up(sizes.columns, kPanelColumns);
    int64_t total = 0;
    bool any_split = false;
    for_each_tile(args, worker.count, [&](const QueryTile&, Range splits, bool is_split, int64_t cost) {
        total += cost;
        any_split = any_split || (is_split && splits.end - splits.begin > 1);
    });
    CostShare share{max_of(total, 1), 0, worker.count};
    QueryTile waiting{};  // a tile is worked on when the one after it is known
    Range waiting_splits{};
    auto attend = [&](const QueryTile* next) {
        if (!waiting.num_queries) return;
        tile_attention.start(waiting, next);
        for (int64_t split = waiting_splits.begin; split < waiting_splits.end; ++split) {
            tile_attention.attend_split(split);
            tile_attention.merge();
        }
        tile_attention.write();
        waiting.num_queries = 0;
    };
    int64_t saved = 0;  // floats of partial sums before this tile's
    for_each_tile(args, worker.count, [&](const QueryTile& tile, Range splits, bool is_split, int64_t cost) {
        const int64_t num_splits = splits.end - splits.begin;
        if (!is_split || num_splits <= 1) {
            if (share.next(cost) != worker.index) return;
            attend(&tile);
            waiting = tile, waiting_splits = splits;
            return;
        }
        const int64_t floats = tile.num_heads * tile.rows * (padded + 2);
        bool started = false;
        for (int64_t split = splits.begin; split < splits.end; ++split, saved += floats) {
            if (share.next(cost / num_splits) != worker.index) continue;
            if (!started) tile_attention.start(tile);
            started = true;
            tile_attention.attend_split(split);
            tile_attention.save(reinterpret_cast<float*>(worker.shared) + saved);
        }
    });
    attend(nullptr);
    if (any_split) {
        worker.barrier();
        saved = 0;
        int64_t index = 0;
        for_each_tile(args, worker.count, [&](const QueryTile& tile, Range splits, bool is_split, int64_t) {
            const int64_t num_splits = splits.end - splits.begin;
            if (!is_split || num_splits <= 1) return;
            const float* from = reinterpret_cast<const float*>(worker.shared) + saved;
            const int64_t floats = tile.num_heads * tile.rows * (padded + 2);
            saved += num_splits * floats;
            if (index++ % worker.count != worker.index) return;
            tile_attention.start(tile);
            for (int64_t i = 0; i < num_splits; ++i, from += floats) {
                tile_attention.merge_saved(from);
            }
            tile_attention.write();
        });
    }
#ifdef FASTSERVE_TILES
    if (tiles.rows) tile_release();
#endif
}

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

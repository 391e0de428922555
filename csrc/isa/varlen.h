// Attention over whole sequences that lie one after the other: every query sees all keys of its sequence, or a window.
//
// A head's keys and values become panels once per sequence: keys [D words, 64 keys], values [key words, 64 columns of D].
// Tiles of queries then go through segments of keys: all scores of the segment, one softmax, one product with the values.
// Sums are brought to a new largest score only where a sequence has several segments. Tiles and segments start at fixed
// positions of the sequence, so a row's result depends on its sequence alone, not on the batch or the threads.
#pragma once

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

// Where one thread's working memory lies. Rows are those of a tile.
struct VarlenScratch {
    uint8_t* keys;    // per 64 keys: [words, 64]
    uint8_t* values;  // per 64 columns of D: [key words, width]
    char* queries;    // [rows, depth] of the dot's elements
    float* scores;    // per 64 keys of the segment: [rows, 64]
    char* probs;      // [rows, kVarlenKeys] of the dot's elements
    float* out;       // per 64 columns of D: [rows, 64]
    float* top;       // [rows] largest score so far, as a power of two
    float* sum;       // [rows]
};

class VarlenAttention {
public:
    VarlenAttention(const VarlenArgs& args, uint8_t* scratch, TileShape& tiles)
        : args_(args), pairs_(kHasBf16Dot && args.type == DType::bf16), element_(pairs_ ? 2 : 4),
          depth_(round_up(args.head_size, 32)), columns_(round_up(args.head_size, kColumnMultiple)) {
        place(scratch);
        product_ = PanelProduct{&kernels_of<FloatF32, false, kMaxRows>(), nullptr, &kNoWeight, &tiles};
#if defined(__AVX512BF16__)
        if (pairs_) {
            product_.kernels = &kernels_of<PairBf16, false, kMaxRows>();
#ifdef FASTSERVE_TILES
            product_.tile_kernel = tile_kernel<PairBf16, false>;
#endif
        }
#endif
    }

    // Query tiles [tiles.begin, tiles.end) of one head of one sequence.
    void attend(int64_t sequence, int64_t head, Range tiles) {
        const int64_t kv_head = head / (args_.num_heads / args_.num_kv_heads);
        if (sequence != sequence_ || kv_head != kv_head_) {
            sequence_ = sequence, kv_head_ = kv_head;
            first_key_ = args_.key_starts[sequence];
            num_keys_ = args_.key_starts[sequence + 1] - first_key_;
            load_keys();
            load_values();
        }
        const int64_t first = args_.query_starts[sequence], queries = args_.query_starts[sequence + 1] - first;
        for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
            const int64_t begin = tile * kVarlenRows;
            head_ = head, rows_ = min_of(kVarlenRows, queries - begin);
            first_row_ = first + begin;
            first_position_ = num_keys_ - queries + begin;
            attend_tile();
        }
    }

private:
    void place(uint8_t* base) {
        const int64_t keys = longest(args_), padded = round_up(columns_, kPanelColumns);
        auto take = [&](int64_t bytes) {
            uint8_t* here = base;
            base += round_up(bytes, 64);
            return here;
        };
        s_.keys = take(keys * depth_ * element_);
        s_.values = take(keys * padded * element_);
        s_.queries = reinterpret_cast<char*>(take(kVarlenRows * depth_ * element_));
        s_.scores = reinterpret_cast<float*>(take(kVarlenRows * kVarlenKeys * 4));
        s_.probs = reinterpret_cast<char*>(take(kVarlenRows * kVarlenKeys * element_));
        s_.out = reinterpret_cast<float*>(take(kVarlenRows * padded * 4));
        s_.top = reinterpret_cast<float*>(take(kVarlenRows * 4));
        s_.sum = reinterpret_cast<float*>(take(kVarlenRows * 4));
    }

    const char* row_of(const void* x, int64_t row, int64_t stride, int64_t head, int64_t head_stride) const {
        return static_cast<const char*>(x) + (row * stride + head * head_stride) * element_bytes(args_.type);
    }
    const char* key(int64_t i) const {
        return row_of(args_.keys, first_key_ + i, args_.key_stride, kv_head_, args_.key_head_stride);
    }
    const char* value(int64_t i) const {
        return row_of(args_.values, first_key_ + i, args_.value_stride, kv_head_, args_.value_head_stride);
    }

    // One head of one token as the dot's elements: `depth_` of them, zeros past its end.
    void widen(const char* from, char* to) const {
        if (element_ == element_bytes(args_.type)) {
            const int64_t bytes = args_.head_size * element_;
            std::memcpy(to, from, bytes);
            std::memset(to + bytes, 0, depth_ * element_ - bytes);
            return;
        }
        for (int64_t i = 0; i < depth_; i += W) {
            const int64_t left = args_.head_size - i;
            f_store(reinterpret_cast<float*>(to) + i, left > 0 ? load_lanes(from, args_.type, i, left) : f_zero());
        }
    }

    void load_keys() {
        const int64_t words = depth_ * element_ / 4, padded = round_up(num_keys_, kPanelColumns);
        uint32_t* panels = reinterpret_cast<uint32_t*>(s_.keys);
        alignas(64) char rows[16][kVarlenRowBytes];
        const bool is_direct = element_ == element_bytes(args_.type) && args_.head_size == depth_;
        for (int64_t first = 0; first < padded; first += 16) {
            uint32_t* to = panels + first / kPanelColumns * words * kPanelColumns + first % kPanelColumns;
            const char* from[16];
            for (int i = 0; i < 16; ++i) {
                from[i] = rows[i];
                if (first + i >= num_keys_) std::memset(rows[i], 0, 4 * words);
                else if (is_direct) from[i] = key(first + i);
                else widen(key(first + i), rows[i]);
                if (first + 16 + i < num_keys_) fetch(key(first + 16 + i));
            }
            if (kHasTranspose) {
                for (int64_t word = 0; word < words; word += 16) {
                    transpose_words(from, word, to + word * kPanelColumns, kPanelColumns);
                }
                continue;
            }
            for (int64_t word = 0; word < words; ++word) {
                for (int i = 0; i < 16; ++i) std::memcpy(to + word * kPanelColumns + i, from[i] + 4 * word, 4);
            }
        }
    }

    void fetch(const char* row) const {
        for (int64_t byte = 0; byte < args_.head_size * element_bytes(args_.type); byte += 64) __builtin_prefetch(row + byte);
    }

    int64_t keys_per_word() const { return pairs_ ? 2 : 1; }
    int64_t value_words() const { return round_up(num_keys_, 32) / keys_per_word(); }
    int64_t panel_width(int64_t panel) const { return min_of(kPanelColumns, columns_ - panel * kPanelColumns); }

    void load_values() {
        for (int64_t word = 0; word < value_words(); ++word) {
            const int64_t first = word * keys_per_word(), second = first + 1;
            const char* a = first < num_keys_ ? value(first) : nullptr;
            const char* b = pairs_ && second < num_keys_ ? value(second) : nullptr;
            for (int64_t i = first + 16; i < min_of(first + 16 + keys_per_word(), num_keys_); ++i) fetch(value(i));
            for (int64_t column = 0; column < columns_;) {
                const int64_t panel = column / kPanelColumns, width = panel_width(panel), left = args_.head_size - column;
                uint8_t* to = s_.values + (panel * value_words() * kPanelColumns + word * width + column % kPanelColumns) * 4;
#if defined(__AVX512BF16__)
                if (pairs_ && left >= 2 * W) {
                    I low, high;
                    interleave_halves(a ? i_load(a + 2 * column) : i_zero(), b ? i_load(b + 2 * column) : i_zero(), low, high);
                    i_store(to, low);
                    i_store(to + 4 * W, high);
                    column += 2 * W;
                    continue;
                }
#endif
                I bits = i_bits(value_lanes(a, column, left));
                if (pairs_) bits = i_or(i_shr<16>(bits), i_bits(value_lanes(b, column, left)));
                i_store(to, bits);
                column += W;
            }
        }
    }

    FASTSERVE_INLINE F value_lanes(const char* row, int64_t column, int64_t left) const {
        return row && left > 0 ? load_lanes(row, args_.type, column, left) : f_zero();
    }

    // Keys that some row of the tile sees, from a fixed place on.
    Range visible() const {
        if (!args_.window) return {0, num_keys_};
        const int64_t first = max_of(0, first_position_ - args_.window + 1);
        return {first / kPanelColumns * kPanelColumns, min_of(num_keys_, first_position_ + rows_ - 1 + args_.window)};
    }

    void attend_tile() {
        for (int64_t row = 0; row < rows_; ++row) {
            widen(row_of(args_.query, first_row_ + row, args_.query_stride, head_, args_.query_head_stride),
                  s_.queries + row * depth_ * element_);
            s_.top[row] = kNever, s_.sum[row] = 0.0f;
        }
        const Range keys = visible();
        for (int64_t first = keys.begin; first < keys.end; first += kVarlenKeys) {
            attend_segment(first, min_of(kVarlenKeys, keys.end - first), first > keys.begin);
        }
        write();
    }

    void attend_segment(int64_t first, int64_t keys, bool is_later) {
        const int64_t words = depth_ * element_ / 4, prob_bytes = kVarlenKeys * element_;
        for (int64_t key = 0; key < keys; key += kPanelColumns) {
            product_.run(s_.keys + (first + key) * words * 4, kPanelColumns, words, s_.queries, depth_ * element_,
                         s_.scores + key * rows_, rows_, false);
        }
        for (int64_t row = 0; row < rows_; ++row) soften(row, first, keys, is_later);
        // Pieces of panel that stay in the L1 cache while all rows pass over them.
        const int64_t first_word = first / keys_per_word(), count = round_up(keys, 32) / keys_per_word();
        for (int64_t panel = 0; panel < ceil_div(columns_, kPanelColumns); ++panel) {
            const int64_t width = panel_width(panel);
            const uint8_t* values = s_.values + (panel * value_words() * kPanelColumns + first_word * width) * 4;
            for (int64_t word = 0; word < count; word += kPieceWords) {
                product_.run(values + word * width * 4, width, min_of(kPieceWords, count - word), s_.probs + 4 * word,
                             prob_bytes, s_.out + panel * rows_ * kPanelColumns, rows_, is_later || word > 0);
            }
        }
    }

    // Scores of one row in the segment -> probabilities relative to its largest score so far; zeros where it sees nothing.
    void soften(int64_t row, int64_t first, int64_t keys, bool is_later) {
        int64_t begin = 0, end = keys;
        const int64_t position = first_position_ + row - first;
        if (args_.window) begin = max_of(0, position - args_.window + 1), end = min_of(keys, position + args_.window);
        char* probs = s_.probs + row * kVarlenKeys * element_;
        const int64_t padded = round_up(keys, 32);
        if (begin >= end) {
            std::memset(probs, 0, padded * element_);
            return;
        }
        const int64_t start = begin / W * W, stop = round_up(end, W);
        std::memset(probs, 0, start * element_);
        std::memset(probs + stop * element_, 0, max_of(0, padded - stop) * element_);
        float scale = args_.scale * kLog2E;
        if (args_.bias) {
            const float* bias = args_.bias + head_ * args_.bias_stride + args_.bias_origin - position;
            for_scores(row, start, stop, [&](float* at, int64_t key) {
                f_store(at, f_fma(f_load(at), f_set(args_.scale), load_lanes(bias, DType::f32, key, end - key)));
            });
            scale = kLog2E;
        }
        for (int64_t key = start; key < begin; ++key) *score_at(row, key) = kNever;
        for (int64_t key = end; key < stop; ++key) *score_at(row, key) = kNever;
        F highest = f_set(kNever);
        for_scores(row, start, stop, [&](float* at, int64_t) { highest = f_max(highest, f_load(at)); });
        const float top = max_float(f_largest(highest) * scale, s_.top[row]);
        if (is_later && top > s_.top[row]) rescale(row, s_.top[row] - top);
        s_.top[row] = top;
        const F factor = f_set(scale), shift = f_set(-top);
        const DType type = pairs_ ? DType::bf16 : DType::f32;
        F sum = f_zero();
        for_scores(row, start, stop, [&](float* at, int64_t key) {
            const F p = f_exp2_below(f_fma(f_load(at), factor, shift));
            sum = f_add(sum, p);
            store_as(probs, type, key, p);
        });
        s_.sum[row] += f_sum(sum);
    }

    float* score_at(int64_t row, int64_t key) const {
        return s_.scores + (key / kPanelColumns * rows_ + row) * kPanelColumns + key % kPanelColumns;
    }

    // Calls body(scores, key) for every W keys; start and stop are multiples of W.
    template <class Body> FASTSERVE_INLINE void for_scores(int64_t row, int64_t start, int64_t stop, const Body& body) const {
        for (int64_t key = start; key < stop;) {
            float* at = score_at(row, key);
            for (const int64_t last = min_of(stop, (key / kPanelColumns + 1) * kPanelColumns); key < last; key += W, at += W) {
                body(at, key);
            }
        }
    }

    static float max_float(float a, float b) { return a > b ? a : b; }

    // The row's sums are multiplied by 2^x.
    void rescale(int64_t row, float x) {
        alignas(64) float lanes[W];
        f_store(lanes, f_exp2_below(f_set(x)));
        const float share = lanes[0];
        s_.sum[row] *= share;
        for (int64_t column = 0; column < columns_; column += W) {
            float* out = out_at(row, column);
            f_store(out, f_mul(f_load(out), f_set(share)));
        }
    }

    float* out_at(int64_t row, int64_t column) const {
        return s_.out + (column / kPanelColumns * rows_ + row) * kPanelColumns + column % kPanelColumns;
    }

    void write() {
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t at = ((first_row_ + row) * args_.num_heads + head_) * args_.head_size;
            const F share = f_set(s_.sum[row] > 0.0f ? 1.0f / s_.sum[row] : 0.0f);
            for (int64_t column = 0; column < args_.head_size; column += W) {
                store_lanes(args_.out, args_.type, at + column, args_.head_size - column,
                            f_mul(f_load(out_at(row, column)), share));
            }
        }
    }

    static constexpr int64_t kPieceWords = 128;
    static constexpr float kLog2E = 1.44269504f;

    const VarlenArgs& args_;
    const bool pairs_;        // bfloat16 dots
    const int64_t element_;   // bytes of a query or a probability
    const int64_t depth_;     // D padded for the scores' product
    const int64_t columns_;   // D padded to 16
    VarlenScratch s_{};
    PanelProduct product_{};
    int64_t sequence_ = -1, kv_head_ = -1, first_key_ = 0, num_keys_ = 0;  // whose panels there are
    int64_t head_ = 0, rows_ = 0, first_row_ = 0, first_position_ = 0;     // the tile
};

// Heads of sequences, and where there are few of them parts of a head's queries, are shared out at equal cost.
static void varlen(const VarlenArgs& args, const Worker& worker) {
    TileShape tiles;
    VarlenAttention attention(args, worker.scratch, tiles);
    const int64_t parts = ceil_div(4 * worker.count, max_of(1, args.num_sequences) * args.num_heads);
    int64_t total = 0;
    auto queries_of = [&](int64_t sequence) { return args.query_starts[sequence + 1] - args.query_starts[sequence]; };
    auto keys_of = [&](int64_t sequence) { return args.key_starts[sequence + 1] - args.key_starts[sequence] + 16; };
    for (int64_t i = 0; i < args.num_sequences; ++i) total += args.num_heads * queries_of(i) * keys_of(i);
    CostShare share{max_of(total, 1), 0, worker.count};
    for (int64_t sequence = 0; sequence < args.num_sequences; ++sequence) {
        const int64_t queries = queries_of(sequence), count = ceil_div(queries, kVarlenRows);
        for (int64_t unit = 0; unit < args.num_heads * parts; ++unit) {
            const int64_t part = unit % parts;
            const Range range{count * part / parts, count * (part + 1) / parts};
            const int64_t rows = min_of(range.end * kVarlenRows, queries) - range.begin * kVarlenRows;
            if (rows <= 0) continue;
            if (share.next(rows * keys_of(sequence)) == worker.index) attention.attend(sequence, unit / parts, range);
        }
    }
#ifdef FASTSERVE_TILES
    if (tiles.rows) tile_release();
#endif
}

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

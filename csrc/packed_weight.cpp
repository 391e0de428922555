#include "packed_weight.h"

#include <stdexcept>
#include <string>

#include "sparse_weight.h"
#include "thread_pool.h"

namespace fastserve {

namespace {

constexpr int64_t kMaxIntegerDepth = 66000;  // 127 * 255 * K must fit 31 bits

constexpr int64_t kRowsAtOnce = 16;  // words of a column that are packed together: one cache line of the source

// Position of k (0..7) among the nibbles of a word, see the header.
constexpr int kNibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};

float scale_value(ScaleType type, const void* scales, int64_t index) {
    if (type == ScaleType::f32) return static_cast<const float*>(scales)[index];
    uint16_t bits = static_cast<const uint16_t*>(scales)[index];
    return type == ScaleType::bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

int64_t num_rows(const WeightSource& source) {
    int64_t rows = 0;
    for (const WeightRows& part : source.parts) rows += part.n;
    return rows;
}

void check(const WeightSource& source) {
    const int64_t n = num_rows(source);
    if (n <= 0 || source.k <= 0) throw std::invalid_argument("a weight needs at least one row and one column");
    if (source.gated && n % 2) throw std::invalid_argument("a gated weight needs an even number of rows");
    bool quantised = source.format == Format::u8 || source.format == Format::u4 || source.format == Format::c4;
    const bool has_zeros = source.parts[0].zeros != nullptr;
    for (const WeightRows& part : source.parts) {
        if (quantised && !part.scales) throw std::invalid_argument("a quantised weight needs scales");
        if ((part.zeros != nullptr) != has_zeros) throw std::invalid_argument("all parts or none have zero points");
    }
    if (quantised && source.k > kMaxIntegerDepth) throw std::invalid_argument("a quantised weight has K <= 66000");
    if (source.format == Format::c4 && !source.table) throw std::invalid_argument("a codebook weight needs its table");
    if (source.format == Format::c4 && has_zeros) throw std::invalid_argument("a codebook weight has no zero points");
    if (source.group) {
        bool known = source.group == 32 || source.group == 64 || source.group == 128;
        if (source.format != Format::u4) throw std::invalid_argument("only 4-bit uniform weights have groups");
        if (!known) throw std::invalid_argument("groups are of 32, 64 or 128");
    }
}

typedef uint32_t Words4 __attribute__((vector_size(16)));

Words4 load_words(const uint8_t* from) {
    Words4 words;
    std::memcpy(&words, from, 16);
    return words;
}

// Four columns, kRowsAtOnce words of each: read along the source's rows, written across them.
void transpose(const uint8_t* const* from, int64_t offset, uint8_t* words, int64_t word_row) {
    for (int64_t i = 0; i < kRowsAtOnce; i += 4) {
        const Words4 a = load_words(from[0] + offset + 4 * i), b = load_words(from[1] + offset + 4 * i);
        const Words4 c = load_words(from[2] + offset + 4 * i), d = load_words(from[3] + offset + 4 * i);
        const Words4 low_ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), high_ab = __builtin_shufflevector(a, b, 2, 6, 3, 7);
        const Words4 low_cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), high_cd = __builtin_shufflevector(c, d, 2, 6, 3, 7);
        const Words4 rows[4] = {__builtin_shufflevector(low_ab, low_cd, 0, 1, 4, 5),
                                __builtin_shufflevector(low_ab, low_cd, 2, 3, 6, 7),
                                __builtin_shufflevector(high_ab, high_cd, 0, 1, 4, 5),
                                __builtin_shufflevector(high_ab, high_cd, 2, 3, 6, 7)};
        for (int64_t j = 0; j < 4; ++j) std::memcpy(words + (i + j) * word_row, &rows[j], 16);
    }
}

// Eight values of one byte each -> a word, in the order of kNibble.
uint32_t pack_eight(const uint8_t* values) {
    uint64_t bytes;
    std::memcpy(&bytes, values, 8);
    auto gather = [](uint64_t lanes) {  // the lowest four bits of four 16-bit lanes, side by side
        lanes = (lanes | lanes >> 12) & 0x000000ff000000ffull;
        return static_cast<uint32_t>((lanes | lanes >> 24) & 0xffffu);
    };
    const uint64_t even = bytes & 0x000f000f000f000full, odd = (bytes >> 8) & 0x000f000f000f000full;
    return gather(even) | gather(odd) << 16;
}

class Packer {
public:
    Packer(const WeightSource& source, PackedWeight& packed)
        : source_(source), packed_(packed), depth_(packed.depth_per_word()),
          value_bytes_(packed.format == Format::f32 ? 4 : packed.format == Format::bf16 ? 2 : 1) {}

    void pack_panel(int64_t panel) {
        const int64_t width = packed_.panel_columns(panel);
        find_rows(panel, width);
        uint8_t* base = packed_.data.data() + panel * packed_.panel_bytes;
        for (int64_t g = 0; g < packed_.groups; ++g) {
            uint8_t* block = base + packed_.group_offset(g, width);
            const int64_t first = g * packed_.group, last = min_of(first + packed_.group, packed_.k_padded);
            for (int64_t column = 0; packed_.is_scaled() && column < width; ++column) {
                write_header(block, g, column, width);
            }
            // A few word rows at a time, so that a column's writes stay in the cache until its neighbours' arrive.
            uint8_t* words = block + packed_.header_bytes(width);
            for (int64_t k = first; k < last; k += kRowsAtOnce * depth_, words += kRowsAtOnce * width * 4) {
                write_word_rows(words, k, min_of(k + kRowsAtOnce * depth_, last), width);
            }
        }
    }

private:
    // Where the panel's columns come from: null for padding.
    void find_rows(int64_t panel, int64_t width) {
        for (int64_t column = 0; column < width; ++column) {
            int64_t row = packed_.source_row(panel * kPanelColumns + column);
            values_[column] = nullptr;
            if (row < 0) continue;
            const WeightRows* part = source_.parts.data();
            for (; row >= part->n; ++part) row -= part->n;
            values_[column] = static_cast<const uint8_t*>(part->values) + row * packed_.k * value_bytes_;
            parts_[column] = part;
            rows_[column] = row;
        }
    }

    void write_header(uint8_t* block, int64_t g, int64_t column, int64_t width) {
        const int64_t size = packed_.scale_bytes(), groups = source_.group ? ceil_div(source_.k, source_.group) : 1;
        const bool real = values_[column] && g < groups;
        const int64_t at = real ? rows_[column] * groups + g : 0;
        if (real) {
            std::memcpy(block + column * size, static_cast<const uint8_t*>(parts_[column]->scales) + at * size, size);
        } else {
            std::memset(block + column * size, 0, size);
        }
        if (packed_.has_zeros) block[width * size + column] = real ? parts_[column]->zeros[at] : 0;
    }

    void write_word_rows(uint8_t* words, int64_t first, int64_t last, int64_t width) {
        const bool whole = last <= packed_.k;
        const bool square = whole && depth_ < 8 && last - first == kRowsAtOnce * depth_;
        for (int64_t column = 0; column < width; column += 4) {
            const uint8_t* const* from = values_ + column;
            if (square && from[0] && from[1] && from[2] && from[3]) {
                transpose(from, first * value_bytes_, words + column * 4, width * 4);
                continue;
            }
            for (int64_t i = 0; i < 4; ++i) write_column(words + (column + i) * 4, from[i], first, last, width, whole);
        }
    }

    void write_column(uint8_t* words, const uint8_t* row, int64_t first, int64_t last, int64_t width, bool whole) {
        for (int64_t k = first; k < last; k += depth_, words += width * 4) {
            uint32_t word = 0;
            if (row && whole && depth_ < 8) {
                std::memcpy(&word, row + k * value_bytes_, 4);
            } else if (row && whole) {
                word = pack_eight(row + k);
            } else {
                for (int64_t i = 0; i < depth_; ++i) word |= field(row, k + i, static_cast<int>(i));
            }
            std::memcpy(words, &word, 4);
        }
    }

    // Value k of a row in its place within the word; past the end, what stands for zero.
    uint32_t field(const uint8_t* row, int64_t k, int i) const {
        const bool real = row && k < packed_.k;
        uint32_t bits = 0;
        if (real) std::memcpy(&bits, row + k * value_bytes_, value_bytes_);
        if (packed_.format == Format::f32) return bits;
        if (packed_.format == Format::bf16) return bits << (16 * i);
        if (packed_.format == Format::u8) return (real ? bits : 128u) << (8 * i);
        return (real ? bits & 15u : 8u) << (4 * kNibble[i]);
    }

    const WeightSource& source_;
    PackedWeight& packed_;
    const int64_t depth_, value_bytes_;
    const uint8_t* values_[kPanelColumns];
    const WeightRows* parts_[kPanelColumns];
    int64_t rows_[kPanelColumns];
};

// The same of a sparse weight: all values before the column's are counted.
void read_sparse_column(const PackedWeight& weight, int64_t column, float* out) {
    const int64_t panel = column / kPanelColumns, within = column % kPanelColumns;
    alignas(64) uint32_t words[kPanelColumns];
    const uint16_t* values = nullptr;
    for (int64_t k = 0; k < weight.k; k += 2) {
        values = expand(weight, panel, k / 2, 1, values, reinterpret_cast<uint8_t*>(words));
        for (int64_t i = 0; i < min_of(2, weight.k - k); ++i) {
            out[k + i] = bf16_to_f32(static_cast<uint16_t>(words[within] >> (16 * i)));
        }
    }
}

// One packed column as floats [k].
void read_column(const PackedWeight& weight, int64_t column, float* out) {
    if (weight.format == Format::sparse) return read_sparse_column(weight, column, out);
    const int64_t depth = weight.depth_per_word(), panel = column / kPanelColumns, within = column % kPanelColumns;
    const int64_t width = weight.panel_columns(panel);
    for (int64_t g = 0; g < weight.groups; ++g) {
        const uint8_t* block = weight.panel(panel) + weight.group_offset(g, width);
        const uint8_t* at = block + weight.header_bytes(width) + within * 4;
        const int64_t end = min_of((g + 1) * weight.group, weight.k);
        const float scale = weight.is_scaled() ? scale_value(weight.scale_type, block, within) : 1.0f;
        int zero = weight.format == Format::u8 ? 128 : 8;
        if (weight.has_zeros) zero = block[width * weight.scale_bytes() + within];
        for (int64_t k = g * weight.group; k < end; k += depth, at += width * 4) {
            uint32_t word;
            std::memcpy(&word, at, 4);
            for (int i = 0; i < min_of(depth, end - k); ++i) {
                float& value = out[k + i];
                if (weight.format == Format::f32) {
                    std::memcpy(&value, &word, 4);
                } else if (weight.format == Format::bf16) {
                    value = bf16_to_f32(static_cast<uint16_t>(word >> (16 * i)));
                } else {
                    const int q = weight.format == Format::u8 ? (word >> (8 * i)) & 255u : (word >> (4 * kNibble[i])) & 15u;
                    value = scale * (weight.format == Format::c4 ? weight.table[q] : static_cast<float>(q - zero));
                }
            }
        }
    }
}

}  // namespace

const PackedWeight kNoWeight{};

int64_t PackedWeight::source_row(int64_t column) const {
    if (!gated) return column < n ? column : -1;
    int64_t panel = column / kPanelColumns, within = column % kPanelColumns;
    int64_t half = panel_columns(panel) / 2;
    int64_t out = panel * (kPanelColumns / 2) + within % half;
    if (out >= n / 2) return -1;
    return within < half ? out : n / 2 + out;
}

std::unique_ptr<PackedWeight> pack(const WeightSource& source, ThreadPool& pool) {
    check(source);
    auto packed = std::make_unique<PackedWeight>();
    packed->format = source.format;
    packed->gated = source.gated;
    packed->has_zeros = source.parts[0].zeros != nullptr;
    packed->scale_type = source.scale_type;
    packed->n = num_rows(source);
    packed->k = source.k;
    packed->k_padded = round_up(source.k, kDepthMultiple);
    packed->columns = source.gated ? 2 * round_up(packed->n / 2, kColumnMultiple) : round_up(packed->n, kColumnMultiple);
    packed->panels = ceil_div(packed->columns, kPanelColumns);
    packed->group = source.group ? source.group : packed->k_padded;
    packed->groups = ceil_div(packed->k_padded, packed->group);
    int64_t words = packed->k_padded / packed->depth_per_word() * kPanelColumns * 4;
    packed->panel_bytes = packed->groups * packed->header_bytes(kPanelColumns) + words;
    packed->data = Buffer(packed->panels * packed->panel_bytes);
    packed->base = packed->data.data();
    if (source.table) std::memcpy(packed->table, source.table, sizeof(packed->table));
    if (source.bias) {
        packed->bias_data = Buffer(packed->columns * 4);
        float* bias = reinterpret_cast<float*>(packed->bias_data.data());
        packed->bias = bias;
        for (int64_t column = 0; column < packed->columns; ++column) {
            int64_t row = packed->source_row(column);
            if (row >= 0) bias[column] = source.bias[row];
        }
    }
    pool.run({}, [&](const Worker& worker) {
        Packer packer(source, *packed);
        Range range = share_of(packed->panels, worker.index, worker.count);
        for (int64_t panel = range.begin; panel < range.end; ++panel) packer.pack_panel(panel);
    });
    return packed;
}

void unpack(const PackedWeight& weight, float* out) {
    for (int64_t column = 0; column < weight.columns; ++column) {
        const int64_t row = weight.source_row(column);
        if (row >= 0) read_column(weight, column, out + row * weight.k);
    }
}

void look_up(const PackedWeight& weight, const int64_t* ids, int64_t count, float scale, void* out, DType type, const Worker& worker) {
    const Range range = share_of(count, worker.index, worker.count);
    float* wide = reinterpret_cast<float*>(worker.scratch);  // [k]
    for (int64_t i = range.begin; i < range.end; ++i) {
        float* row = type == DType::f32 ? static_cast<float*>(out) + i * weight.k : wide;
        read_column(weight, ids[i], row);
        for (int64_t k = 0; k < weight.k && scale != 1.0f; ++k) row[k] *= scale;
        if (type == DType::f32) continue;
        uint16_t* narrow = static_cast<uint16_t*>(out) + i * weight.k;
        for (int64_t k = 0; k < weight.k; ++k) narrow[k] = f32_to_bf16(row[k]);
    }
}

}  // namespace fastserve

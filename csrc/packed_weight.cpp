#include "packed_weight.h"

#include <stdexcept>
#include <string>

#include "thread_pool.h"

namespace fastserve {

namespace {

constexpr int64_t kMaxIntegerDepth = 66000;  // 127 * 255 * K must fit 31 bits

constexpr int64_t kRowsAtOnce = 16;

// Position of k (0..7) among the nibbles of a word, see the header.
constexpr int kNibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};

float scale_value(ScaleType type, const void* scales, int64_t index) {
    if (type == ScaleType::f32) return static_cast<const float*>(scales)[index];
    uint16_t bits = static_cast<const uint16_t*>(scales)[index];
    return type == ScaleType::bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

void check(const WeightSource& source) {
    if (source.n <= 0 || source.k <= 0) throw std::invalid_argument("a weight needs at least one row and one column");
    if (source.gated && source.n % 2) throw std::invalid_argument("a gated weight needs an even number of rows");
    bool quantised = source.format == Format::u8 || source.format == Format::u4 || source.format == Format::c4;
    if (quantised && !source.scales) throw std::invalid_argument("a quantised weight needs scales");
    if (quantised && source.k > kMaxIntegerDepth) throw std::invalid_argument("a quantised weight has K <= 66000");
    if (source.format == Format::c4 && !source.table) throw std::invalid_argument("a codebook weight needs its table");
    if (source.format == Format::c4 && source.zeros) throw std::invalid_argument("a codebook weight has no zero points");
    if (source.group) {
        bool known = source.group == 32 || source.group == 64 || source.group == 128;
        if (source.format != Format::u4) throw std::invalid_argument("only 4-bit uniform weights have groups");
        if (!known) throw std::invalid_argument("groups are of 32, 64 or 128");
    }
}

class Packer {
public:
    Packer(const WeightSource& source, PackedWeight& packed) : source_(source), packed_(packed) {}

    void pack_panel(int64_t panel) {
        const int64_t width = packed_.panel_columns(panel), depth = packed_.depth_per_word();
        uint8_t* base = packed_.data.data() + panel * packed_.panel_bytes;
        for (int64_t g = 0; g < packed_.groups; ++g) {
            uint8_t* block = base + packed_.group_offset(g, width);
            const int64_t first = g * packed_.group, last = min_of(first + packed_.group, packed_.k_padded);
            for (int64_t column = 0; packed_.is_scaled() && column < width; ++column) {
                write_header(block, packed_.source_row(panel * kPanelColumns + column), g, column, width);
            }
            // A few word rows at a time, so that a column's writes stay in the cache until its neighbours' arrive.
            uint8_t* words = block + packed_.header_bytes(width);
            for (int64_t k = first; k < last; k += kRowsAtOnce * depth, words += kRowsAtOnce * width * 4) {
                const int64_t end = min_of(k + kRowsAtOnce * depth, last);
                for (int64_t column = 0; column < width; ++column) {
                    const int64_t row = packed_.source_row(panel * kPanelColumns + column);
                    write_words(words + column * 4, row, k, end, width);
                }
            }
        }
    }

private:
    void write_header(uint8_t* block, int64_t row, int64_t g, int64_t column, int64_t width) {
        int64_t size = packed_.scale_bytes();
        bool real = row >= 0 && g < source_groups();
        if (real) {
            const uint8_t* scale = static_cast<const uint8_t*>(source_.scales) + (row * source_groups() + g) * size;
            std::memcpy(block + column * size, scale, size);
        } else {
            std::memset(block + column * size, 0, size);
        }
        if (packed_.has_zeros) block[width * size + column] = real ? source_.zeros[row * source_groups() + g] : 0;
    }

    void write_words(uint8_t* words, int64_t row, int64_t first, int64_t last, int64_t width) {
        const int64_t depth = packed_.depth_per_word();
        const bool real = row >= 0 && last <= packed_.k;
        const int64_t bytes = packed_.format == Format::f32 ? 4 : packed_.format == Format::bf16 ? 2 : 1;
        const uint8_t* from = real ? static_cast<const uint8_t*>(source_.values) + (row * source_.row_stride + first) * bytes
                                   : nullptr;
        for (int64_t k = first; k < last; k += depth, words += width * 4) {
            uint32_t word = 0;
            if (real && depth < 8) {
                std::memcpy(&word, from, 4);
                from += 4;
            } else if (real) {
                for (int i = 0; i < 8; ++i) word |= static_cast<uint32_t>(from[i] & 15u) << (4 * kNibble[i]);
                from += 8;
            } else {
                for (int64_t i = 0; i < depth; ++i) word |= field(row, k + i, static_cast<int>(i));
            }
            std::memcpy(words, &word, 4);
        }
    }

    // Value (row, k) in its place within the word.
    uint32_t field(int64_t row, int64_t k, int i) const {
        bool real = row >= 0 && k < packed_.k;
        int64_t at = row * source_.row_stride + k;
        switch (packed_.format) {
            case Format::f32: {
                uint32_t bits = 0;
                if (real) std::memcpy(&bits, static_cast<const float*>(source_.values) + at, 4);
                return bits;
            }
            case Format::bf16:
                return real ? static_cast<uint32_t>(static_cast<const uint16_t*>(source_.values)[at]) << (16 * i) : 0;
            case Format::u8:
                return static_cast<uint32_t>(real ? static_cast<const uint8_t*>(source_.values)[at] : 128) << (8 * i);
            default: {
                uint32_t q = real ? static_cast<const uint8_t*>(source_.values)[at] & 15u : 8u;
                return q << (4 * kNibble[i]);
            }
        }
    }

    int64_t source_groups() const { return source_.group ? ceil_div(source_.k, source_.group) : 1; }

    const WeightSource& source_;
    PackedWeight& packed_;
};

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
    packed->has_zeros = source.zeros != nullptr;
    packed->scale_type = source.scale_type;
    packed->n = source.n;
    packed->k = source.k;
    packed->k_padded = round_up(source.k, kDepthMultiple);
    packed->columns = source.gated ? 2 * round_up(source.n / 2, kColumnMultiple) : round_up(source.n, kColumnMultiple);
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
    int64_t depth = weight.depth_per_word();
    for (int64_t column = 0; column < weight.columns; ++column) {
        int64_t row = weight.source_row(column);
        if (row < 0) continue;
        int64_t panel = column / kPanelColumns, within = column % kPanelColumns, width = weight.panel_columns(panel);
        for (int64_t k = 0; k < weight.k; ++k) {
            int64_t g = k / weight.group;
            const uint8_t* block = weight.panel(panel) + weight.group_offset(g, width);
            const uint8_t* at = block + weight.header_bytes(width) + ((k % weight.group) / depth * width + within) * 4;
            uint32_t word;
            std::memcpy(&word, at, 4);
            int i = static_cast<int>(k % depth);
            float value;
            if (weight.format == Format::f32) {
                std::memcpy(&value, &word, 4);
            } else if (weight.format == Format::bf16) {
                value = bf16_to_f32(static_cast<uint16_t>(word >> (16 * i)));
            } else {
                int q = weight.format == Format::u8 ? (word >> (8 * i)) & 255u : (word >> (4 * kNibble[i])) & 15u;
                int zero = weight.format == Format::u8 ? 128 : 8;
                if (weight.has_zeros) zero = block[width * weight.scale_bytes() + within];
                float scale = scale_value(weight.scale_type, block, within);
                value = scale * (weight.format == Format::c4 ? weight.table[q] : static_cast<float>(q - zero));
            }
            out[row * weight.k + k] = value;
        }
    }
}

}  // namespace fastserve

// Activations in the form that a matrix product reads: padded along K, widened or quantised where needed.
#pragma once

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

struct Prepared {
    const char* data;     // [rows, k_padded]
    int64_t stride;       // bytes
    const char* sums;     // [rows, groups]: sum of the activations of each group, int32 or float
    const float* scales;  // [rows], quantised activations; else null
};

// One row as floats, in pieces of W; the last is padded with zeros.
static inline F load_x(const LinearArgs& args, int64_t row, int64_t k) {
    return load_lanes(args.x, args.x_type, row * args.x_stride + k, args.weight->k - k);
}

typedef int8_t Bytes16 __attribute__((vector_size(16)));

// Sixteen quantised activations in the order that four-bit words want them.
static inline void reorder_u4(int8_t* bytes) {
    const Bytes16 order = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
    Bytes16 v;
    std::memcpy(&v, bytes, 16);
    v = __builtin_shuffle(v, order);
    std::memcpy(bytes, &v, 16);
}

// Symmetric 8-bit, one scale per row: the largest magnitude becomes 127. A row with a NaN or an infinity is zeros with the
// scale NaN, so that its outputs are NaN.
template <DType Type>
static float quantize_row(const LinearArgs& args, int64_t row, int8_t* out, int32_t* sums) {
    const PackedWeight& weight = *args.weight;
    const int64_t first = row * args.x_stride, whole = weight.k / W * W;
    I largest = i_zero(), second = i_zero();
    int64_t at = 0;
    for (; at + 2 * W <= whole; at += 2 * W) {
        largest = larger_magnitude(largest, load_as_float(args.x, Type, first + at));
        second = larger_magnitude(second, load_as_float(args.x, Type, first + at + W));
    }
    for (; at < weight.k; at += W) largest = larger_magnitude(largest, load_x(args, row, at));
    const float top = top_magnitude(i_max(largest, second));
    if (top != top) {
        std::memset(out, 0, weight.k_padded);
        std::memset(sums, 0, weight.groups * 4);
        return top;
    }
    const float scale = top > 0.0f ? top / 127.0f : 1.0f;
    const F inverse = f_set(1.0f / scale);
    const bool reorder = weight.format == Format::u4;
    for (int64_t g = 0; g < weight.groups; ++g) {
        I sum = i_zero();
        const int64_t end = min_of((g + 1) * weight.group, weight.k_padded);
        for (int64_t k = g * weight.group; k < end; k += 16) {
            for (int64_t i = k; i < k + 16; i += W) {
                F value = i + W <= whole ? load_as_float(args.x, Type, first + i)
                          : i < weight.k ? load_x(args, row, i)
                                         : f_zero();
                I rounded = i_round(f_mul(value, inverse));
                sum = i_add(sum, rounded);
                i_store_s8(out + i, rounded);
            }
            if (reorder) reorder_u4(out + k);
        }
        sums[g] = i_sum(sum);
    }
    return scale;
}

static void widen_row(const LinearArgs& args, int64_t row, float* out) {
    for (int64_t k = 0; k < args.weight->k_padded; k += W) {
        f_store(out + k, k < args.weight->k ? load_x(args, row, k) : f_zero());
    }
}

static void sum_row(const LinearArgs& args, int64_t row, float* sums) {
    const PackedWeight& weight = *args.weight;
    for (int64_t g = 0; g < weight.groups; ++g) {
        F total = f_zero();
        const int64_t end = min_of((g + 1) * weight.group, weight.k);
        for (int64_t k = g * weight.group; k < end; k += W) total = f_add(total, load_x(args, row, k));
        sums[g] = f_sum(total);
    }
}

// Every thread prepares a few rows for itself, many rows are shared out and waited for.
static Prepared prepare(const LinearArgs& args, const Recipe& recipe, const Worker& worker) {
    const PackedWeight& weight = *args.weight;
    const bool needs_sums = weight.has_zeros || recipe.path == Path::bytes;
    const DType wanted = recipe.path == Path::floats ? DType::f32 : DType::bf16;
    const bool copies = recipe.path == Path::bytes || args.x_type != wanted || weight.k != weight.k_padded;
    Prepared x{static_cast<const char*>(args.x), args.x_stride * element_bytes(args.x_type), nullptr, nullptr};
    if (!needs_sums && !copies) return x;

    const bool shared = args.rows > kPrivateRows;
    uint8_t* base = shared ? worker.shared
                           : worker.scratch + kChunkRows * kPanelColumns * 4 + kSegmentWords * kPanelColumns * 4;
    float* scales = reinterpret_cast<float*>(base);
    char* sums = reinterpret_cast<char*>(base + round_up(args.rows * 4, 64));
    char* data = sums + round_up(args.rows * weight.groups * 4, 64);
    const int64_t stride = weight.k_padded * recipe.element;
    const Range rows = shared ? share_of(args.rows, worker.index, worker.count) : Range{0, args.rows};
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        char* out = data + row * stride;
        char* row_sums = sums + row * weight.groups * 4;
        if (recipe.path == Path::bytes) {
            auto quantize = args.x_type == DType::f32 ? quantize_row<DType::f32> : quantize_row<DType::bf16>;
            scales[row] = quantize(args, row, reinterpret_cast<int8_t*>(out), reinterpret_cast<int32_t*>(row_sums));
            continue;
        }
        if (needs_sums) sum_row(args, row, reinterpret_cast<float*>(row_sums));
        if (!copies) continue;
        if (recipe.path == Path::floats) {
            widen_row(args, row, reinterpret_cast<float*>(out));
        } else {
            std::memcpy(out, static_cast<const uint16_t*>(args.x) + row * args.x_stride, weight.k * 2);
            std::memset(out + weight.k * 2, 0, (weight.k_padded - weight.k) * 2);
        }
    }
    if (shared) worker.barrier();
    if (needs_sums) x.sums = sums;
    if (copies) x.data = data, x.stride = stride;
    if (recipe.path == Path::bytes) x.scales = scales;
    return x;
}

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

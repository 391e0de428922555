// Norms, rotation, cache writes, activations, argmax: operations that move each value once.
//
// Rows are shared out among the threads; a row is computed by one thread in one order.
#pragma once

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

// Rounded as a store and a load in `type` would: the reference rounds a norm before it multiplies by the weight.
static FASTSERVE_INLINE F f_rounded(F v, DType type) {
    if (type == DType::f32) return v;
    I bits = i_bits(v);
    I odd = i_and(i_shr<16>(bits), i_set(1));
    return f_bits(i_and(i_add(bits, i_add(odd, i_set(0x7fff))), i_set(static_cast<int>(0xffff0000u))));
}

template <DType Type>
static void norm_of(const NormArgs& args, const Worker& worker) {
    const Range rows = share_of(args.outer * args.inner, worker.index, worker.count);
    const int64_t size = args.size;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const int64_t at = row / args.inner * args.outer_stride + row % args.inner * args.inner_stride;
        F total = f_zero();
        float mean = 0.0f;
        if (args.subtract_mean) {
            for (int64_t i = 0; i < size; i += W) total = f_add(total, load_lanes(args.x, Type, at + i, size - i));
            mean = f_sum(total) / static_cast<float>(size);
            total = f_zero();
        }
        for (int64_t i = 0; i < size; i += W) {
            F value = load_lanes(args.x, Type, at + i, size - i);
            // Lanes past the end are 0 and must stay so.
            if (args.subtract_mean) {
                value = f_sub(value, f_set(mean));
                if (size - i < W) {
                    alignas(64) float lanes[W];
                    f_store(lanes, value);
                    for (int64_t lane = size - i; lane < W; ++lane) lanes[lane] = 0.0f;
                    value = f_load(lanes);
                }
            }
            total = f_fma(value, value, total);
        }
        const float scale = 1.0f / __builtin_sqrtf(f_sum(total) / static_cast<float>(size) + args.epsilon);
        for (int64_t i = 0; i < size; i += W) {
            F value = load_lanes(args.x, Type, at + i, size - i);
            F weight = load_lanes(args.weight, Type, i, size - i);
            if (args.subtract_mean) {
                value = f_mul(f_mul(f_sub(value, f_set(mean)), f_set(scale)), weight);
                if (args.bias) value = f_add(value, load_lanes(args.bias, Type, i, size - i));
            } else {
                value = f_mul(f_rounded(f_mul(value, f_set(scale)), Type), weight);
            }
            store_lanes(args.out, Type, row * size + i, size - i, value);
        }
    }
}

static void norm(const NormArgs& args, const Worker& worker) {
    args.type == DType::f32 ? norm_of<DType::f32>(args, worker) : norm_of<DType::bf16>(args, worker);
}

template <DType Type>
static void rope_of(const RopeArgs& args, const Worker& worker) {
    const Range rows = share_of(args.tokens * args.heads, worker.index, worker.count);
    const int64_t half = args.half, rotated = 2 * half;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const int64_t token = row / args.heads;
        const int64_t at = token * args.token_stride + row % args.heads * args.head_stride, to = row * args.size;
        for (int64_t i = 0; i < half; i += W) {
            const int64_t left = half - i;
            F first = load_lanes(args.x, Type, at + i, left), second = load_lanes(args.x, Type, at + half + i, left);
            F c = load_lanes(args.cos, Type, token * half + i, left);
            F s = load_lanes(args.sin, Type, token * half + i, left);
            // Each product is rounded before the sum, as the reference's tensors are.
            F a = f_sub(f_rounded(f_mul(first, c), Type), f_rounded(f_mul(second, s), Type));
            F b = f_add(f_rounded(f_mul(second, c), Type), f_rounded(f_mul(first, s), Type));
            store_lanes(args.out, Type, to + i, left, a);
            store_lanes(args.out, Type, to + half + i, left, b);
        }
        const int64_t bytes = element_bytes(Type);
        std::memcpy(static_cast<char*>(args.out) + (to + rotated) * bytes,
                    static_cast<const char*>(args.x) + (at + rotated) * bytes, (args.size - rotated) * bytes);
    }
}

static void rope(const RopeArgs& args, const Worker& worker) {
    args.type == DType::f32 ? rope_of<DType::f32>(args, worker) : rope_of<DType::bf16>(args, worker);
}

static void copy_row(const void* from, DType from_type, int64_t at, void* to, DType to_type, int64_t to_at, int64_t size) {
    if (from_type == to_type) {
        const int64_t bytes = element_bytes(from_type);
        std::memcpy(static_cast<char*>(to) + to_at * bytes, static_cast<const char*>(from) + at * bytes, size * bytes);
        return;
    }
    for (int64_t i = 0; i < size; i += W) {
        store_lanes(to, to_type, to_at + i, size - i, load_lanes(from, from_type, at + i, size - i));
    }
}

// One head of one token as bytes with a scale: x = scale * byte, the largest magnitude at 127.
static void store_s8(const StoreArgs& args, const void* x, int64_t at, void* cache, int64_t slot, int64_t head) {
    const int64_t rows = args.block_size * args.heads, row = head * args.block_size + slot % args.block_size;
    char* block = static_cast<char*>(cache) + slot / args.block_size * rows * (args.size + 4);
    F largest = f_zero();
    for (int64_t i = 0; i < args.size; i += W) {
        largest = f_max(largest, f_abs(load_lanes(x, args.type, at + i, args.size - i)));
    }
    const float scale = f_largest(largest) / 127.0f;
    const F divisor = f_set(scale > 0.0f ? scale : 1.0f);
    for (int64_t i = 0; i < args.size; i += W) {
        const I bytes = i_round(f_div(load_lanes(x, args.type, at + i, args.size - i), divisor));
        int8_t narrow[W];
        i_store_s8(narrow, bytes);
        std::memcpy(block + row * args.size + i, narrow, min_of(W, args.size - i));
    }
    std::memcpy(block + rows * args.size + 4 * row, &scale, 4);
}

static void store(const StoreArgs& args, const Worker& worker) {
    const Range rows = share_of(args.tokens * args.heads, worker.index, worker.count);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const int64_t token = row / args.heads, head = row % args.heads;
        const int64_t to = (args.slots[token] * args.heads + head) * args.size;
        if (args.cache_type == DType::s8) {
            store_s8(args, args.key, token * args.key_stride + head * args.key_head_stride, args.keys, args.slots[token], head);
            store_s8(args, args.value, token * args.value_stride + head * args.value_head_stride, args.values,
                     args.slots[token], head);
            continue;
        }
        copy_row(args.key, args.type, token * args.key_stride + head * args.key_head_stride, args.keys, args.cache_type, to,
                 args.size);
        copy_row(args.value, args.type, token * args.value_stride + head * args.value_head_stride, args.values,
                 args.cache_type, to, args.size);
    }
}

template <DType Type>
static void activation_of(const ActivationArgs& args, const Worker& worker) {
    // Pieces of a row, so that one long row is shared out too.
    constexpr int64_t kPiece = 1024;
    const int64_t pieces = ceil_div(args.size, kPiece);
    const Range units = share_of(args.rows * pieces, worker.index, worker.count);
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
        const int64_t row = unit / pieces, first = unit % pieces * kPiece, last = min_of(args.size, first + kPiece);
        for (int64_t i = first; i < last; i += W) {
            const int64_t left = args.size - i;
            F value = activate(load_lanes(args.x, Type, row * args.stride + i, left), args.activation);
            if (args.gated) {
                value = f_mul(f_rounded(value, Type), load_lanes(args.x, Type, row * args.stride + args.size + i, left));
            }
            store_lanes(args.out, Type, row * args.size + i, left, value);
        }
    }
}

static void activation(const ActivationArgs& args, const Worker& worker) {
    args.type == DType::f32 ? activation_of<DType::f32>(args, worker) : activation_of<DType::bf16>(args, worker);
}

static void argmax(const ArgmaxArgs& args, const Worker& worker) {
    struct Best {
        double value;
        int64_t index;
    };
    Best* best = reinterpret_cast<Best*>(worker.shared);
    const Range part = share_of(args.size, worker.index, worker.count);
    for (int64_t row = 0; row < args.rows; ++row) {
        const int64_t at = row * args.stride;
        F largest = f_set(-__builtin_inff());
        int64_t i = part.begin;
        for (; i + W <= part.end; i += W) largest = f_max(largest, load_as_float(args.x, args.type, at + i));
        if (i < part.end) {
            F rest = load_some(args.x, args.type, at + i, part.end - i);
            alignas(64) float lanes[W];
            f_store(lanes, rest);
            for (int64_t lane = part.end - i; lane < W; ++lane) lanes[lane] = -__builtin_inff();
            largest = f_max(largest, f_load(lanes));
        }
        const float top = f_largest(largest);
        int64_t index = part.begin;
        while (index < part.end) {
            float value = args.type == DType::f32 ? static_cast<const float*>(args.x)[at + index]
                                                  : bf16_to_f32(static_cast<const uint16_t*>(args.x)[at + index]);
            if (value == top) break;
            ++index;
        }
        best[row * worker.count + worker.index] = {top, index < part.end ? index : part.begin};
    }
    worker.barrier();
    if (worker.index != 0) return;
    for (int64_t row = 0; row < args.rows; ++row) {
        const Best* candidates = best + row * worker.count;
        int64_t chosen = 0;
        for (int thread = 1; thread < worker.count; ++thread) {
            if (candidates[thread].value > candidates[chosen].value) chosen = thread;
        }
        args.out[row] = candidates[chosen].index;
    }
}

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

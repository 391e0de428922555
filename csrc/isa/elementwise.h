// Norms, rotation, cache writes, argmax: operations that move each value once.
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

// One row of `size`: x at `at` -> out at `to`; `residual` (at `to`) is added to the rounded norm.
template <DType Type>
static void norm_row(const void* x, int64_t at, int64_t size, const void* weights, const void* bias, const void* residual,
                     float epsilon, bool subtract_mean, void* out, int64_t to) {
    F total = f_zero();
    float mean = 0.0f;
    if (subtract_mean) {
        for (int64_t i = 0; i < size; i += W) total = f_add(total, load_lanes(x, Type, at + i, size - i));
        mean = f_sum(total) / static_cast<float>(size);
        total = f_zero();
    }
    for (int64_t i = 0; i < size; i += W) {
        F value = load_lanes(x, Type, at + i, size - i);
        // Lanes past the end are 0 and must stay so.
        if (subtract_mean) {
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
    const float scale = 1.0f / __builtin_sqrtf(f_sum(total) / static_cast<float>(size) + epsilon);
    for (int64_t i = 0; i < size; i += W) {
        const int64_t left = size - i;
        F value = load_lanes(x, Type, at + i, left);
        F weight = load_lanes(weights, Type, i, left);
        if (subtract_mean) {
            value = f_mul(f_mul(f_sub(value, f_set(mean)), f_set(scale)), weight);
            if (bias) value = f_add(value, load_lanes(bias, Type, i, left));
        } else {
            value = f_mul(f_rounded(f_mul(value, f_set(scale)), Type), weight);
        }
        if (residual) value = f_add(f_rounded(value, Type), load_lanes(residual, Type, to + i, left));
        store_lanes(out, Type, to + i, left, value);
    }
}

template <DType Type>
static void norm_of(const NormArgs& args, const Worker& worker) {
    const Range rows = share_of(args.outer * args.inner, worker.index, worker.count);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const int64_t at = row / args.inner * args.outer_stride + row % args.inner * args.inner_stride;
        norm_row<Type>(args.x, at, args.size, args.weight, args.bias, args.residual, args.epsilon, args.subtract_mean,
                       args.out, row * args.size);
    }
}

static void norm(const NormArgs& args, const Worker& worker) {
    args.type == DType::f32 ? norm_of<DType::f32>(args, worker) : norm_of<DType::bf16>(args, worker);
}

// One head: x at `at` -> out at `to`. cos and sin of TableType are rounded to Type, as the reference's are.
template <DType Type, DType TableType>
static void rope_row(const void* x, int64_t at, int64_t size, const void* cos, const void* sin, int64_t table_at,
                     int64_t half, void* out, int64_t to) {
    for (int64_t i = 0; i < half; i += W) {
        const int64_t left = half - i;
        F first = load_lanes(x, Type, at + i, left), second = load_lanes(x, Type, at + half + i, left);
        F c = load_lanes(cos, TableType, table_at + i, left), s = load_lanes(sin, TableType, table_at + i, left);
        if (TableType != Type) c = f_rounded(c, Type), s = f_rounded(s, Type);
        // Each product is rounded before the sum, as the reference's tensors are.
        F a = f_sub(f_rounded(f_mul(first, c), Type), f_rounded(f_mul(second, s), Type));
        F b = f_add(f_rounded(f_mul(second, c), Type), f_rounded(f_mul(first, s), Type));
        store_lanes(out, Type, to + i, left, a);
        store_lanes(out, Type, to + half + i, left, b);
    }
    const int64_t bytes = element_bytes(Type), rotated = 2 * half;
    std::memcpy(static_cast<char*>(out) + (to + rotated) * bytes, static_cast<const char*>(x) + (at + rotated) * bytes,
                (size - rotated) * bytes);
}

template <DType Type>
static void rope_of(const RopeArgs& args, const Worker& worker) {
    const Range rows = share_of(args.tokens * args.heads, worker.index, worker.count);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const int64_t token = row / args.heads;
        rope_row<Type, Type>(args.x, token * args.token_stride + row % args.heads * args.head_stride, args.size, args.cos,
                             args.sin, token * args.half, args.half, args.out, row * args.size);
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

// Elements first .. first + count - 1 of a key, of the cache's type, to where its panel has them; first * bytes is a
// multiple of four.
static void scatter_key(const CacheLayout& layout, char* head, int64_t offset, int64_t first, const void* from, int64_t count) {
    const int64_t element = layout.element(), each = 4 / element;
    const char* bytes = static_cast<const char*>(from);
    int64_t i = 0;
    char* to = head + layout.key(offset, first);
    for (const int64_t row = 4 * layout.block_size; i + each <= count; i += each, to += row) {
        std::memcpy(to, bytes + i * element, 4);
    }
    for (; i < count; ++i) std::memcpy(head + layout.key(offset, first + i), bytes + i * element, element);
}

// One head of one token as bytes with a scale: x = scale * byte, the largest magnitude at 127. The scale is NaN if a number
// is NaN or infinite.
static void store_s8(const StoreArgs& args, const CacheLayout& layout, const void* x, int64_t at, char* block, int64_t offset,
                     int64_t head, bool is_key) {
    char* to = block + head * layout.head();
    I largest = i_zero();
    for (int64_t i = 0; i < args.size; i += W) {
        largest = larger_magnitude(largest, load_lanes(x, args.type, at + i, args.size - i));
    }
    const float scale = top_magnitude(largest) / 127.0f;
    const F divisor = f_set(scale > 0.0f ? scale : 1.0f);
    for (int64_t i = 0; i < args.size; i += W) {
        int8_t narrow[W];
        i_store_s8(narrow, i_round(f_div(load_lanes(x, args.type, at + i, args.size - i), divisor)));
        const int64_t count = min_of(W, args.size - i);
        if (is_key) scatter_key(layout, to, offset, i, narrow, count);
        else std::memcpy(to + offset * args.size + i, narrow, count);
    }
    std::memcpy(block + layout.scale(head, offset), &scale, 4);
}

static CacheLayout layout_of(const StoreArgs& args) { return {args.cache_type, args.heads, args.size, args.block_size}; }

// One key head, from `key` at `at`.
static void store_key(const StoreArgs& args, int64_t token, int64_t head, const void* key, int64_t at) {
    const CacheLayout layout = layout_of(args);
    const int64_t offset = args.slots[token] % args.block_size;
    char* keys = static_cast<char*>(args.keys) + args.slots[token] / args.block_size * layout.block();
    if (args.cache_type == DType::s8) return store_s8(args, layout, key, at, keys, offset, head, true);
    keys += head * layout.head();
    if (args.type == args.cache_type) {
        scatter_key(layout, keys, offset, 0, static_cast<const char*>(key) + at * layout.element(), args.size);
        return;
    }
    for (int64_t i = 0; i < args.size; i += W) {
        char narrow[4 * W];
        const int64_t count = min_of(W, args.size - i);
        store_lanes(narrow, args.cache_type, 0, W, load_lanes(key, args.type, at + i, args.size - i));
        scatter_key(layout, keys, offset, i, narrow, count);
    }
}

static void store_value(const StoreArgs& args, int64_t token, int64_t head) {
    const CacheLayout layout = layout_of(args);
    const int64_t from = token * args.value_stride + head * args.value_head_stride, offset = args.slots[token] % args.block_size;
    char* values = static_cast<char*>(args.values) + args.slots[token] / args.block_size * layout.block();
    if (args.cache_type == DType::s8) return store_s8(args, layout, args.value, from, values, offset, head, false);
    copy_row(args.value, args.type, from, values + head * layout.head(), args.cache_type, offset * args.size, args.size);
}

static void store(const StoreArgs& args, const Worker& worker) {
    const Range rows = share_of(args.tokens * args.heads, worker.index, worker.count);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const int64_t token = row / args.heads, head = row % args.heads;
        store_key(args, token, head, args.key, token * args.key_stride + head * args.key_head_stride);
        store_value(args, token, head);
    }
}

// One query or key head through norm and rotation into out at `to`; `normed` holds one head in between.
template <DType Type>
static void prepare_head(const HeadsArgs& args, int64_t token, const void* x, int64_t at, const void* norm, void* normed,
                         void* out, int64_t to) {
    const int64_t size = args.store.size;
    if (norm) {
        norm_row<Type>(x, at, size, norm, nullptr, nullptr, args.epsilon, false, args.cos ? normed : out, args.cos ? 0 : to);
        if (!args.cos) return;
        x = normed, at = 0;
    }
    if (args.cos) {
        rope_row<Type, DType::f32>(x, at, size, args.cos, args.sin, args.positions[token] * args.half, args.half, out, to);
    } else {
        copy_row(x, Type, at, out, Type, to, size);
    }
}

// Of few tokens a thread takes the same heads of all; of many, all heads of the same tokens. Heads are numbered as in a
// merged projection: queries, keys, values.
template <DType Type>
static void heads_of(const HeadsArgs& args, const Worker& worker) {
    const StoreArgs& store = args.store;
    const int64_t all = args.num_heads + 2 * store.heads;
    const bool few = store.tokens <= kPrivateRows;
    void *normed = worker.scratch, *key = worker.scratch + round_up(store.size * 4, 64);
    const Range items = share_of(store.tokens * all, worker.index, worker.count);
    for (int64_t item = items.begin; item < items.end; ++item) {
        const int64_t token = few ? item % store.tokens : item / all, head = few ? item / store.tokens : item % all;
        if (head < args.num_heads) {
            prepare_head<Type>(args, token, args.query, token * args.query_stride + head * args.query_head_stride,
                               args.query_norm, normed, args.out, (token * args.num_heads + head) * store.size);
        } else if (head < args.num_heads + store.heads) {
            const int64_t of_keys = head - args.num_heads;
            prepare_head<Type>(args, token, store.key, token * store.key_stride + of_keys * store.key_head_stride, args.key_norm,
                               normed, key, 0);
            store_key(store, token, of_keys, key, 0);
        } else {
            store_value(store, token, head - args.num_heads - store.heads);
        }
    }
}

static void heads(const HeadsArgs& args, const Worker& worker) {
    args.store.type == DType::f32 ? heads_of<DType::f32>(args, worker) : heads_of<DType::bf16>(args, worker);
}

static void gather(const GatherArgs& args, const Worker& worker) {
    const Range rows = share_of(args.rows, worker.index, worker.count);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const int64_t from = args.ids[row] * args.size, to = row * args.size;
        if (!args.residual && args.scale == 1.0f) {
            copy_row(args.table, args.type, from, args.out, args.type, to, args.size);
            continue;
        }
        for (int64_t i = 0; i < args.size; i += W) {
            const int64_t left = args.size - i;
            F value = f_mul(load_lanes(args.table, args.type, from + i, left), f_set(args.scale));
            if (args.residual) value = f_add(value, load_lanes(args.residual, args.type, to + i, left));
            store_lanes(args.out, args.type, to + i, left, value);
        }
    }
}

static float element_of(const ArgmaxArgs& args, int64_t at) {
    return args.type == DType::f32 ? static_cast<const float*>(args.x)[at] : bf16_to_f32(static_cast<const uint16_t*>(args.x)[at]);
}

// Max returns the second of a NaN pair, and no comparison holds for one: a NaN counts as -inf.
static void argmax(const ArgmaxArgs& args, const Worker& worker) {
    struct Best {
        double value;
        int64_t index;
    };
    Best* best = reinterpret_cast<Best*>(worker.shared);
    constexpr int64_t kPiece = 64 * W;  // the index is looked for in the piece that has the largest
    const Range part = share_of(args.size, worker.index, worker.count);
    for (int64_t row = 0; row < args.rows; ++row) {
        const int64_t at = row * args.stride;
        float top = -__builtin_inff();
        int64_t piece = part.begin;
        for (int64_t begin = part.begin; begin < part.end; begin += kPiece) {
            const int64_t end = min_of(begin + kPiece, part.end);
            F largest = f_set(-__builtin_inff());
            int64_t i = begin;
            for (; i + W <= end; i += W) largest = f_max(load_as_float(args.x, args.type, at + i), largest);
            float of_piece = f_largest(largest);
            for (; i < end; ++i) of_piece = element_of(args, at + i) > of_piece ? element_of(args, at + i) : of_piece;
            if (of_piece > top) top = of_piece, piece = begin;
        }
        int64_t index = piece;
        while (top > -__builtin_inff() && element_of(args, at + index) != top) ++index;
        best[row * worker.count + worker.index] = {top, index};
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

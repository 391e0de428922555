// The two products of low-rank adapters inside `linear`: h = A x before the panels, B h added to each panel's sums.
//
// A row's numbers are one chain of additions in a fixed order, so they do not depend on the other rows, nor on which
// adapters those use. Rows without an adapter are left as they are.
#pragma once

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

// Dots of up to R rows of A [., k] with x: the activations are loaded once for all of them.
template <DType Type, int R>
static void dot_rows(const void* x, int64_t at, const void* a, int64_t first, int64_t k, float* out) {
    F sums[R];
    for (int r = 0; r < R; ++r) sums[r] = f_zero();
    for (int64_t i = 0; i < k; i += W) {
        const F value = load_lanes(x, Type, at + i, k - i);
        for (int r = 0; r < R; ++r) sums[r] = f_fma(load_lanes(a, Type, (first + r) * k + i, k - i), value, sums[r]);
    }
    for (int r = 0; r < R; ++r) out[r] = f_sum(sums[r]);
}

// h [rows, max_ranks] = A x, shared out among the threads by rows and fours of ranks.
template <DType Type> static void shrink(const LinearArgs& args, float* h, const Worker& worker) {
    const int64_t k = args.weight->k, width = args.adapters->max_ranks(), fours = ceil_div(width, 4);
    const Range units = share_of(args.rows * fours, worker.index, worker.count);
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
        const int64_t row = unit / fours, first = unit % fours * 4;
        if (args.adapter_slots[row] < 0) continue;
        const AdapterSlot& slot = args.adapters->slot(args.adapter_slots[row]);
        float* out = h + row * width;
        if (first + 4 <= slot.ranks) {
            dot_rows<Type, 4>(args.x, row * args.x_stride, slot.a, first, k, out + first);
            continue;
        }
        for (int64_t rank = first; rank < slot.ranks; ++rank) {
            dot_rows<Type, 1>(args.x, row * args.x_stride, slot.a, rank, k, out + rank);
        }
    }
}

// Fetch a row's part of B for one panel, which other rows with other adapters do not read.
static inline void prefetch_strips(const LinearArgs& args, int64_t row, int64_t panel) {
    if (args.adapter_slots[row] < 0) return;
    const AdapterSlot& slot = args.adapters->slot(args.adapter_slots[row]);
    if (!slot.ranks) return;
    const int64_t strips = args.weight->panel_columns(panel) / kColumnMultiple;
    const AdapterStrip *first = slot.strips + panel * (kPanelColumns / kColumnMultiple), *last = first + strips - 1;
    const int64_t size = element_bytes(slot.type);
    const char* data = static_cast<const char*>(slot.b);
    for (int64_t at = first->offset * size; at < (last->offset + last->ranks * kColumnMultiple) * size; at += 64) {
        __builtin_prefetch(data + at, 0, 3);
    }
}

// R rows of c [., 64], all of one slot, += B h, where h is [., stride]. B is loaded once for all of them.
template <DType Type, int R>
static void expand_rows(const AdapterSlot& slot, const AdapterStrip* strips, const float* h, int64_t stride, const float* scales,
                        int64_t width, float* c) {
    for (int64_t column = 0; column < width; column += kColumnMultiple, ++strips) {
        const float* own = h + strips->first_rank;
        F sums[R][kColumnMultiple / W];
        for (auto& row : sums) {
            for (F& sum : row) sum = f_zero();
        }
        for (int64_t rank = 0; rank < strips->ranks; ++rank) {
            for (int v = 0; v < kColumnMultiple / W; ++v) {
                const F value = load_as_float(slot.b, Type, strips->offset + rank * kColumnMultiple + v * W);
                for (int r = 0; r < R; ++r) sums[r][v] = f_fma(value, f_set(own[r * stride + rank]), sums[r][v]);
            }
        }
        for (int r = 0; r < R; ++r) {
            const F share = f_set(scales ? 1.0f / scales[r] : 1.0f);
            for (int v = 0; v < kColumnMultiple / W; ++v) {
                float* to = c + r * kPanelColumns + column + v * W;
                f_store(to, f_fma(sums[r][v], share, f_load(to)));
            }
        }
    }
}

// c [rows, 64] of one panel += B h. Quantised activations are scaled afterwards, so what is added is divided by that.
template <DType Type>
static void expand(const LinearArgs& args, const float* scales, const float* h, int64_t first, int64_t last, int64_t panel,
                   float* c) {
    constexpr int64_t kTile = W == 4 ? 1 : 4;
    const int64_t width = args.weight->panel_columns(panel), stride = args.adapters->max_ranks();
    const int64_t* slots = args.adapter_slots;
    for (int64_t row = first, count = 1; row < last; row += count) {
        for (count = 1; row + count < last && count < kTile && slots[row + count] == slots[row];) ++count;
        if (count < kTile) count = 1;
        if (row + count < last && slots[row + count] != slots[row]) prefetch_strips(args, row + count, panel);
        if (slots[row] < 0) continue;
        const AdapterSlot& slot = args.adapters->slot(slots[row]);
        if (!slot.ranks) continue;
        auto add = count == kTile ? expand_rows<Type, kTile> : expand_rows<Type, 1>;
        add(slot, slot.strips + panel * (kPanelColumns / kColumnMultiple), h + row * stride, stride, scales ? scales + row : nullptr,
            width, c + (row - first) * kPanelColumns);
    }
}

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

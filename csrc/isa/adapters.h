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

// c [rows, 64] of one panel += B h. Quantised activations are scaled afterwards, so what is added is divided by that.
template <DType Type>
static void expand(const LinearArgs& args, const float* scales, const float* h, int64_t first, int64_t last, int64_t panel,
                   float* c) {
    const int64_t width = args.weight->panel_columns(panel);
    for (int64_t row = first; row < last; ++row, c += kPanelColumns) {
        if (args.adapter_slots[row] < 0) continue;
        const AdapterSlot& slot = args.adapters->slot(args.adapter_slots[row]);
        if (!slot.ranks) continue;
        const F share = f_set(scales ? 1.0f / scales[row] : 1.0f);
        for (int64_t column = 0; column < width; column += kColumnMultiple) {
            const AdapterStrip& strip = slot.strips[(panel * kPanelColumns + column) / kColumnMultiple];
            const float* own = h + row * args.adapters->max_ranks() + strip.first_rank;
            F sums[kColumnMultiple / W];
            for (F& sum : sums) sum = f_zero();
            for (int64_t rank = 0; rank < strip.ranks; ++rank) {
                const F value = f_set(own[rank]);
                for (int v = 0; v < kColumnMultiple / W; ++v) {
                    const int64_t at = strip.offset + rank * kColumnMultiple + v * W;
                    sums[v] = f_fma(load_as_float(slot.b, Type, at), value, sums[v]);
                }
            }
            for (int v = 0; v < kColumnMultiple / W; ++v) {
                float* to = c + column + v * W;
                f_store(to, f_fma(sums[v], share, f_load(to)));
            }
        }
    }
}

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

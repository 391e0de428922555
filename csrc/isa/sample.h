// Drawing one token from a row of logits: temperature, top-k, top-p, min-p, without sorting the vocabulary. And what a
// beam search asks of a row: its largest values and the logarithm of the sum of all.
//
// A weight is e^((logit - largest) / temperature) as an integer of 30 fractional bits. Sums of integers do not depend
// on their order and the exponential fuses nothing, so every instruction set, and the reference, draws the same token.
// Thresholds are found by bisection over the few values that can hold them: the row is seen in chunks of 64, and what
// is known of a chunk (its largest value, its sum) rules most of them out. One thread takes a row.
#pragma once

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

constexpr int32_t kWeightOne = 1 << 30;
using Weight = int32_t __attribute__((may_alias));  // weights take the place of the values

// 2^30 e^x for x <= 0, each product and sum rounded on its own. NaN in: what -87 gives, which is nothing.
static FASTSERVE_INLINE F sample_weight(F x) {
    x = f_max(x, f_set(-87.0f));
    const I n = i_round(f_mul(x, f_set(1.44269504f)));
    const F nf = f_convert(n);
    F r = f_sub(x, f_mul(nf, f_set(0.693359375f)));
    r = f_add(r, f_mul(nf, f_set(2.12194440e-4f)));
    F p = f_set(1.9875691500e-4f);
    p = f_add(f_mul(p, r), f_set(1.3981999507e-3f));
    p = f_add(f_mul(p, r), f_set(8.3334519073e-3f));
    p = f_add(f_mul(p, r), f_set(4.1665795894e-2f));
    p = f_add(f_mul(p, r), f_set(1.6666665459e-1f));
    p = f_add(f_mul(p, r), f_set(5.0000001201e-1f));
    p = f_add(f_add(f_mul(p, f_mul(r, r)), r), f_set(1.0f));
    return f_mul(p, f_bits(i_shl<23>(i_add(n, i_set(127 + 30)))));
}

// Integers in the order of the floats.
static FASTSERVE_INLINE int32_t order_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static float of_order(int64_t order) {
    int32_t bits = static_cast<int32_t>(order);
    bits ^= (bits >> 31) & 0x7fffffff;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static float kth_largest(const float* values, int64_t count, int64_t k) {
    int64_t low = -(int64_t{1} << 31), high = int64_t{1} << 31;  // at least k values are >= low, fewer are >= high
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        const int32_t limit = static_cast<int32_t>(middle);
        int64_t above = 0;
        for (int64_t i = 0; i < count; ++i) above += order_of(values[i]) >= limit;
        (above >= k ? low : high) = middle;
    }
    return of_order(low);
}

static int64_t mass_from(const Weight* weights, int64_t count, int32_t limit) {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += weights[i] >= limit ? weights[i] : 0;
    return sum;
}

class RowSampler {
public:
    RowSampler(const SampleArgs& args, uint8_t* scratch)
        : args_(args), chunks_(ceil_div(args.size, kSampleChunk)), values_(reinterpret_cast<float*>(scratch)),
          weights_(reinterpret_cast<Weight*>(scratch)), list_(values_ + chunks_ * kSampleChunk),
          sums_(reinterpret_cast<int64_t*>(list_ + chunks_ * kSampleChunk)), tops_(reinterpret_cast<float*>(sums_ + chunks_)) {}

    int64_t draw(int64_t row) {
        const SampleRow& how = args_.how[row];
        read(row);
        const int64_t first_best = index_of(largest_);
        if (how.inverse_temperature == 0.0f) return first_best;
        const float floor = how.top_k > 0 && how.top_k < args_.size ? floor_of_k(how.top_k) : -__builtin_inff();
        weigh(floor, how.inverse_temperature);
        int32_t limit = 1;
        if (how.top_p < 1.0) limit = limit_of_p(how.top_p);
        const int32_t least = static_cast<int32_t>(__builtin_ceil(how.min_p * kWeightOne));
        if (least > limit) limit = least;
        const int64_t kept = mass(limit);
        if (kept == 0) return first_best;
        return index_at(limit, static_cast<int64_t>((static_cast<unsigned __int128>(how.random) * kept) >> 53));
    }

private:
    // The row as floats, a NaN as -inf, in whole chunks; the largest of each chunk and of all.
    void read(int64_t row) {
        const int64_t at = row * args_.stride;
        const F nothing = f_set(-__builtin_inff());
        largest_ = -__builtin_inff();
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
            F top = nothing;
            for (int64_t i = chunk * kSampleChunk; i < (chunk + 1) * kSampleChunk; i += W) {
                const int64_t left = args_.size - i;
                F value = left > 0 ? f_max(load_lanes(args_.x, args_.type, at + i, left), nothing) : nothing;
                f_store(values_ + i, value);
                for (int64_t lane = max_of(left, 0); lane < W; ++lane) values_[i + lane] = -__builtin_inff();
                top = f_max(top, f_load(values_ + i));
            }
            tops_[chunk] = f_largest(top);
            if (tops_[chunk] > largest_) largest_ = tops_[chunk];
        }
    }

    int64_t index_of(float value) const {
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
            if (tops_[chunk] != value) continue;
            int64_t i = chunk * kSampleChunk;
            while (values_[i] != value) ++i;
            return i;
        }
        return 0;
    }

    // The k-th largest value. No smaller than the k-th largest of the chunks' own.
    float floor_of_k(int64_t k) {
        const float least = k <= chunks_ ? kth_largest(tops_, chunks_, k) : -__builtin_inff();
        int64_t count = 0;
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
            if (tops_[chunk] < least) continue;
            for (int64_t i = chunk * kSampleChunk; i < (chunk + 1) * kSampleChunk; ++i) {
                list_[count] = values_[i];
                count += values_[i] >= least;
            }
        }
        return kth_largest(list_, count, k);
    }

    // Values -> weights, in place; 0 below `floor`.
    void weigh(float floor, float inverse_temperature) {
        const F top = f_set(largest_), factor = f_set(inverse_temperature);
        // The next float down: what is not above it is dropped. Both zeros are one value, and nothing is below -inf.
        float below = floor;
        if (floor > -__builtin_inff()) below = of_order(order_of(floor == 0.0f ? -0.0f : floor) - int64_t{1});
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
            int64_t sum = 0;
            int32_t most = 0;
            alignas(64) float lanes[kSampleChunk];
            for (int64_t i = 0; i < kSampleChunk; i += W) {
                const F value = f_load(values_ + chunk * kSampleChunk + i);
                f_store(lanes + i, f_zero_below(value, f_set(below), sample_weight(f_mul(f_sub(value, top), factor))));
            }
            for (int64_t i = 0; i < kSampleChunk; ++i) {
                const int32_t weight = static_cast<int32_t>(lanes[i]);
                weights_[chunk * kSampleChunk + i] = weight;
                sum += weight;
                most = weight > most ? weight : most;
            }
            sums_[chunk] = sum;
            std::memcpy(tops_ + chunk, &most, 4);
        }
    }

    int32_t most(int64_t chunk) const {
        int32_t value;
        std::memcpy(&value, tops_ + chunk, 4);
        return value;
    }

    int64_t chunk_mass(int64_t chunk, int32_t limit) const {
        if (limit <= 1) return sums_[chunk];
        return most(chunk) < limit ? 0 : mass_from(weights_ + chunk * kSampleChunk, kSampleChunk, limit);
    }

    // Of all weights that are no smaller than `limit`.
    int64_t mass(int32_t limit) const {
        int64_t sum = 0;
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += chunk_mass(chunk, limit);
        return sum;
    }

    // The largest limit whose mass is at least the share p of all.
    int32_t limit_of_p(double p) {
        const int64_t all = mass(1);
        int64_t wanted = static_cast<int64_t>(__builtin_ceil(p * static_cast<double>(all)));
        wanted = max_of(1, min_of(wanted, all));
        int shift = 24;
        while (shift > 0 && mass(1 << shift) < wanted) shift -= 6;
        int32_t low = 1 << shift, high = kWeightOne + 1;
        Weight* list = reinterpret_cast<Weight*>(list_);
        int64_t count = 0;
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
            if (most(chunk) < low) continue;
            for (int64_t i = chunk * kSampleChunk; i < (chunk + 1) * kSampleChunk; ++i) {
                list[count] = weights_[i];
                count += weights_[i] >= low;
            }
        }
        while (high - low > 1) {
            const int32_t middle = low + (high - low) / 2;
            (mass_from(list, count, middle) >= wanted ? low : high) = middle;
        }
        return low;
    }

    // The first index at which the running sum of the kept weights exceeds `target`.
    int64_t index_at(int32_t limit, int64_t target) const {
        int64_t chunk = 0;
        for (int64_t part; (part = chunk_mass(chunk, limit)) <= target; ++chunk) target -= part;
        int64_t i = chunk * kSampleChunk;
        for (;; ++i) {
            if (weights_[i] < limit) continue;
            if (target < weights_[i]) return i;
            target -= weights_[i];
        }
    }

    const SampleArgs& args_;
    const int64_t chunks_;
    float* values_;     // [chunks, 64]; then, in the same place,
    Weight* weights_;
    float* list_;       // [chunks, 64] candidates
    int64_t* sums_;     // [chunks]
    float* tops_;       // [chunks]; then the largest weight, an integer
    float largest_ = 0.0f;
};

static void sample(const SampleArgs& args, const Worker& worker) {
    const Range rows = share_of(args.rows, worker.index, worker.count);
    RowSampler sampler(args, worker.scratch);
    for (int64_t row = rows.begin; row < rows.end; ++row) args.out[row] = sampler.draw(row);
}

// Keeps the `count` largest of the values that are shown to it, in order; what it never sees is -inf.
class LargestKeeper {
public:
    LargestKeeper(float* values, int64_t* ids, int64_t count) : values_(values), ids_(ids), count_(count) {
        for (int64_t i = 0; i < count; ++i) values[i] = -__builtin_inff(), ids[i] = i;
    }

    float least() const { return values_[count_ - 1]; }

    void show(float value, int64_t id) {
        if (!(value > least())) return;
        int64_t place = count_ - 1;
        for (; place > 0 && value > values_[place - 1]; --place) values_[place] = values_[place - 1], ids_[place] = ids_[place - 1];
        values_[place] = value, ids_[place] = id;
    }

private:
    float* values_;
    int64_t* ids_;
    const int64_t count_;
};

// Logits are read twice, the second time from the cache. A chunk is searched only if its largest value is wanted.
static void most_probable(const MostProbableArgs& args, const Worker& worker) {
    const Range rows = share_of(args.rows, worker.index, worker.count);
    const int64_t chunks = ceil_div(args.size, kSampleChunk);
    float* tops = reinterpret_cast<float*>(worker.scratch);
    const F nothing = f_set(-__builtin_inff());
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const float* x = args.x + row * args.stride;
        float largest = -__builtin_inff();
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            F top = nothing;
            const int64_t last = min_of(args.size, (chunk + 1) * kSampleChunk);
            int64_t i = chunk * kSampleChunk;
            for (; i + W <= last; i += W) top = f_max(f_load(x + i), top);  // max returns the second of a NaN pair
            tops[chunk] = f_largest(top);
            for (; i < last; ++i) tops[chunk] = x[i] > tops[chunk] ? x[i] : tops[chunk];
            largest = tops[chunk] > largest ? tops[chunk] : largest;
        }
        LargestKeeper keeper(args.values + row * args.count, args.ids + row * args.count, args.count);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            if (!(tops[chunk] > keeper.least())) continue;
            const int64_t last = min_of(args.size, (chunk + 1) * kSampleChunk);
            for (int64_t i = chunk * kSampleChunk; i < last; ++i) keeper.show(x[i], i);
        }
        F sums[4] = {f_zero(), f_zero(), f_zero(), f_zero()};
        const F top = f_set(largest);
        int64_t i = 0;
        for (; i + 4 * W <= args.size; i += 4 * W) {
#pragma GCC unroll 4
            for (int part = 0; part < 4; ++part) sums[part] = f_add(sums[part], f_exp(f_sub(f_load(x + i + part * W), top)));
        }
        for (; i < args.size; i += W) {
            alignas(64) float lanes[W];
            for (int64_t lane = 0; lane < W; ++lane) lanes[lane] = i + lane < args.size ? x[i + lane] - largest : -__builtin_inff();
            sums[0] = f_add(sums[0], f_exp(f_load(lanes)));
        }
        const float sum = f_sum(f_add(f_add(sums[0], sums[1]), f_add(sums[2], sums[3])));
        const float log = static_cast<float>(__builtin_log(static_cast<double>(sum)));
        args.log_sums[row] = __builtin_isinf(largest) ? largest : largest + log;
    }
}

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

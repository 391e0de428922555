// The Python module `fastserve.kernels.cpu._native`. Buffers come in as addresses (torch's data_ptr()), strides in
// elements; that shapes and types fit is for `fastserve/kernels/cpu` to see to. The interpreter lock is released while the
// pool works.
#include <algorithm>

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "cpu_features.h"
#include "measure.h"
#include "ops.h"
#include "plan.h"
#include "sparse_weight.h"

namespace nb = nanobind;
using namespace fastserve;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Raises a ValueError in Python.
void need(bool is_so, const char* what) {
    if (!is_so) throw std::invalid_argument(what);
}

using WeightPart = std::tuple<int64_t, uintptr_t, uintptr_t, uintptr_t>;
using BlockTables = std::vector<std::vector<int64_t>>;  // of each sequence

std::vector<const int64_t*> starts_of(const BlockTables& tables) {
    std::vector<const int64_t*> starts;
    for (const auto& table : tables) starts.push_back(table.data());
    return starts;
}

// What Python calls for every operation: addresses become arguments. What is done with them differs.
class Operations {
    // The arguments of `store`.
    using StoreCall = std::tuple<uintptr_t, uintptr_t, int, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                                 uintptr_t, uintptr_t, uintptr_t, int64_t>;

public:
    virtual ~Operations() = default;

    void linear(const PackedWeight& weight, int64_t rows, uintptr_t x, int x_type, int64_t x_stride, uintptr_t out,
                int out_type, int64_t out_stride, uintptr_t residual, int64_t residual_stride, int activation,
                bool quantize_x, const Adapters* adapters, uintptr_t adapter_slots) {
        LinearArgs args{&weight,
                        rows,
                        at<void>(x),
                        static_cast<DType>(x_type),
                        x_stride,
                        at<void>(out),
                        static_cast<DType>(out_type),
                        out_stride,
                        at<void>(residual),
                        residual_stride,
                        static_cast<Activation>(activation),
                        quantize_x,
                        adapters,
                        at<const int64_t>(adapter_slots)};
        submit(args);
    }

    void attention(uintptr_t query, int x_type, int64_t query_stride, int64_t query_head_stride, uintptr_t out,
                   int64_t num_heads, int64_t num_kv_heads, int64_t head_size, uintptr_t keys, uintptr_t values,
                   int cache_type, int64_t block_size, const std::vector<int64_t>& query_starts,
                   const std::vector<int64_t>& context_lens, const BlockTables& block_tables, float scale,
                   float softcap, int64_t window, bool causal, uintptr_t bias, int64_t bias_stride,
                   int64_t bias_origin) {
        const size_t count = context_lens.size();
        need(query_starts.size() == count + 1 && block_tables.size() == count,
             "attention: query_starts, lengths and block tables are of other numbers of sequences");
        const std::vector<const int64_t*> tables = starts_of(block_tables);
        AttentionArgs args{};
        args.query = at<void>(query);
        args.x_type = static_cast<DType>(x_type);
        args.query_stride = query_stride;
        args.query_head_stride = query_head_stride;
        args.out = at<void>(out);
        args.num_heads = num_heads;
        args.num_kv_heads = num_kv_heads;
        args.head_size = head_size;
        args.keys = at<void>(keys);
        args.values = at<void>(values);
        args.cache_type = static_cast<DType>(cache_type);
        args.block_size = block_size;
        args.num_sequences = static_cast<int64_t>(context_lens.size());
        args.query_starts = query_starts.data();
        args.context_lens = context_lens.data();
        args.block_tables = tables.data();
        args.scale = scale;
        args.softcap = softcap;
        args.window = window;
        args.causal = causal;
        args.bias = at<float>(bias);
        args.bias_stride = bias_stride;
        args.bias_origin = bias_origin;
        submit(args);
    }

    void norm(uintptr_t x, int type, int64_t outer, int64_t inner, int64_t outer_stride, int64_t inner_stride,
              int64_t size, uintptr_t weight, uintptr_t bias, uintptr_t out, float epsilon, bool subtract_mean,
              uintptr_t residual) {
        NormArgs args{at<void>(x),      static_cast<DType>(type), outer,         inner,   outer_stride,
                      inner_stride,     size,                     at<void>(weight), at<void>(bias), at<void>(out),
                      epsilon,          subtract_mean,            at<void>(residual)};
        submit(args);
    }

    void rope(uintptr_t x, int type, int64_t tokens, int64_t heads, int64_t size, int64_t token_stride,
              int64_t head_stride, uintptr_t cos, uintptr_t sin, int64_t half, uintptr_t out) {
        RopeArgs args{at<void>(x),   static_cast<DType>(type), tokens,        heads, size,         token_stride,
                      head_stride,   at<void>(cos),            at<void>(sin), half,  at<void>(out)};
        submit(args);
    }

    void store(uintptr_t key, uintptr_t value, int type, int cache_type, int64_t tokens, int64_t heads, int64_t size,
               int64_t key_stride, int64_t key_head_stride, int64_t value_stride, int64_t value_head_stride,
               uintptr_t keys, uintptr_t values, uintptr_t slots, int64_t block_size) {
        submit(store_args(key, value, type, cache_type, tokens, heads, size, key_stride, key_head_stride, value_stride,
                          value_head_stride, keys, values, slots, block_size));
    }

    void heads(uintptr_t query, int64_t num_heads, int64_t query_stride, int64_t query_head_stride, uintptr_t query_norm,
               uintptr_t key_norm, float epsilon, uintptr_t cos, uintptr_t sin, int64_t half, uintptr_t positions,
               uintptr_t out, const StoreCall& store) {
        HeadsArgs args{at<void>(query),  num_heads,     query_stride,   query_head_stride, at<void>(query_norm),
                       at<void>(key_norm), epsilon,     at<float>(cos), at<float>(sin),    half,
                       at<int64_t>(positions), at<void>(out), std::apply(store_args, store)};
        submit(args);
    }

    void gather(const PackedWeight* packed, uintptr_t table, int type, int64_t rows, int64_t size, uintptr_t ids, float scale,
                uintptr_t residual, uintptr_t out) {
        submit(GatherArgs{packed, at<void>(table), static_cast<DType>(type), rows, size, at<int64_t>(ids), scale,
                          at<void>(residual), at<void>(out)});
    }

    void argmax(uintptr_t x, int type, int64_t rows, int64_t size, int64_t stride, uintptr_t out) {
        ArgmaxArgs args{at<void>(x), static_cast<DType>(type), rows, size, stride, at<int64_t>(out)};
        submit(args);
    }

private:
    static StoreArgs store_args(uintptr_t key, uintptr_t value, int type, int cache_type, int64_t tokens, int64_t heads,
                                int64_t size, int64_t key_stride, int64_t key_head_stride, int64_t value_stride,
                                int64_t value_head_stride, uintptr_t keys, uintptr_t values, uintptr_t slots,
                                int64_t block_size) {
        return {at<void>(key),
                at<void>(value),
                static_cast<DType>(type),
                static_cast<DType>(cache_type),
                tokens,
                heads,
                size,
                key_stride,
                key_head_stride,
                value_stride,
                value_head_stride,
                at<void>(keys),
                at<void>(values),
                at<int64_t>(slots),
                block_size};
    }

    virtual void submit(const Op& op) = 0;
};

// Computes at once.
class Backend : public Operations {
public:
    Backend(const std::string& isa, int num_threads, const std::vector<int>& cpus)
        : table_(op_table(isa)), pool_(num_threads, cpus) {
        if (!table_) throw std::invalid_argument("instruction set '" + isa + "' is not available on this machine");
    }

    std::string isa() const { return table_->name; }
    int num_threads() const { return pool_.size(); }

    // Parts: rows, and the addresses of values, scales and zero points.
    std::unique_ptr<PackedWeight> pack(int format, int64_t k, const std::vector<WeightPart>& parts, int64_t group,
                                       int scale_type, const std::vector<float>& table, uintptr_t bias, bool gated) {
        if (!table.empty() && table.size() != 16) throw std::invalid_argument("a codebook has 16 values");
        nb::gil_scoped_release release;
        WeightSource source{static_cast<Format>(format), k, {}};
        for (const auto& [n, values, scales, zeros] : parts) {
            source.parts.push_back({n, at<void>(values), at<void>(scales), at<uint8_t>(zeros)});
        }
        source.group = group;
        source.scale_type = static_cast<ScaleType>(scale_type);
        source.table = table.empty() ? nullptr : table.data();
        source.bias = at<float>(bias);
        source.gated = gated;
        return fastserve::pack(source, pool_);
    }

    // Packs the zeros of a bfloat16 weight away where products with one vector are faster for it: measured at the first
    // weight with so many. Returns (percent of zeros, times as fast) where it measured, else (percent, 0).
    std::pair<int, double> drop_zeros(PackedWeight& weight) {
        nb::gil_scoped_release release;
        const int percent = static_cast<int>(100 * share_of_zeros(weight) + 0.5), tenth = percent / 10;
        if (percent < 50) return {percent, 0};
        double& gain = sparse_gains_[tenth];
        const bool is_known = gain > 0;
        if (!is_known) gain = measure_sparse_gain(tenth / 10.0, *table_, pool_);
        if (gain > 1) fastserve::drop_zeros(weight, pool_);
        return {percent, is_known ? 0 : gain};
    }

    void sample(uintptr_t x, int type, int64_t rows, int64_t size, int64_t stride, uintptr_t out,
                const std::vector<float>& inverse_temperature, const std::vector<int64_t>& top_k,
                const std::vector<double>& top_p, const std::vector<double>& min_p, const std::vector<uint64_t>& random) {
        need(inverse_temperature.size() == static_cast<size_t>(rows), "sample: one RowSampling for each row of logits is needed");
        std::vector<SampleRow> how;
        for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
            how.push_back({inverse_temperature.at(row), top_k.at(row), top_p.at(row), min_p.at(row), random.at(row)});
        }
        SampleArgs args{at<void>(x), static_cast<DType>(type), rows, size, stride, how.data(), at<int64_t>(out)};
        nb::gil_scoped_release release;
        pool_.run(sample_scratch(args), [&](const Worker& worker) { table_->sample(args, worker); }, rows * size);
    }

    void most_probable(uintptr_t x, int64_t rows, int64_t size, int64_t stride, int64_t count, uintptr_t log_sums,
                       uintptr_t values, uintptr_t ids) {
        need(count > 0 && count <= size, "most_probable: count must be from 1 to the number of logits");
        MostProbableArgs args{at<float>(x), rows, size, stride, count, at<float>(log_sums), at<float>(values), at<int64_t>(ids)};
        nb::gil_scoped_release release;
        pool_.run(most_probable_scratch(args), [&](const Worker& worker) { table_->most_probable(args, worker); }, rows * size);
    }

    // Blocks source -> target within every part; no block is both.
    void copy_blocks(const std::vector<uintptr_t>& parts, int64_t bytes, const std::vector<std::pair<int64_t, int64_t>>& pairs) {
        const int64_t count = static_cast<int64_t>(pairs.size()), total = count * static_cast<int64_t>(parts.size());
        nb::gil_scoped_release release;
        pool_.run({}, [&](const Worker& worker) {
            const Range share = share_of(total, worker.index, worker.count);
            for (int64_t i = share.begin; i < share.end; ++i) {
                uint8_t* part = at<uint8_t>(parts[i / count]);
                std::memcpy(part + pairs[i % count].second * bytes, part + pairs[i % count].first * bytes, bytes);
            }
        }, total * bytes);
    }

    void varlen(uintptr_t query, int type, int64_t query_stride, int64_t query_head_stride, uintptr_t out,
                int64_t num_heads, int64_t num_kv_heads, int64_t head_size, uintptr_t keys, uintptr_t values,
                const std::vector<int64_t>& key_strides, const std::vector<int64_t>& value_strides,
                const std::vector<int64_t>& query_starts, const std::vector<int64_t>& key_starts, float scale,
                int64_t window, uintptr_t bias, int64_t bias_stride, int64_t bias_origin) {
        need(!query_starts.empty() && query_starts.size() == key_starts.size(),
             "varlen_attention: query_starts and key_starts are of other numbers of sequences");
        VarlenArgs args{};
        args.query = at<void>(query);
        args.type = static_cast<DType>(type);
        args.query_stride = query_stride;
        args.query_head_stride = query_head_stride;
        args.out = at<void>(out);
        args.num_heads = num_heads;
        args.num_kv_heads = num_kv_heads;
        args.head_size = head_size;
        args.keys = at<void>(keys);
        args.values = at<void>(values);
        args.key_stride = key_strides.at(0), args.key_head_stride = key_strides.at(1);
        args.value_stride = value_strides.at(0), args.value_head_stride = value_strides.at(1);
        args.num_sequences = static_cast<int64_t>(query_starts.size()) - 1;
        args.query_starts = query_starts.data();
        args.key_starts = key_starts.data();
        args.scale = scale;
        args.window = window;
        args.bias = at<float>(bias);
        args.bias_stride = bias_stride;
        args.bias_origin = bias_origin;
        nb::gil_scoped_release release;
        pool_.run(varlen_scratch(args), [&](const Worker& worker) { table_->varlen(args, worker); });
    }

    double peak(int kind, double seconds) {
        nb::gil_scoped_release release;
        return measure_peak(*table_, pool_, kind, seconds);
    }

    ThreadPool& pool() { return pool_; }
    const OpTable& table() const { return *table_; }

private:
    void submit(const Op& op) override {
        nb::gil_scoped_release release;
        pool_.run(op_scratch(op, pool_.size()), [&](const Worker& worker) { run_op(op, *table_, worker); }, op_work(op));
    }

    const OpTable* table_;
    ThreadPool pool_;
    double sparse_gains_[11] = {};  // by tenths of zeros; 0: not measured
};

// Adds to a plan instead of computing; then runs the plan.
class Recording : public Operations {
public:
    Recording(Backend& backend, int64_t tokens, int64_t rows) : plan_(backend.table(), backend.pool(), tokens, rows) {}

    void tensor(uintptr_t address, int64_t bytes, int64_t rows) { plan_.tensor(at<void>(address), bytes, rows); }
    void input(int number, uintptr_t address, int64_t bytes, int64_t rows) {
        plan_.tensor(at<void>(address), bytes, rows, number);
    }
    void finish(uintptr_t logits, uintptr_t chosen) { plan_.finish(at<void>(logits), at<void>(chosen)); }

    // The index of the largest logit of each row, if `choose`. Of several rounds, in which all sequences decode, one round
    // after the other; none comes after one that chose an end.
    std::vector<int64_t> run(std::vector<int64_t> input_ids, std::vector<int64_t> positions, std::vector<int64_t> slots,
                             const std::vector<int64_t>& logit_rows, const std::vector<int64_t>& query_starts,
                             std::vector<int64_t> context_lens, const BlockTables& block_tables,
                             const std::vector<int64_t>& source_lens, const BlockTables& source_tables,
                             const std::vector<uintptr_t>& adapter_slots, bool choose, int64_t rounds,
                             const std::vector<int64_t>& ends) {
        const size_t tokens = input_ids.size(), count = context_lens.size();
        need(positions.size() == tokens && slots.size() == tokens, "a step needs a position and a slot for each of its tokens");
        need(query_starts.size() == count + 1 && block_tables.size() == count && source_tables.size() == source_lens.size() &&
                 (source_lens.empty() || source_lens.size() == count),
             "a step's starts, lengths and block tables are of other numbers of sequences");
        need(rounds == 1 || (choose && count == tokens && logit_rows.size() == tokens), "rounds are for sequences that decode");
        const std::vector<const int64_t*> tables = starts_of(block_tables), sources = starts_of(source_tables);
        StepInputs step{static_cast<int64_t>(tokens),
                        static_cast<int64_t>(logit_rows.size()),
                        input_ids.data(),
                        positions.data(),
                        slots.data(),
                        logit_rows.data(),
                        at<const int64_t>(adapter_slots.empty() ? 0 : adapter_slots.at(0)),
                        at<const int64_t>(adapter_slots.empty() ? 0 : adapter_slots.at(1)),
                        static_cast<int64_t>(count),
                        query_starts.data(),
                        context_lens.data(),
                        tables.data(),
                        source_lens.data(),
                        sources.data()};
        nb::gil_scoped_release release;
        std::vector<int64_t> made;
        const auto is_end = [&](int64_t token) { return std::find(ends.begin(), ends.end(), token) != ends.end(); };
        for (int64_t round = 0; round < rounds; ++round) {
            plan_.run(step, choose);
            const int64_t* chosen = static_cast<const int64_t*>(plan_.chosen());
            made.insert(made.end(), chosen, chosen + (choose ? step.rows : 0));
            if (round + 1 == rounds || std::any_of(chosen, chosen + step.rows, is_end)) break;
            std::copy(chosen, chosen + step.rows, input_ids.begin());
            for (auto* counts : {&positions, &slots, &context_lens}) {
                for (int64_t& value : *counts) ++value;
            }
        }
        return made;
    }

    uintptr_t logits() const { return reinterpret_cast<uintptr_t>(plan_.logits()); }
    int64_t num_ops() const { return plan_.num_ops(); }
    int64_t bytes() const { return plan_.bytes(); }

private:
    void submit(const Op& op) override { plan_.add(op); }

    Plan plan_;
};

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // objects that live until the interpreter ends are not a leak
    m.def("available_isas", &available_isas);
    nb::class_<PackedWeight>(m, "PackedWeight")
        .def_ro("n", &PackedWeight::n)
        .def_ro("k", &PackedWeight::k)
        .def_ro("gated", &PackedWeight::gated)
        .def_prop_ro("out_columns", &PackedWeight::out_columns)
        .def_prop_ro("bytes", &PackedWeight::bytes)
        .def(
            "unpack", [](const PackedWeight& weight, uintptr_t out) { unpack(weight, at<float>(out)); }, nb::arg("out"));
    nb::class_<Adapters>(m, "Adapters")
        .def(nb::init<const PackedWeight&, int64_t>(), nb::arg("weight"), nb::arg("num_slots"), nb::keep_alive<1, 2>())
        .def("set",
             [](Adapters& adapters, int64_t slot, int64_t ranks, uintptr_t a, uintptr_t b, int type) {
                 adapters.set(slot, ranks, at<float>(a), at<float>(b), static_cast<DType>(type));
             })
        .def("clear", &Adapters::clear)
        .def_prop_ro("bytes", &Adapters::bytes);
    nb::exception<NotRecordable>(m, "NotRecordable");
    nb::class_<Operations>(m, "Operations")
        .def("linear", &Operations::linear, nb::arg("weight"), nb::arg("rows"), nb::arg("x"), nb::arg("x_type"),
             nb::arg("x_stride"), nb::arg("out"), nb::arg("out_type"), nb::arg("out_stride"), nb::arg("residual"),
             nb::arg("residual_stride"), nb::arg("activation"), nb::arg("quantize_x"), nb::arg("adapters").none() = nb::none(),
             nb::arg("adapter_slots") = 0)
        .def("attention", &Operations::attention)
        .def("norm", &Operations::norm)
        .def("rope", &Operations::rope)
        .def("store", &Operations::store)
        .def("heads", &Operations::heads)
        .def("gather", &Operations::gather, nb::arg("packed").none(), nb::arg("table"), nb::arg("type"), nb::arg("rows"),
             nb::arg("size"), nb::arg("ids"), nb::arg("scale"), nb::arg("residual"), nb::arg("out"))
        .def("argmax", &Operations::argmax);
    nb::class_<Backend, Operations>(m, "Backend")
        .def(nb::init<const std::string&, int, const std::vector<int>&>(), nb::arg("isa"), nb::arg("num_threads"),
             nb::arg("cpus") = std::vector<int>())
        .def_prop_ro("isa", &Backend::isa)
        .def_prop_ro("num_threads", &Backend::num_threads)
        .def("pack", &Backend::pack, nb::arg("format"), nb::arg("k"), nb::arg("parts"), nb::arg("group") = 0,
             nb::arg("scale_type") = 0, nb::arg("table") = std::vector<float>(), nb::arg("bias") = 0,
             nb::arg("gated") = false)
        .def("drop_zeros", &Backend::drop_zeros, nb::arg("weight"))
        .def("sample", &Backend::sample)
        .def("most_probable", &Backend::most_probable)
        .def("copy_blocks", &Backend::copy_blocks)
        .def("varlen", &Backend::varlen)
        .def("peak", &Backend::peak, nb::arg("kind"), nb::arg("seconds"));
    nb::class_<Recording, Operations>(m, "Recording")
        .def(nb::init<Backend&, int64_t, int64_t>(), nb::arg("backend"), nb::arg("tokens"), nb::arg("rows"),
             nb::keep_alive<1, 2>())
        .def("tensor", &Recording::tensor, nb::arg("address"), nb::arg("bytes"), nb::arg("rows"))
        .def("input", &Recording::input, nb::arg("number"), nb::arg("address"), nb::arg("bytes"), nb::arg("rows"))
        .def("finish", &Recording::finish, nb::arg("logits"), nb::arg("chosen"))
        .def("run", &Recording::run)
        .def_prop_ro("logits", &Recording::logits)
        .def_prop_ro("num_ops", &Recording::num_ops)
        .def_prop_ro("bytes", &Recording::bytes);
    nb::class_<ReadMeter>(m, "ReadMeter")
        .def(
            "__init__",
            [](ReadMeter* self, size_t bytes, Backend& backend) { new (self) ReadMeter(bytes, backend.table(), backend.pool()); },
            nb::arg("bytes"), nb::arg("backend"), nb::keep_alive<1, 3>())
        .def("read", &ReadMeter::read, nb::arg("past_caches"), nb::call_guard<nb::gil_scoped_release>())
        .def("measure", &ReadMeter::measure, nb::call_guard<nb::gil_scoped_release>());
}

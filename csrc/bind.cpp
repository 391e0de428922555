// The Python module `fastserve.kernels.cpu._native`. Buffers come in as addresses (torch's data_ptr()), strides in
// elements; nothing is checked here that `fastserve/kernels/cpu` checks. The interpreter lock is released while
// the pool works.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <tuple>

#include "cpu_features.h"
#include "measure.h"
#include "ops.h"

namespace nb = nanobind;
using namespace fastserve;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using WeightPart = std::tuple<int64_t, uintptr_t, uintptr_t, uintptr_t>;

class Backend {
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

    void look_up(const PackedWeight& weight, uintptr_t ids, int64_t count, uintptr_t out, int out_type) {
        nb::gil_scoped_release release;
        pool_.run({0, static_cast<size_t>(weight.k) * 4}, [&](const Worker& worker) {
            fastserve::look_up(weight, at<int64_t>(ids), count, at<void>(out), static_cast<DType>(out_type), worker);
        }, count * weight.k);
    }

    void linear(const PackedWeight& weight, int64_t rows, uintptr_t x, int x_type, int64_t x_stride, uintptr_t out,
                int out_type, int64_t out_stride, uintptr_t residual, int64_t residual_stride, int activation,
                bool quantize_x) {
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
                        quantize_x};
        nb::gil_scoped_release release;
        pool_.run(linear_scratch(args, pool_.size()), [&](const Worker& worker) { table_->linear(args, worker); },
                  rows * weight.n * weight.k / 16);
    }

    void attention(uintptr_t query, int x_type, int64_t query_stride, int64_t query_head_stride, uintptr_t out,
                   int64_t num_heads, int64_t num_kv_heads, int64_t head_size, uintptr_t keys, uintptr_t values,
                   int cache_type, const std::vector<int64_t>& key_strides, const std::vector<int64_t>& value_strides,
                   int64_t block_size, const std::vector<int64_t>& query_starts,
                   const std::vector<int64_t>& context_lens, const std::vector<uintptr_t>& block_tables, float scale,
                   float softcap, int64_t window, bool causal) {
        std::vector<const int64_t*> tables;
        for (uintptr_t address : block_tables) tables.push_back(at<const int64_t>(address));
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
        args.key_strides = {key_strides.at(0), key_strides.at(1), key_strides.at(2)};
        args.value_strides = {value_strides.at(0), value_strides.at(1), value_strides.at(2)};
        args.block_size = block_size;
        args.num_sequences = static_cast<int64_t>(context_lens.size());
        args.query_starts = query_starts.data();
        args.context_lens = context_lens.data();
        args.block_tables = tables.data();
        args.scale = scale;
        args.softcap = softcap;
        args.window = window;
        args.causal = causal;
        nb::gil_scoped_release release;
        pool_.run(attention_scratch(args), [&](const Worker& worker) { table_->attention(args, worker); });
    }

    void norm(uintptr_t x, int type, int64_t outer, int64_t inner, int64_t outer_stride, int64_t inner_stride,
              int64_t size, uintptr_t weight, uintptr_t bias, uintptr_t out, float epsilon, bool subtract_mean) {
        NormArgs args{at<void>(x),      static_cast<DType>(type), outer,         inner,   outer_stride,
                      inner_stride,     size,                     at<void>(weight), at<void>(bias), at<void>(out),
                      epsilon,          subtract_mean};
        nb::gil_scoped_release release;
        pool_.run({}, [&](const Worker& worker) { table_->norm(args, worker); }, outer * inner * size);
    }

    void rope(uintptr_t x, int type, int64_t tokens, int64_t heads, int64_t size, int64_t token_stride,
              int64_t head_stride, uintptr_t cos, uintptr_t sin, int64_t half, uintptr_t out) {
        RopeArgs args{at<void>(x),   static_cast<DType>(type), tokens,        heads, size,         token_stride,
                      head_stride,   at<void>(cos),            at<void>(sin), half,  at<void>(out)};
        nb::gil_scoped_release release;
        pool_.run({}, [&](const Worker& worker) { table_->rope(args, worker); }, tokens * heads * size);
    }

    void store(uintptr_t key, uintptr_t value, int type, int cache_type, int64_t tokens, int64_t heads, int64_t size,
               int64_t key_stride, int64_t key_head_stride, int64_t value_stride, int64_t value_head_stride,
               uintptr_t keys, uintptr_t values, uintptr_t slots) {
        StoreArgs args{at<void>(key),
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
                       at<int64_t>(slots)};
        nb::gil_scoped_release release;
        pool_.run({}, [&](const Worker& worker) { table_->store(args, worker); }, 2 * tokens * heads * size);
    }

    void activation(uintptr_t x, int type, int64_t rows, int64_t size, int64_t stride, uintptr_t out, int activation,
                    bool gated) {
        ActivationArgs args{at<void>(x),   static_cast<DType>(type),           rows, size, stride,
                            at<void>(out), static_cast<Activation>(activation), gated};
        nb::gil_scoped_release release;
        pool_.run({}, [&](const Worker& worker) { table_->activation(args, worker); }, 8 * rows * size);
    }

    void argmax(uintptr_t x, int type, int64_t rows, int64_t size, int64_t stride, uintptr_t out) {
        ArgmaxArgs args{at<void>(x), static_cast<DType>(type), rows, size, stride, at<int64_t>(out)};
        nb::gil_scoped_release release;
        pool_.run(argmax_scratch(args, pool_.size()), [&](const Worker& worker) { table_->argmax(args, worker); }, rows * size);
    }

    double peak(int kind, double seconds) {
        nb::gil_scoped_release release;
        return measure_peak(*table_, pool_, kind, seconds);
    }

    ThreadPool& pool() { return pool_; }
    const OpTable& table() const { return *table_; }

private:
    const OpTable* table_;
    ThreadPool pool_;
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
    nb::class_<Backend>(m, "Backend")
        .def(nb::init<const std::string&, int, const std::vector<int>&>(), nb::arg("isa"), nb::arg("num_threads"),
             nb::arg("cpus") = std::vector<int>())
        .def_prop_ro("isa", &Backend::isa)
        .def_prop_ro("num_threads", &Backend::num_threads)
        .def("pack", &Backend::pack, nb::arg("format"), nb::arg("k"), nb::arg("parts"), nb::arg("group") = 0,
             nb::arg("scale_type") = 0, nb::arg("table") = std::vector<float>(), nb::arg("bias") = 0,
             nb::arg("gated") = false)
        .def("look_up", &Backend::look_up)
        .def("linear", &Backend::linear)
        .def("attention", &Backend::attention)
        .def("norm", &Backend::norm)
        .def("rope", &Backend::rope)
        .def("store", &Backend::store)
        .def("activation", &Backend::activation)
        .def("argmax", &Backend::argmax)
        .def("peak", &Backend::peak, nb::arg("kind"), nb::arg("seconds"));
    nb::class_<ReadMeter>(m, "ReadMeter")
        .def(
            "__init__",
            [](ReadMeter* self, size_t bytes, Backend& backend) { new (self) ReadMeter(bytes, backend.table(), backend.pool()); },
            nb::arg("bytes"), nb::arg("backend"), nb::keep_alive<1, 3>())
        .def("measure", [](ReadMeter& self) {
            nb::gil_scoped_release release;
            return self.measure();
        });
}

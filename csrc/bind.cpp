// The Python module `fastserve.kernels.cpu._native`. Buffers come in as addresses (torch's data_ptr()), strides in
// elements; nothing is checked here that `fastserve/kernels/cpu` checks. The interpreter lock is released while
// the pool works.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>

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

class Backend {
public:
    Backend(const std::string& isa, int num_threads, const std::vector<int>& cpus)
        : table_(op_table(isa)), pool_(num_threads, cpus) {
        if (!table_) throw std::invalid_argument("instruction set '" + isa + "' is not available on this machine");
    }

    std::string isa() const { return table_->name; }
    int num_threads() const { return pool_.size(); }

    std::unique_ptr<PackedWeight> pack(int format, uintptr_t values, int64_t n, int64_t k, int64_t row_stride,
                                       int64_t group, uintptr_t scales, int scale_type, uintptr_t zeros,
                                       const std::vector<float>& table, uintptr_t bias, bool gated) {
        if (!table.empty() && table.size() != 16) throw std::invalid_argument("a codebook has 16 values");
        nb::gil_scoped_release release;
        WeightSource source{static_cast<Format>(format), at<void>(values), n, k, row_stride};
        source.group = group;
        source.scales = at<void>(scales);
        source.scale_type = static_cast<ScaleType>(scale_type);
        source.zeros = at<uint8_t>(zeros);
        source.table = table.empty() ? nullptr : table.data();
        source.bias = at<float>(bias);
        source.gated = gated;
        return fastserve::pack(source, pool_);
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
        pool_.run(linear_scratch(args, pool_.size()), [&](const Worker& worker) { table_->linear(args, worker); });
    }

    double peak(int kind, double seconds) {
        nb::gil_scoped_release release;
        return measure_peak(*table_, pool_, kind, seconds);
    }

    ThreadPool& pool() { return pool_; }

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
        .def("pack", &Backend::pack, nb::arg("format"), nb::arg("values"), nb::arg("n"), nb::arg("k"),
             nb::arg("row_stride"), nb::arg("group") = 0, nb::arg("scales") = 0, nb::arg("scale_type") = 0,
             nb::arg("zeros") = 0, nb::arg("table") = std::vector<float>(), nb::arg("bias") = 0,
             nb::arg("gated") = false)
        .def("linear", &Backend::linear)
        .def("peak", &Backend::peak, nb::arg("kind"), nb::arg("seconds"));
    nb::class_<ReadMeter>(m, "ReadMeter")
        .def(
            "__init__",
            [](ReadMeter* self, size_t bytes, Backend& backend) { new (self) ReadMeter(bytes, backend.pool()); },
            nb::arg("bytes"), nb::arg("backend"), nb::keep_alive<1, 3>())
        .def("measure", [](ReadMeter& self) {
            nb::gil_scoped_release release;
            return self.measure();
        });
}

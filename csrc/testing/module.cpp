// The CUDA kernels' own sources on the host, on NumPy arrays; and the shared math of csrc/device by itself. Built by the
// tests, in no wheel.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "testing/recording_shim.h"

#include "device/column_launch.h"
#include "match_arguments.h"
#include "record.h"
#include "testing/layers.h"

namespace py = pybind11;

namespace moment_ops {
namespace {

template <class Body>
void dispatch(const std::string& dtype, Body body) {
  if (dtype == "float32") return body(float{});
  if (dtype == "float64") return body(double{});
  if (dtype == "float16") return body(Half{});
  if (dtype == "bfloat16") return body(BFloat16{});
  throw py::value_error("dtype: got " + dtype);
}

template <class A>
A* pointer(const std::optional<py::array>& array) {
  return array ? static_cast<A*>(const_cast<void*>(array->data())) : nullptr;
}

int moments(const std::vector<LayerDescription>& layers, const std::string& dtype, int64_t correction, py::array mean,
            std::optional<py::array> var, unsigned int block_order) {
  shim::block_order_seed = block_order;
  int launched = 0;
  dispatch(dtype, [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    const Launches launches = plan_launches(make_layers(layers, sizeof(T)), sizeof(T), kReductionTile);
    HostWorkspace workspace(launches.total);
    launch_moments<T, A>(launches, workspace.pointers, {pointer<A>(mean), pointer<A>(var), correction}, 0);
    launched = static_cast<int>(launches.lists.size());
  });
  return launched;
}

void moments_backward(const std::vector<LayerDescription>& layers, const std::string& dtype,
                      std::optional<py::array> grad_mean, std::optional<py::array> grad_var, py::array mean,
                      py::array count, int64_t correction, std::optional<py::array> scale) {
  dispatch(dtype, [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    const Launches launches = plan_launches(make_layers(layers, sizeof(T)), sizeof(T), kElementwiseTile);
    const MomentGradients<A> moments{pointer<A>(grad_mean), pointer<A>(grad_var), pointer<A>(mean), pointer<A>(scale),
                                     correction};
    launch_moments_backward<T, A>(launches, {moments, pointer<int64_t>(count), 0}, 0);
  });
}

void relu_moments(const LayerDescription& description, const std::string& dtype, std::optional<py::array> bias,
                  uint32_t channel_columns, int64_t correction, py::array mean, py::array var,
                  unsigned int block_order) {
  shim::block_order_seed = block_order;
  dispatch(dtype, [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    ColumnLayer layer = make_layers({description}, sizeof(T))[0];
    const Plan plan = plan_layer(layer, sizeof(T), kReductionTile);
    HostWorkspace workspace(plan);
    const ReluArguments<T> arguments{pointer<T>(bias), static_cast<T*>(layer.out), layer.out_stride, channel_columns};
    launch_relu_moments<T, A>(layer, plan, arguments, workspace.pointers, {pointer<A>(mean), pointer<A>(var), correction},
                              0);
  });
}

void relu_moments_backward(const LayerDescription& description, const std::string& dtype,
                           std::optional<py::array> grad_mean, std::optional<py::array> grad_var, py::array mean,
                           int64_t correction) {
  dispatch(dtype, [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    ColumnLayer layer = make_layers({description}, sizeof(T))[0];
    const Plan plan = plan_layer(layer, sizeof(T), kElementwiseTile);
    launch_relu_moments_backward<T, A>(
        layer, plan, {pointer<A>(grad_mean), pointer<A>(grad_var), pointer<A>(mean), nullptr, correction}, 0);
  });
}

// NumPy's arrays, answering as tensors do.
struct Array : py::array {
  using py::array::array;
  void* mutable_data_ptr() const { return const_cast<void*>(data()); }
};

// An argument of an operator, which becomes what the member is that it initialises.
struct Given {
  py::handle value;

  operator bool() { return value.cast<bool>(); }
  operator int64_t() { return value.cast<int64_t>(); }
  operator double() { return value.cast<double>(); }
  operator Array() { return py::reinterpret_borrow<Array>(value); }
  operator std::optional<Array>() { return value.is_none() ? std::nullopt : std::make_optional(Array(*this)); }
  operator std::vector<Array>() {
    std::vector<Array> result;
    for (py::handle item : value) result.push_back(Given{item});
    return result;
  }
  operator std::vector<double>() { return value.cast<std::vector<double>>(); }
};

// `arguments` as in the operator's schema, but that features are in `layers`.
void match(const std::vector<LayerDescription>& layers, const std::string& dtype, py::tuple arguments,
           unsigned int block_order) {
  shim::block_order_seed = block_order;
  const auto from = read_record<MatchArguments<Array>>([&](size_t i) { return Given{arguments[i]}; });
  dispatch(dtype, [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    dispatch_average(from.average_kind, [&](auto average) {
      const auto matching = make_matching<decltype(average), A>(from);
      const int64_t columns = from.target_mean.size();
      const Launches launches = plan_launches(make_layers(layers, sizeof(T)), sizeof(T), kReductionTile);
      HostLosses losses(layers.empty() ? match_blocks<A>(columns) : launches.total.strips);
      if (layers.empty()) {
        launch_match_moments(data<A>(from.mean), data<A>(from.var), columns, losses.pointers, matching, 0);
      } else {
        HostWorkspace workspace(launches.total);
        launch_match_features<T>(launches, workspace.pointers, losses.pointers, matching, 0);
      }
    });
  });
}

// How a launch of one layer is cut.
py::dict plan(int rows, int64_t columns, int element_size, bool vectors, bool elementwise) {
  ColumnLayer layer{};
  layer.rows = rows;
  layer.columns = columns;
  layer.vectors = vectors;
  const Plan plan = plan_layer(layer, element_size, elementwise ? kElementwiseTile : kReductionTile);
  py::dict result;
  result["blocks"] = plan.blocks;
  result["lanes"] = layer.lanes();
  result["groups"] = layer.groups();
  result["chunks"] = layer.chunks;
  return result;
}

// (step size, root of the second bias correction) of Adam.
std::pair<double, double> adam_step(double lr, double beta1, double beta2, int64_t step) {
  const double options[] = {lr, beta1, beta2, 0, 0};
  AdamAverage::Parameters<double> parameters(options);
  parameters.set_step(static_cast<double>(step));
  return {parameters.step_size, parameters.root_bias_correction2};
}

// The weights of the past and of the batch in a moving average with bias correction.
std::pair<double, double> moving_weights(double decay, int64_t step) {
  const double options[] = {decay, 1};
  MovingAverage::Parameters<double> parameters(options);
  parameters.set_step(static_cast<double>(step));
  return {parameters.past, parameters.batch};
}

uint16_t to_bits(const std::string& dtype, float value) {
  Half half;
  BFloat16 bfloat16;
  store(half, value);
  store(bfloat16, value);
  return dtype == "float16" ? half.bits : bfloat16.bits;
}

float from_bits(const std::string& dtype, uint16_t bits) {
  return dtype == "float16" ? load(Half{bits}) : load(BFloat16{bits});
}

// (mean, m2) of two groups of rows together.
std::pair<double, double> merge_pair(double mean_a, double m2_a, int64_t count_a, double mean_b, double m2_b,
                                     int64_t count_b) {
  merge(mean_a, m2_a, mean_b, m2_b, merge_factors<double>(count_a, count_b));
  return {mean_a, m2_a};
}

PYBIND11_MODULE(moment_ops_testing, m) {
  py::class_<LayerDescription>(m, "Layer")
      .def(py::init<>())
      .def_readwrite("x", &LayerDescription::x)
      .def_readwrite("row_stride", &LayerDescription::row_stride)
      .def_readwrite("rows", &LayerDescription::rows)
      .def_readwrite("columns", &LayerDescription::columns)
      .def_readwrite("inner", &LayerDescription::inner)
      .def_readwrite("outer", &LayerDescription::outer)
      .def_readwrite("grad", &LayerDescription::grad)
      .def_readwrite("grad_stride", &LayerDescription::grad_stride)
      .def_readwrite("out", &LayerDescription::out)
      .def_readwrite("out_stride", &LayerDescription::out_stride);
  m.def("moments", &moments);
  m.def("moments_backward", &moments_backward);
  m.def("match", &match);
  m.def("relu_moments", &relu_moments);
  m.def("relu_moments_backward", &relu_moments_backward);
  m.def("plan", &plan);
  m.def("adam_step", &adam_step);
  m.def("moving_weights", &moving_weights);
  m.def("to_bits", &to_bits);
  m.def("from_bits", &from_bits);
  m.def("merge", &merge_pair);
  m.attr("max_layers") = kMaxLayers;
  m.attr("block_rows") = kBlockRows;
  m.def("record_with", [](decltype(shim::recorder) recorder, decltype(shim::on_allocation) on_allocation) {
    shim::recorder = recorder;
    shim::on_allocation = on_allocation;
  });
}

}  // namespace
}  // namespace moment_ops

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

template <class A>
MatchVectors<A> match_vectors(const py::dict& d) {
  const auto get = [&](const char* name) -> A* {
    return d.contains(name) ? static_cast<A*>(const_cast<void*>(py::array(d[name]).data())) : nullptr;
  };
  const A scale = d.contains("scale") ? d["scale"].cast<A>() : A(1);
  return {get("target"), get("weight"), scale, get("average"), get("exp_avg"), get("exp_avg_sq"), get("grad")};
}

// `options` as in the operator's schema; `layers` empty: from the moments in `mean` and `var`.
void match(const std::vector<LayerDescription>& layers, const std::string& dtype, int64_t correction, py::array mean,
           std::optional<py::array> var, py::dict mean_vectors, py::dict var_vectors, std::optional<py::array> started,
           py::array step, int average, std::vector<double> options, double reduction, bool update, py::array loss,
           unsigned int block_order) {
  shim::block_order_seed = block_order;
  dispatch(dtype, [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    const auto kind = static_cast<Average>(average);
    MatchArguments<A> arguments{};
    arguments.mean = match_vectors<A>(mean_vectors);
    if (var_vectors.size() != 0) arguments.var = match_vectors<A>(var_vectors);
    arguments.started = pointer<uint8_t>(started);
    arguments.parameters.reduction = A(reduction);
    arguments.parameters.update = update && kind != Average::none;
    if (kind == Average::moving) {
      arguments.parameters.decay = A(options[0]);
      arguments.parameters.one_minus_decay = A(1 - options[0]);
    } else if (kind == Average::adam) {
      arguments.adam = adam_schedule(options[0], options[1], options[2]);
      arguments.parameters.beta1_complement = A(1 - options[1]);
      arguments.parameters.beta2 = A(options[2]);
      arguments.parameters.beta2_complement = A(1 - options[2]);
      arguments.parameters.eps = A(options[3]);
      arguments.parameters.gradient_scale = A(options[4]);
    }
    arguments.step = pointer<int64_t>(step);
    arguments.correction = correction;
    arguments.loss = pointer<A>(loss);
    std::vector<unsigned int> ticket = shim::allocate(1, 0u);
    arguments.ticket = ticket.data();
    const int64_t columns = mean.size();
    const Launches launches = plan_launches(make_layers(layers, sizeof(T)), sizeof(T), kReductionTile);
    arguments.strips = layers.empty() ? match_blocks<A>(columns) : launches.total.strips;
    std::vector<double> losses = shim::allocate(arguments.strips, std::nan(""));
    arguments.losses = losses.data();
    if (layers.empty()) {
      launch_match_moments<A>(kind, pointer<A>(mean), pointer<A>(var), columns, arguments, 0);
    } else {
      arguments.batch_mean = pointer<A>(mean);
      HostWorkspace workspace(launches.total);
      launch_match_features<T, A>(kind, launches, workspace.pointers, arguments, 0);
    }
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
  MatchParameters<double> parameters{};
  set_step(parameters, adam_schedule(lr, beta1, beta2), static_cast<double>(step));
  return {parameters.step_size, parameters.root_bias_correction2};
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

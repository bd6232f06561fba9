// Runs every CUDA kernel under tsan_shim.h, and compares with float64, so that a run that goes wrong does not pass for
// one without races. The argument FILE:LINE makes that barrier or fence of csrc/device order nothing.
#include <cstdio>
#include <vector>

#include "testing/tsan_shim.h"

#include "device/column_launch.h"
#include "testing/layers.h"

namespace moment_ops {
namespace {

template <class T>
constexpr double kEpsilon = sizeof(T) == 2 ? 0x1p-7 : 0x1p-23;
// A float32 variance may be off by 1e-5, and a few roundings follow.
constexpr double kStatistics = 2e-5;

bool right = true;

void expect(const char* what, double actual, double exact, double bound) {
  if (std::abs(actual - exact) <= bound * (1 + std::abs(exact))) return;
  if (right) printf("%s: got %.9g, expected %.9g within %.1g\n", what, actual, exact, bound);
  right = false;
}

template <class A, class B>
void expect(const char* what, const std::vector<A>& actual, const std::vector<B>& exact) {
  for (size_t i = 0; i < exact.size(); ++i) expect(what, actual[i], exact[i], kStatistics);
}

// Numbers in [-1, 1) that every format holds exactly, and their sums, too.
template <class T>
std::vector<T> numbers(int64_t size, uint32_t seed) {
  std::vector<T> result(size);
  for (T& value : result) {
    seed = seed * 1664525u + 1013904223u;
    store(value, static_cast<accumulate_t<T>>(static_cast<int>(seed >> 25) - 64) / 64);
  }
  return result;
}

struct Shape {
  int rows;
  int64_t columns;
  int64_t gap = 0;  // elements between rows
  int inner = 1;
};

template <class T>
struct Features {
  std::vector<std::vector<T>> x, grad, out;
  std::vector<ColumnLayer> layers;
  int64_t columns = 0;

  explicit Features(const std::vector<Shape>& shapes) {
    std::vector<LayerDescription> descriptions;
    for (const Shape& shape : shapes) {
      const int64_t stride = shape.columns + shape.gap;
      const auto address = [&](std::vector<std::vector<T>>& memory, std::vector<T> values) {
        memory.push_back(std::move(values));
        return reinterpret_cast<uintptr_t>(memory.back().data());
      };
      descriptions.push_back({address(x, numbers<T>(shape.rows * stride, 1)), stride, shape.rows, shape.columns,
                              shape.inner, static_cast<int32_t>(shape.columns / shape.inner),
                              address(grad, numbers<T>(shape.rows * stride, 2)), stride,
                              address(out, std::vector<T>(shape.rows * stride)), stride});
      columns += shape.columns;
    }
    layers = make_layers(descriptions, sizeof(T));
  }
};

// Calls `body` with the place of every feature in memory, and of its column in the packed vectors.
template <class Body>
void for_all(const ColumnLayer& layer, Body body) {
  for (int64_t row = 0; row < layer.rows; ++row) {
    for (int64_t column = 0; column < layer.columns; ++column) {
      body(row * layer.row_stride + column, layer.packed(column));
    }
  }
}

struct ExactMoments {
  std::vector<double> mean, var;

  template <class T>
  ExactMoments(const std::vector<ColumnLayer>& layers, const std::vector<std::vector<T>>& memory) {
    for (size_t i = 0; i < layers.size(); ++i) {
      const int64_t columns = layers[i].offset + layers[i].columns;
      mean.resize(columns);
      var.resize(columns);
      for_all(layers[i], [&](int64_t at, int64_t packed) { mean[packed] += load(memory[i][at]) / layers[i].rows; });
      for_all(layers[i], [&](int64_t at, int64_t packed) {
        var[packed] += std::pow(load(memory[i][at]) - mean[packed], 2) / (layers[i].rows - 1);
      });
    }
  }
};

template <class T>
void run_moments(const Features<T>& features) {
  using A = accumulate_t<T>;
  const Launches launches = plan_launches(features.layers, sizeof(T), kReductionTile);
  const HostWorkspace workspace(launches.total);
  std::vector<A> mean(features.columns, NAN), var(features.columns, NAN);
  launch_moments<T, A>(launches, workspace.pointers, {mean.data(), var.data(), 1}, 0);
  const ExactMoments exact(features.layers, features.x);
  expect("mean", mean, exact.mean);
  expect("var", var, exact.var);
}

// As many as any average takes, and values that suit them all.
constexpr double kOptions[] = {0.125, 0.5, 0.75, 1e-8, 2};

// The vectors of a mean or a variance in match_. What an average keeps may be a square.
template <class Average, class A>
struct Quantity {
  std::vector<A> target, weight, grad;
  std::vector<std::vector<A>> kept;

  Quantity(int64_t columns, uint32_t seed)
      : target(numbers<A>(columns, seed)), weight(numbers<A>(columns, seed + 1)), grad(columns, A(NAN)) {
    for (int k = 0; k < Average::kKept; ++k) {
      kept.push_back(numbers<A>(columns, seed + 2 + k));
      for (A& value : kept.back()) value = std::abs(value);
    }
  }

  MatchVectors<Average, A> pointers() {
    MatchVectors<Average, A> result{target.data(), weight.data(), A(0.5), {}, grad.data()};
    for (int k = 0; k < Average::kKept; ++k) result.kept[k] = kept[k].data();
    return result;
  }
};

template <class Average, class A>
void expect(const Quantity<Average, A>& actual, const Quantity<Average, double>& exact) {
  for (int k = 0; k < Average::kKept; ++k) expect("kept", actual.kept[k], exact.kept[k]);
  expect("grad", actual.grad, exact.grad);
}

// What match_ reads and writes, the same in every format.
template <class Average, class A>
struct Match {
  Quantity<Average, A> mean, var;
  std::vector<uint8_t> started;
  std::vector<A> batch_mean;
  int64_t step = 3;
  A loss = A(NAN);

  explicit Match(int64_t columns)
      : mean(columns, 3), var(columns, 7), started(columns), batch_mean(columns, A(NAN)) {
    for (int64_t i = 0; i < columns; i += 2) started[i] = 1;
  }

  Matching<Average, A> pointers(bool has_var) {
    Matching<Average, A> result{};
    result.mean = mean.pointers();
    if (has_var) result.var = var.pointers();
    result.parameters = typename Average::template Parameters<A>(kOptions);
    result.reduction = A(0.25);
    result.update = Average::kKept > 0;
    result.started = started.data();
    result.step = &step;
    result.correction = 1;
    result.batch_mean = batch_mean.data();
    result.loss = &loss;
    return result;
  }
};

// The same step in float64, column after column.
template <class Average, class A>
void expect_match(const Match<Average, A>& actual, const ExactMoments& moments, bool has_var) {
  const auto columns = static_cast<int64_t>(moments.mean.size());
  Match<Average, double> exact(columns);
  const Matching<Average, double> matching = exact.pointers(has_var);
  double loss = 0;
  for (int64_t at = 0; at < columns; ++at) {
    loss += match_columns<1>(matching, &exact.step, 0, [&](int) {
      return MatchColumn<double>{true, at, moments.mean[at], moments.var[at]};
    });
  }
  expect(actual.mean, exact.mean);
  if (has_var) expect(actual.var, exact.var);
  expect("started", actual.started, exact.started);
  expect("step", actual.step, exact.step + (Average::kKept > 0), 0);
  expect("loss", actual.loss, loss, kStatistics);
}

template <class Average, class T>
void run_match(const Features<T>& features, bool has_var) {
  using A = accumulate_t<T>;
  const Launches launches = plan_launches(features.layers, sizeof(T), kReductionTile);
  const HostWorkspace workspace(launches.total);
  const ExactMoments exact(features.layers, features.x);

  Match<Average, A> from_features(features.columns);
  launch_match_features<T>(launches, workspace.pointers, HostLosses(launches.total.strips).pointers,
                           from_features.pointers(has_var), 0);
  expect("batch_mean", from_features.batch_mean, exact.mean);
  expect_match(from_features, exact, has_var);

  const std::vector<A> mean(exact.mean.begin(), exact.mean.end()), var(exact.var.begin(), exact.var.end());
  Match<Average, A> from_moments(features.columns);
  launch_match_moments(mean.data(), has_var ? var.data() : nullptr, features.columns,
                       HostLosses(match_blocks<A>(features.columns)).pointers, from_moments.pointers(has_var), 0);
  expect_match(from_moments, exact, has_var);
}

// Gradients of means and variances, and of the features.
template <class A>
struct GivenGradients {
  std::vector<A> grad_mean, grad_var, mean;

  explicit GivenGradients(const ExactMoments& moments)
      : grad_mean(numbers<A>(moments.mean.size(), 11)),
        grad_var(numbers<A>(moments.mean.size(), 12)),
        mean(moments.mean.begin(), moments.mean.end()) {}

  MomentGradients<A> pointers(const A* scale) const {
    return {grad_mean.data(), grad_var.data(), mean.data(), scale, 1};
  }

  double of_feature(double value, int64_t packed, double rows) const {
    return grad_mean[packed] / rows + 2 * grad_var[packed] / (rows - 1) * (value - mean[packed]);
  }
};

template <class T>
void run_moments_backward(const std::vector<Shape>& shapes, bool added) {
  using A = accumulate_t<T>;
  Features<T> features(shapes);
  std::vector<int64_t> count;
  for (ColumnLayer& layer : features.layers) {
    if (!added) layer.grad = nullptr;
    count.push_back(layer.rows);
  }
  const GivenGradients<A> gradients(ExactMoments(features.layers, features.x));
  const A scale = 0.375;
  launch_moments_backward<T, A>(plan_launches(features.layers, sizeof(T), kElementwiseTile),
                                {gradients.pointers(&scale), count.data(), 0}, 0);
  for (size_t i = 0; i < shapes.size(); ++i) {
    for_all(features.layers[i], [&](int64_t at, int64_t packed) {
      const double grad = scale * gradients.of_feature(load(features.x[i][at]), packed, shapes[i].rows);
      const double sum = grad + (added ? load(features.grad[i][at]) : 0);
      expect("moments_backward", load(features.out[i][at]), sum, 8 * kEpsilon<T>);
    });
  }
}

template <class T>
void run_relu_moments(const Shape& shape, bool has_bias) {
  using A = accumulate_t<T>;
  Features<T> features({shape});
  ColumnLayer& layer = features.layers[0];
  const Plan plan = plan_layer(layer, sizeof(T), kReductionTile);
  const HostWorkspace workspace(plan);
  const auto channel_columns = static_cast<uint32_t>(layer.outer);
  const std::vector<T> bias = numbers<T>(layer.columns / channel_columns, 13);
  const ReluArguments<T> arguments{has_bias ? bias.data() : nullptr, features.out[0].data(), layer.out_stride,
                                   channel_columns};
  std::vector<A> mean(layer.columns, NAN), var(layer.columns, NAN);
  launch_relu_moments<T, A>(layer, plan, arguments, workspace.pointers, {mean.data(), var.data(), 1}, 0);
  for_all(layer, [&](int64_t at, int64_t packed) {
    const double sum = load(features.x[0][at]) + (has_bias ? load(bias[packed / channel_columns]) : 0);
    expect("relu", load(features.out[0][at]), std::max(0.0, sum), 0);
  });
  const ExactMoments exact(features.layers, features.out);
  expect("relu's mean", mean, exact.mean);
  expect("relu's var", var, exact.var);
}

template <class T>
void run_relu_moments_backward(const Shape& shape, bool added) {
  using A = accumulate_t<T>;
  Features<T> features({shape});
  ColumnLayer& layer = features.layers[0];
  if (!added) layer.grad = nullptr;
  const Plan plan = plan_layer(layer, sizeof(T), kElementwiseTile);
  const GivenGradients<A> gradients(ExactMoments(features.layers, features.x));
  launch_relu_moments_backward<T, A>(layer, plan, gradients.pointers(nullptr), 0);
  for_all(layer, [&](int64_t at, int64_t packed) {
    const double y = load(features.x[0][at]);
    const double sum = gradients.of_feature(y, packed, shape.rows) + (added ? load(features.grad[0][at]) : 0);
    expect("relu_moments_backward", load(features.out[0][at]), y <= 0 ? 0 : sum, 8 * kEpsilon<T>);
  });
}

// Small: a block is a thread of the host, and a thread of it costs the sanitizer half a millisecond.
const std::vector<Shape> kOneChunk{{70, 20, 1}, {5, 30}, {6, 24}};
const std::vector<Shape> kPermuted{{12, 12, 0, 3}};
const std::vector<Shape> kNarrowChunks{{1100, 24}, {1100, 5}};
const std::vector<Shape> kWideChunks{{520, 130, 1}}, kWideVectors{{513, 128}};
// Folded twice.
const std::vector<Shape> kManyChunks{{4100, 3}};

// The second list goes to another launch: layers without columns fill the first, and take no blocks.
std::vector<Shape> two_launches(std::vector<Shape> first, const std::vector<Shape>& second) {
  first.resize(kMaxLayers, {1, 0});
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

template <class T>
void run() {
  for (const auto& shapes : {two_launches(kNarrowChunks, kOneChunk), kWideChunks, kWideVectors, kManyChunks}) {
    const Features<T> features(shapes);
    run_moments(features);
#define MOMENT_OPS_RUN_MATCH(Average) run_match<Average>(features, Average::kNumber % 2 == 0);
    MOMENT_OPS_AVERAGES(MOMENT_OPS_RUN_MATCH)
#undef MOMENT_OPS_RUN_MATCH
  }
  run_moments(Features<T>(kPermuted));
  for (const bool added : {false, true}) {
    run_moments_backward<T>(two_launches({{130, 130}}, kOneChunk), added);
    run_moments_backward<T>(kPermuted, added);
    for (const auto& shapes : {kOneChunk, kPermuted}) {
      for (const Shape& shape : shapes) run_relu_moments_backward<T>(shape, added);
    }
  }
  for (const auto& shapes : {kNarrowChunks, kOneChunk, kPermuted, kWideChunks}) {
    for (const Shape& shape : shapes) run_relu_moments<T>(shape, shape.columns % 2 == 0);
  }
}

}  // namespace
}  // namespace moment_ops

int main(int argc, char** argv) {
  if (argc > 1) shim::disordered = argv[1];
  moment_ops::run<float>();
  moment_ops::run<moment_ops::BFloat16>();
  return moment_ops::right ? 0 : 1;
}

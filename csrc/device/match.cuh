// match_ on the GPU: the running average's step, the loss and its derivatives, as the epilogue of the reduction or from
// moments that exist.
#pragma once

#include "device/column_moments.cuh"
#include "device/match.h"

namespace moment_ops {

template <class A>
struct MatchArguments {
  MatchVectors<A> mean, var;  // var.target is null where means alone are matched
  uint8_t* started;
  MatchParameters<A> parameters;  // what depends on the step is set on the device
  AdamSchedule adam;
  int64_t* step;
  A* batch_mean;  // fused with the reduction only
  int64_t correction;
  double* losses;  // one per strip
  unsigned int* ticket;
  A* loss;
  int32_t strips;  // over all launches
};

// The step is on the device and is advanced by the last block, when all others have read it.
template <Average KIND, class A>
__device__ __forceinline__ int64_t load_step(const MatchArguments<A>& arguments) {
  return KIND == Average::adam ? *arguments.step : 0;
}

// The parameters with Adam's bias corrections for the step after `step`, or for `step` where nothing is updated.
template <Average KIND, class A>
__device__ __forceinline__ MatchParameters<A> with_step(const MatchArguments<A>& arguments, int64_t step) {
  MatchParameters<A> parameters = arguments.parameters;
  const int64_t steps = step + (parameters.update ? 1 : 0);
  if (KIND == Average::adam) set_step(parameters, arguments.adam, static_cast<double>(steps));
  return parameters;
}

// A column that a thread matches, at its packed place. `var` is not used where means alone are matched.
template <class A>
struct MatchColumn {
  bool present;
  int64_t at;
  A mean, var;
};

// A column's entries of the packed vectors of one quantity.
template <class A>
struct MatchEntries {
  A target, weight, average, exp_avg, exp_avg_sq;
};

template <Average KIND, class A>
__device__ __forceinline__ MatchEntries<A> load_entries(const MatchVectors<A>& v, int64_t at) {
  MatchEntries<A> entries{v.target[at], A(1), A(0), A(0), A(0)};
  if (v.weight != nullptr) entries.weight = v.weight[at];
  if (KIND != Average::none) entries.average = v.average[at];
  if (KIND == Average::adam) {
    entries.exp_avg = v.exp_avg[at];
    entries.exp_avg_sq = v.exp_avg_sq[at];
  }
  return entries;
}

template <Average KIND, class A>
__device__ __forceinline__ A match_quantity(const MatchVectors<A>& v, int64_t at, A value, MatchEntries<A> entries,
                                            bool store, bool started, const MatchParameters<A>& p) {
  const A weight = entries.weight * v.scale;
  A loss, grad;
  if constexpr (KIND == Average::none) {
    loss = match_none(value, entries.target, weight, grad, p);
  } else if constexpr (KIND == Average::moving) {
    loss = match_moving(value, entries.target, weight, started, store, entries.average, grad, p);
  } else {
    loss = match_adam(value, entries.target, weight, store, entries.average, entries.exp_avg, entries.exp_avg_sq, grad,
                      p);
  }
  if (KIND != Average::none && store) v.average[at] = entries.average;
  if (KIND == Average::adam && store) {
    v.exp_avg[at] = entries.exp_avg;
    v.exp_avg_sq[at] = entries.exp_avg_sq;
  }
  v.grad[at] = grad;
  return loss;
}

// Columns that a thread matches at once: the entries of more would not fit into its registers.
template <class A>
inline constexpr int kMatchColumns = kVectorBytes / sizeof(A);

// Matches `column(first)` and the COUNT - 1 after it: all of their loads are in flight before the first is used. Adam's
// step is worked out meanwhile, by every thread: to hand it around would take a barrier.
template <Average KIND, int COUNT, class A, class Column>
__device__ __forceinline__ double match_columns(const MatchArguments<A>& arguments, int64_t step, int first,
                                                const Column& column) {
  const bool has_var = arguments.var.target != nullptr;
  MatchColumn<A> columns[COUNT];
  MatchEntries<A> mean[COUNT] = {}, var[COUNT] = {};
  uint8_t started[COUNT] = {};
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    columns[i] = column(first + i);
    if (!columns[i].present) continue;
    mean[i] = load_entries<KIND>(arguments.mean, columns[i].at);
    if (has_var) var[i] = load_entries<KIND>(arguments.var, columns[i].at);
    if (KIND == Average::moving) started[i] = arguments.started[columns[i].at];
  }
  const MatchParameters<A> parameters = with_step<KIND>(arguments, step);
  double loss = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const MatchColumn<A>& c = columns[i];
    if (!c.present) continue;
    const bool store = parameters.update && is_finite(c.mean) && (!has_var || is_finite(c.var));
    const bool is_started = started[i] != 0;
    loss += match_quantity<KIND>(arguments.mean, c.at, c.mean, mean[i], store, is_started, parameters);
    if (has_var) loss += match_quantity<KIND>(arguments.var, c.at, c.var, var[i], store, is_started, parameters);
    if (KIND == Average::moving && store) arguments.started[c.at] = 1;
    if (arguments.batch_mean != nullptr) arguments.batch_mean[c.at] = c.mean;
  }
  return loss;
}

// Adds up one number per thread, in a fixed order, and leaves the sum in shared[0], for thread 0. There has to be a
// barrier between two sums in the same memory.
__device__ __forceinline__ void sum_block(double value, double* shared) {
  shared[threadIdx.x] = value;
  for (int span = kThreads / 2; span > 0; span /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < span) shared[threadIdx.x] += shared[threadIdx.x + span];
  }
}

// Called by the block that completed a strip; the last of all adds the strips up and advances the step.
template <Average KIND, class A>
__device__ __forceinline__ void finish_loss(const MatchArguments<A>& arguments, int strip, double thread_loss,
                                            double* shared) {
  sum_block(thread_loss, shared);
  if (threadIdx.x == 0) __stcg(arguments.losses + strip, shared[0]);
  if (!arrives_last(arguments.ticket, static_cast<unsigned int>(arguments.strips))) return;
  double loss = 0;
  for (int i = static_cast<int>(threadIdx.x); i < arguments.strips; i += kThreads) loss += __ldcg(arguments.losses + i);
  sum_block(loss, shared);
  if (threadIdx.x == 0) {
    *arguments.loss = static_cast<A>(shared[0]);
    if (KIND != Average::none && arguments.parameters.update) ++*arguments.step;
  }
}

// Of a layer whose columns lie in packed order.
template <Average KIND, int WIDTH, class T, class A>
__device__ __forceinline__ void match_strip(const ColumnLayer& layer, Workspace workspace, BlockMoments<WIDTH>& moments,
                                            double* shared_losses, const MatchArguments<A>& arguments) {
  const StripColumns strip = reduce_strip<WIDTH, A>(layer, workspace, moments, FeaturesOf<WIDTH, T>{layer});
  if (!strip.done) return;
  const int64_t step = load_step<KIND>(arguments);
  const A scale = variance_scale<A>(layer, arguments.correction);
  const auto column = [&](int i) -> MatchColumn<A> {
    const int j = i * kThreads + static_cast<int>(threadIdx.x);
    if (j >= strip.count) return {};
    return {true, layer.offset + strip.first + j, static_cast<A>(moments.mean[moments.at(j)]),
            static_cast<A>(moments.m2[moments.at(j)]) * scale};
  };
  constexpr int COUNT = WIDTH < kMatchColumns<A> ? WIDTH : kMatchColumns<A>;
  double loss = 0;
#pragma unroll
  for (int i = 0; i < WIDTH; i += COUNT) loss += match_columns<KIND, COUNT>(arguments, step, i, column);
  finish_loss<KIND>(arguments, layer.first_strip + strip.index, loss, shared_losses);
}

// Four blocks to a multiprocessor hold enough loads in flight; asking for more would spill.
template <Average KIND, class T, class A>
__global__ void __launch_bounds__(kThreads, 4)
    match_features_kernel(const __grid_constant__ ColumnLayers list, Workspace workspace,
                          MatchArguments<A> arguments) {
  constexpr int WIDTH = kVectorBytes / sizeof(T);
  __shared__ BlockMoments<WIDTH> moments;
  __shared__ double shared_losses[kThreads];
  const ColumnLayer& layer = list.layers[find_layer(list, blockIdx.x)];
  if (layer.vectors) {
    match_strip<KIND, WIDTH, T>(layer, workspace, moments, shared_losses, arguments);
  } else {
    match_strip<KIND, 1, T>(layer, workspace, reinterpret_cast<BlockMoments<1>&>(moments), shared_losses, arguments);
  }
}

// From packed moments.
template <Average KIND, class A>
__global__ void __launch_bounds__(kThreads)
    match_moments_kernel(const A* mean, const A* var, int64_t columns, MatchArguments<A> arguments) {
  __shared__ double shared_losses[kThreads];
  const auto column = [&](int i) -> MatchColumn<A> {
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * kMatchColumns<A> + i) * kThreads + threadIdx.x;
    if (at >= columns) return {};
    return {true, at, mean[at], var != nullptr ? var[at] : A(0)};
  };
  const double loss = match_columns<KIND, kMatchColumns<A>>(arguments, load_step<KIND>(arguments), 0, column);
  finish_loss<KIND>(arguments, static_cast<int>(blockIdx.x), loss, shared_losses);
}

}  // namespace moment_ops

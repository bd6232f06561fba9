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
  double lr, beta1, beta2;
  int64_t* step;
  A* batch_mean;  // fused with the reduction only
  int64_t correction;
  double* losses;  // one per strip
  unsigned int* ticket;
  A* loss;
  int32_t strips;  // over all launches
};

// The parameters with Adam's bias corrections for this step. The step is on the device and is advanced by the last
// block, when all others have read it.
template <Average KIND, class A>
__device__ __forceinline__ void prepare_step(const MatchArguments<A>& arguments, A* shared_step) {
  if (KIND == Average::adam && threadIdx.x == 0) {
    const double step = static_cast<double>(*arguments.step + (arguments.parameters.update ? 1 : 0));
    shared_step[0] = static_cast<A>(arguments.lr / (1 - pow(arguments.beta1, step)));
    shared_step[1] = static_cast<A>(sqrt(1 - pow(arguments.beta2, step)));
  }
}

template <Average KIND, class A>
__device__ __forceinline__ MatchParameters<A> with_step(const MatchArguments<A>& arguments, const A* shared_step) {
  MatchParameters<A> parameters = arguments.parameters;
  if (KIND == Average::adam) {
    parameters.step_size = shared_step[0];
    parameters.root_bias_correction2 = shared_step[1];
  }
  return parameters;
}

template <Average KIND, class A>
__device__ __forceinline__ A match_quantity(const MatchVectors<A>& v, int64_t at, A value, bool store, bool started,
                                            const MatchParameters<A>& p) {
  const A weight = v.weight != nullptr ? v.weight[at] * v.scale : v.scale;
  A loss, grad;
  if constexpr (KIND == Average::none) {
    loss = match_none(value, v.target[at], weight, grad, p);
  } else if constexpr (KIND == Average::moving) {
    A average = v.average[at];
    loss = match_moving(value, v.target[at], weight, started, store, average, grad, p);
    if (store) v.average[at] = average;
  } else {
    A average = v.average[at], exp_avg = v.exp_avg[at], exp_avg_sq = v.exp_avg_sq[at];
    loss = match_adam(value, v.target[at], weight, store, average, exp_avg, exp_avg_sq, grad, p);
    if (store) {
      v.average[at] = average;
      v.exp_avg[at] = exp_avg;
      v.exp_avg_sq[at] = exp_avg_sq;
    }
  }
  v.grad[at] = grad;
  return loss;
}

// One column at its packed place; `var` is not read where means alone are matched.
template <Average KIND, class A>
__device__ __forceinline__ double match_column(const MatchArguments<A>& arguments, const MatchParameters<A>& parameters,
                                               int64_t at, A mean, A var) {
  const bool has_var = arguments.var.target != nullptr;
  const bool store = parameters.update && is_finite(mean) && (!has_var || is_finite(var));
  const bool started = KIND == Average::moving && arguments.started[at] != 0;
  double loss = match_quantity<KIND>(arguments.mean, at, mean, store, started, parameters);
  if (has_var) loss += match_quantity<KIND>(arguments.var, at, var, store, started, parameters);
  if (KIND == Average::moving && store) arguments.started[at] = 1;
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

template <Average KIND, int WIDTH, class T, class A>
__device__ __forceinline__ void match_strip(const ColumnLayer& layer, int strip, int chunk, Workspace workspace,
                                            GroupMoments<WIDTH>& shared, double* shared_losses,
                                            const MatchArguments<A>& arguments) {
  __shared__ A shared_step[2];
  prepare_step<KIND>(arguments, shared_step);
  bool strip_done;
  const Columns<A, WIDTH> mine = reduce_strip<WIDTH, A>(layer, strip, chunk, workspace, shared, strip_done,
                                                            FeaturesOf<WIDTH, T>{layer});
  if (!strip_done) return;
  __syncthreads();
  double loss = 0;
  if (mine.complete) {
    const MatchParameters<A> parameters = with_step<KIND>(arguments, shared_step);
    const A scale = variance_scale<A>(layer, arguments.correction);
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) {
      const int64_t packed = layer.packed(mine.first + c);
      arguments.batch_mean[packed] = mine.moments.mean[c];
      loss += match_column<KIND>(arguments, parameters, packed, mine.moments.mean[c], mine.moments.m2[c] * scale);
    }
  }
  finish_loss<KIND>(arguments, layer.first_strip + strip, loss, shared_losses);
}

// Four blocks to a multiprocessor hold enough loads in flight; asking for more would spill.
template <Average KIND, class T, class A>
__global__ void __launch_bounds__(kThreads, 4)
    match_features_kernel(const __grid_constant__ ColumnLayers list, Workspace workspace,
                          MatchArguments<A> arguments) {
  constexpr int WIDTH = kVectorBytes / sizeof(T);
  __shared__ GroupMoments<WIDTH> shared;
  __shared__ double shared_losses[kThreads];
  const ColumnLayer& layer = list.layers[find_layer(list, blockIdx.x)];
  const int block = static_cast<int>(blockIdx.x) - layer.first_block;
  const int strip = block / layer.chunks, chunk = block % layer.chunks;
  if (layer.vectors) {
    match_strip<KIND, WIDTH, T>(layer, strip, chunk, workspace, shared, shared_losses, arguments);
  } else {
    match_strip<KIND, 1, T>(layer, strip, chunk, workspace, reinterpret_cast<GroupMoments<1>&>(shared), shared_losses,
                            arguments);
  }
}

inline constexpr int kMatchColumns = 4 * kThreads;

// From packed moments; every block takes kMatchColumns columns.
template <Average KIND, class A>
__global__ void __launch_bounds__(kThreads)
    match_moments_kernel(const A* mean, const A* var, int64_t columns, MatchArguments<A> arguments) {
  __shared__ double shared_losses[kThreads];
  __shared__ A shared_step[2];
  prepare_step<KIND>(arguments, shared_step);
  __syncthreads();
  const MatchParameters<A> parameters = with_step<KIND>(arguments, shared_step);
  double loss = 0;
  for (int i = 0; i < kMatchColumns / kThreads; ++i) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kMatchColumns + i * kThreads + threadIdx.x;
    if (at < columns) loss += match_column<KIND>(arguments, parameters, at, mean[at], var != nullptr ? var[at] : A(0));
  }
  finish_loss<KIND>(arguments, static_cast<int>(blockIdx.x), loss, shared_losses);
}

}  // namespace moment_ops

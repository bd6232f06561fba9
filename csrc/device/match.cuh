// match_ on the GPU: the running average's step, the loss and its derivatives, as the epilogue of the reduction or from
// moments that exist.
#pragma once

#include "device/column_moments.cuh"
#include "device/match.h"

namespace moment_ops {

// Where the strips of all launches leave their losses; the last of them adds these up.
struct LossWorkspace {
  double* losses;  // one per strip
  unsigned int* ticket;
  int32_t strips;
};

// The step is on the device and is advanced by the last block, when all others have read it.
template <class Average, class A>
__device__ __forceinline__ int64_t load_step(const Matching<Average, A>& matching) {
  return Average::kCounts ? *matching.step : 0;
}

// The parameters for the step after `*step`.
template <class Average, class A>
__device__ __forceinline__ typename Average::template Parameters<A> with_step(const Matching<Average, A>& matching,
                                                                              const int64_t* step) {
  auto parameters = matching.parameters;
  if constexpr (Average::kCounts) parameters.set_step(static_cast<double>(*step + 1));
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
template <class Average, class A>
struct MatchEntries {
  A target, weight, kept[kPlaces<Average>];
};

template <class Average, class A>
__device__ __forceinline__ MatchEntries<Average, A> load_entries(const MatchVectors<Average, A>& v, int64_t at) {
  MatchEntries<Average, A> entries{v.target[at], A(1), {}};
  if (v.weight != nullptr) entries.weight = v.weight[at];
#pragma unroll
  for (int k = 0; k < Average::kKept; ++k) entries.kept[k] = v.kept[k][at];
  return entries;
}

template <class Average, class A>
__device__ __forceinline__ A match_quantity(const MatchVectors<Average, A>& v, int64_t at, A value,
                                            MatchEntries<Average, A> entries, A reduction, bool store, bool started,
                                            const typename Average::template Parameters<A>& parameters) {
  const MatchTerm<A> term{value, entries.target, entries.weight * v.scale, reduction, started, store};
  A grad;
  const A loss = loss_term(Average::step(term, entries.kept, grad, parameters), value, entries.target);
  if (store) {
#pragma unroll
    for (int k = 0; k < Average::kKept; ++k) v.kept[k][at] = entries.kept[k];
  }
  v.grad[at] = grad;
  return loss;
}

// Columns that a thread matches at once: the entries of more would not fit into its registers.
template <class A>
inline constexpr int kMatchColumns = kVectorBytes / sizeof(A);

// Matches `column(first)` and the COUNT - 1 after it: all of their loads are in flight before the first is used. What
// the step makes of the parameters is worked out meanwhile, by every thread: to hand it around would take a barrier.
// `step` is read after these loads are on their way, or nvcc waits for it before them.
template <int COUNT, class Average, class A, class Column>
__device__ __forceinline__ double match_columns(const Matching<Average, A>& matching, const int64_t* step, int first,
                                                const Column& column) {
  const bool has_var = matching.var.target != nullptr;
  MatchColumn<A> columns[COUNT];
  MatchEntries<Average, A> mean[COUNT] = {}, var[COUNT] = {};
  uint8_t started[COUNT] = {};
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    columns[i] = column(first + i);
    if (!columns[i].present) continue;
    mean[i] = load_entries(matching.mean, columns[i].at);
    if (has_var) var[i] = load_entries(matching.var, columns[i].at);
    if (Average::kStarts) started[i] = matching.started[columns[i].at];
  }
  const auto parameters = with_step(matching, step);
  double loss = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const MatchColumn<A>& c = columns[i];
    if (!c.present) continue;
    const bool store = matching.update && is_finite(c.mean) && (!has_var || is_finite(c.var));
    const auto match = [&](const MatchVectors<Average, A>& v, A value, const MatchEntries<Average, A>& entries) {
      return match_quantity(v, c.at, value, entries, matching.reduction, store, started[i] != 0, parameters);
    };
    loss += match(matching.mean, c.mean, mean[i]);
    if (has_var) loss += match(matching.var, c.var, var[i]);
    if (Average::kStarts && store) matching.started[c.at] = 1;
    if (matching.batch_mean != nullptr) matching.batch_mean[c.at] = c.mean;
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
template <class Average, class A>
__device__ __forceinline__ void finish_loss(const Matching<Average, A>& matching, const LossWorkspace& workspace,
                                            int strip, double thread_loss, double* shared) {
  sum_block(thread_loss, shared);
  if (threadIdx.x == 0) __stcg(workspace.losses + strip, shared[0]);
  if (!arrives_last(workspace.ticket, static_cast<unsigned int>(workspace.strips))) return;
  double loss = 0;
  for (int i = static_cast<int>(threadIdx.x); i < workspace.strips; i += kThreads) loss += __ldcg(workspace.losses + i);
  sum_block(loss, shared);
  if (threadIdx.x == 0) {
    *matching.loss = static_cast<A>(shared[0]);
    if (Average::kKept > 0 && matching.update) ++*matching.step;
  }
}

// Of a layer whose columns lie in packed order.
template <int WIDTH, class T, class Average, class A>
__device__ __forceinline__ void match_strip(const ColumnLayer& layer, Workspace workspace, BlockMoments<WIDTH>& moments,
                                            const LossWorkspace& losses, double* shared_losses,
                                            const Matching<Average, A>& matching) {
  const StripColumns strip = reduce_strip<A>(layer, workspace, matching.correction, moments, FeaturesOf<T>{layer});
  if (!strip.done) return;
  const int64_t step = load_step(matching);
  const auto column = [&](int i) -> MatchColumn<A> {
    const int j = i * kThreads + static_cast<int>(threadIdx.x);
    if (j >= strip.count) return {};
    return {true, layer.offset + strip.first + j, static_cast<A>(moments.mean[moments.at(j)]),
            static_cast<A>(moments.m2[moments.at(j)])};
  };
  constexpr int COUNT = WIDTH < kMatchColumns<A> ? WIDTH : kMatchColumns<A>;
  double loss = 0;
#pragma unroll
  for (int i = 0; i < WIDTH; i += COUNT) loss += match_columns<COUNT>(matching, &step, i, column);
  finish_loss(matching, losses, layer.first_strip + strip.index, loss, shared_losses);
}

// Four blocks to a multiprocessor hold enough loads in flight; asking for more would spill.
template <class T, class Average, class A>
__global__ void __launch_bounds__(kThreads, 4)
    match_features_kernel(const __grid_constant__ ColumnLayers list, Workspace workspace, LossWorkspace losses,
                          Matching<Average, A> matching) {
  constexpr int WIDTH = kVectorBytes / sizeof(T);
  __shared__ BlockMoments<WIDTH> moments;
  __shared__ double shared_losses[kThreads];
  const ColumnLayer& layer = list.layers[find_layer(list, blockIdx.x)];
  if (layer.vectors) {
    match_strip<WIDTH, T>(layer, workspace, moments, losses, shared_losses, matching);
  } else {
    match_strip<1, T>(layer, workspace, reinterpret_cast<BlockMoments<1>&>(moments), losses, shared_losses, matching);
  }
}

// From packed moments.
template <class Average, class A>
__global__ void __launch_bounds__(kThreads)
    match_moments_kernel(const A* mean, const A* var, int64_t columns, LossWorkspace losses,
                         Matching<Average, A> matching) {
  __shared__ double shared_losses[kThreads];
  const auto column = [&](int i) -> MatchColumn<A> {
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * kMatchColumns<A> + i) * kThreads + threadIdx.x;
    if (at >= columns) return {};
    return {true, at, mean[at], var != nullptr ? var[at] : A(0)};
  };
  const double loss = match_columns<kMatchColumns<A>>(matching, matching.step, 0, column);
  finish_loss(matching, losses, static_cast<int>(blockIdx.x), loss, shared_losses);
}

}  // namespace moment_ops

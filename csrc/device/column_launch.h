// Host side of the column kernels, free of torch: cuts the work and launches. The same code launches on a GPU and, in the
// tests, on the host.
#pragma once

#include <vector>

#include "device/match.cuh"
#include "device/moments_backward.cuh"
#include "device/relu_moments.cuh"

namespace moment_ops {

// Layers in lists that fit into kernel arguments, and what the whole call needs.
struct Launches {
  std::vector<ColumnLayers> lists;
  std::vector<int> blocks;
  Plan total;
};

// `tile_rows` is kReductionTile or kElementwiseTile.
inline Launches plan_launches(std::vector<ColumnLayer> layers, int element_size, int tile_rows) {
  Launches launches;
  int64_t in_flight = 0;
  for (const ColumnLayer& layer : layers) in_flight += bytes_in_flight(layer, element_size, tile_rows);
  const int groups = wanted_groups(in_flight);
  for (size_t first = 0; first < layers.size(); first += kMaxLayers) {
    ColumnLayers list{};
    launches.total.blocks = 0;
    for (size_t i = first; i < layers.size() && i < first + kMaxLayers; ++i) {
      cut_layer(layers[i], element_size, tile_rows, groups, launches.total);
      list.layers[list.count++] = layers[i];
    }
    launches.lists.push_back(list);
    launches.blocks.push_back(launches.total.blocks);
  }
  return launches;
}

template <class T, class A>
inline void launch_moments(const Launches& launches, Workspace workspace, MomentsOutput<A> out,
                           MOMENT_OPS_STREAM stream) {
  for (size_t i = 0; i < launches.lists.size(); ++i) {
    MOMENT_OPS_LAUNCH((moments_kernel<T, A>), launches.blocks[i], kThreads, stream, launches.lists[i], workspace, out);
  }
}

template <class T, class A>
inline void launch_moments_backward(const Launches& launches, BackwardArguments<A> arguments,
                                    MOMENT_OPS_STREAM stream) {
  arguments.first_layer = 0;
  for (size_t i = 0; i < launches.lists.size(); ++i) {
    MOMENT_OPS_LAUNCH((moments_backward_kernel<T, A>), launches.blocks[i], kThreads, stream, launches.lists[i],
                      arguments);
    arguments.first_layer += launches.lists[i].count;
  }
}

template <class T, class Average, class A>
inline void launch_match_features(const Launches& launches, Workspace workspace, LossWorkspace losses,
                                  const Matching<Average, A>& matching, MOMENT_OPS_STREAM stream) {
  for (size_t i = 0; i < launches.lists.size(); ++i) {
    MOMENT_OPS_LAUNCH((match_features_kernel<T, Average, A>), launches.blocks[i], kThreads, stream, launches.lists[i],
                      workspace, losses, matching);
  }
}

template <class T, class A>
inline void launch_relu_moments(const ColumnLayer& layer, const Plan& plan, const ReluArguments<T>& arguments,
                                Workspace workspace, MomentsOutput<A> out, MOMENT_OPS_STREAM stream) {
  MOMENT_OPS_LAUNCH((relu_moments_kernel<T, A>), plan.blocks, kThreads, stream, layer, arguments, workspace, out);
}

template <class T, class A>
inline void launch_relu_moments_backward(const ColumnLayer& layer, const Plan& plan,
                                         const MomentGradients<A>& moments, MOMENT_OPS_STREAM stream) {
  MOMENT_OPS_LAUNCH((relu_moments_backward_kernel<T, A>), plan.blocks, kThreads, stream, layer, moments);
}

template <class A>
inline int match_blocks(int64_t columns) {
  return static_cast<int>(ceil_div(columns, kMatchColumns<A> * kThreads));
}

template <class Average, class A>
inline void launch_match_moments(const A* mean, const A* var, int64_t columns, LossWorkspace losses,
                                 const Matching<Average, A>& matching, MOMENT_OPS_STREAM stream) {
  MOMENT_OPS_LAUNCH((match_moments_kernel<Average, A>), match_blocks<A>(columns), kThreads, stream, mean, var, columns,
                    losses, matching);
}

}  // namespace moment_ops

// `match_` as kernels have it, on the CPU and on GPUs: addresses and numbers.
#pragma once

#include <cstdint>

#include "device/averages.h"
#include "device/range.h"

namespace moment_ops {

// For what an average keeps of a column: arrays have one place at least.
template <class Average>
inline constexpr int kPlaces = Average::kKept > 0 ? Average::kKept : 1;

// The packed vectors of one quantity, mean or variance.
template <class Average, class A>
struct MatchVectors {
  const A* target;
  const A* weight;  // or null
  A scale;
  A* kept[kPlaces<Average>];
  A* grad;
};

template <class Average, class A>
struct Matching {
  MatchVectors<Average, A> mean, var;  // var.target is null where means alone are matched
  typename Average::template Parameters<A> parameters;  // but for what depends on the step
  A reduction;
  bool update;
  uint8_t* started;  // per column, of averages that start
  int64_t* step;     // of all that keep something
  int64_t correction;
  A* batch_mean;  // of features
  A* loss;
};

}  // namespace moment_ops

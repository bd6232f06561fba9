// Merging the moments of two groups of rows (Chan, Golub & LeVeque 1979), for host and device.
#pragma once

#if defined(__CUDACC__)
#define MOMENT_OPS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MOMENT_OPS_HOST_DEVICE inline
#endif

namespace moment_ops {

// The two factors of a merge depend on the row counts alone, so columns that are merged together share them.
template <class Accumulate>
struct MergeFactors {
  Accumulate mean;  // count_b / count
  Accumulate m2;    // count_a * count_b / count
};

template <class Accumulate>
MOMENT_OPS_HOST_DEVICE MergeFactors<Accumulate> merge_factors(long long count_a, long long count_b) {
  const double count = static_cast<double>(count_a + count_b);
  const double share = count > 0 ? static_cast<double>(count_b) / count : 0.0;
  return {static_cast<Accumulate>(share), static_cast<Accumulate>(static_cast<double>(count_a) * share)};
}

// (mean_a, m2_a) of count_a rows becomes that of count_a + count_b rows; m2 is the sum of squared deviations.
template <class Accumulate>
MOMENT_OPS_HOST_DEVICE void merge(Accumulate& mean_a, Accumulate& m2_a, Accumulate mean_b, Accumulate m2_b,
                                  MergeFactors<Accumulate> factors) {
  const Accumulate delta = mean_b - mean_a;
  mean_a += delta * factors.mean;
  m2_a += m2_b + delta * delta * factors.m2;
}

}  // namespace moment_ops

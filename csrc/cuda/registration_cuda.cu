// Registers the GPU kernels; compiled only where there is a CUDA toolkit.
#include <torch/csrc/stable/library.h>

#include "boxed.h"
#include "cuda/operators_cuda.h"

STABLE_TORCH_LIBRARY_IMPL(moment_ops, CUDA, library) {
  library.impl("moments.native", TORCH_BOX(&moment_ops::cuda::moments));
  library.impl("moments_backward.native", TORCH_BOX(&moment_ops::cuda::moments_backward));
  library.impl("match_.native", &moment_ops::boxed<&moment_ops::cuda::match_>);
  library.impl("relu_moments.native", TORCH_BOX(&moment_ops::cuda::relu_moments));
  library.impl("relu_moments_backward.native", TORCH_BOX(&moment_ops::cuda::relu_moments_backward));
}

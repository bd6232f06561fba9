// Registers the kernels behind the schemas that moment_ops/ops defines.
#include <torch/csrc/stable/library.h>

#include "boxed.h"
#include "cpu/match.h"
#include "cpu/moments.h"
#include "cpu/relu_moments.h"

STABLE_TORCH_LIBRARY_IMPL(moment_ops, CPU, library) {
  library.impl("moments.native", TORCH_BOX(&moment_ops::cpu::moments));
  library.impl("moments_backward.native", TORCH_BOX(&moment_ops::cpu::moments_backward));
  library.impl("relu_moments.native", TORCH_BOX(&moment_ops::cpu::relu_moments));
  library.impl("relu_moments_backward.native", TORCH_BOX(&moment_ops::cpu::relu_moments_backward));
  library.impl("match_.native", &moment_ops::boxed<&moment_ops::cpu::match_>);
}

#pragma once

#include <torch/csrc/stable/tensor.h>

#include "match_arguments.h"

namespace moment_ops::cpu {

void match_(const MatchArguments<torch::stable::Tensor>& from);

}  // namespace moment_ops::cpu

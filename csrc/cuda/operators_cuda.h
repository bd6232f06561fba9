// The operators' GPU implementations, for registration.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "match_arguments.h"

namespace moment_ops::cuda {

using torch::stable::Tensor;

void moments(std::vector<Tensor> input, int64_t dim, int64_t correction, Tensor mean, std::optional<Tensor> var);

void moments_backward(std::vector<Tensor> grad, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_var,
                      std::vector<Tensor> input, Tensor mean, Tensor count, int64_t dim, int64_t correction,
                      std::optional<Tensor> scale, std::vector<Tensor> out);

void match_(const MatchArguments<Tensor>& from);

void relu_moments(Tensor x, std::optional<Tensor> bias, int64_t correction, Tensor y, Tensor mean, Tensor var);

void relu_moments_backward(std::optional<Tensor> grad, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_var,
                           Tensor y, Tensor mean, int64_t correction, Tensor out);

}  // namespace moment_ops::cuda

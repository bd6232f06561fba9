#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace moment_ops::cpu {

using torch::stable::Tensor;

void relu_moments(Tensor x, std::optional<Tensor> bias, int64_t correction, Tensor y, Tensor mean, Tensor var);

void relu_moments_backward(std::optional<Tensor> grad, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_var,
                           Tensor y, Tensor mean, int64_t correction, Tensor out);

}  // namespace moment_ops::cpu

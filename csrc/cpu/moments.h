#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace moment_ops::cpu {

using torch::stable::Tensor;

void moments(std::vector<Tensor> input, int64_t dim, int64_t correction, Tensor mean, std::optional<Tensor> var);

void moments_backward(std::vector<Tensor> grad, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_var,
                      std::vector<Tensor> input, Tensor mean, Tensor count, int64_t dim, int64_t correction,
                      std::optional<Tensor> scale, std::vector<Tensor> out);

}  // namespace moment_ops::cpu

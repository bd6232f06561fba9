// The operators' GPU implementations, for registration.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace moment_ops::cuda {

using torch::stable::Tensor;

void moments(std::vector<Tensor> input, int64_t dim, int64_t correction, Tensor mean, std::optional<Tensor> var);

void moments_backward(std::vector<Tensor> grad, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_var,
                      std::vector<Tensor> input, Tensor mean, Tensor count, int64_t dim, int64_t correction,
                      std::optional<Tensor> scale, std::vector<Tensor> out);

void match_(std::optional<Tensor> mean, std::optional<Tensor> var, std::vector<Tensor> input, int64_t correction,
            Tensor target_mean, std::optional<Tensor> target_var, double mean_scale, double var_scale,
            std::optional<Tensor> mean_weight, std::optional<Tensor> var_weight, double reduction, int64_t average,
            std::vector<double> options, std::vector<Tensor> state, bool update, Tensor loss,
            std::optional<Tensor> batch_mean, Tensor grad_mean, std::optional<Tensor> grad_var);

void relu_moments(Tensor x, std::optional<Tensor> bias, int64_t correction, Tensor y, Tensor mean, Tensor var);

void relu_moments_backward(std::optional<Tensor> grad, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_var,
                           Tensor y, Tensor mean, int64_t correction, Tensor out);

}  // namespace moment_ops::cuda

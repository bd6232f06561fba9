#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace moment_ops::cpu {

using torch::stable::Tensor;

// With features in `input`, their moments are reduced first and the batch's means go to `batch_mean`; without, `mean`
// and `var` hold the moments.
void match_(std::optional<Tensor> mean, std::optional<Tensor> var, std::vector<Tensor> input, int64_t correction,
            Tensor target_mean, std::optional<Tensor> target_var, double mean_scale, double var_scale,
            std::optional<Tensor> mean_weight, std::optional<Tensor> var_weight, double reduction, int64_t average,
            std::vector<double> options, std::vector<Tensor> state, bool update, Tensor loss,
            std::optional<Tensor> batch_mean, Tensor grad_mean, std::optional<Tensor> grad_var);

}  // namespace moment_ops::cpu

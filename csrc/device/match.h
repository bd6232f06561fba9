// One column's step of the matching loss: the running average, the loss value and its derivatives with respect to the
// batch's mean or variance. The same function serves means and variances, on host and device.
#pragma once

#include <cmath>
#include <limits>

#include "device/merge.h"

namespace moment_ops {

// By magnitude: `value - value == 0` of a product is contracted to fma(a, b, -(a * b)), the product's rounding.
template <class Accumulate>
MOMENT_OPS_HOST_DEVICE bool is_finite(Accumulate value) {
  return std::abs(value) < std::numeric_limits<Accumulate>::infinity();
}

enum class Average : int { none = 0, moving = 1, adam = 2 };

// Everything that is the same for all columns. Differences such as 1 - beta are formed in double by the caller.
template <class Accumulate>
struct MatchParameters {
  Accumulate reduction;  // r: 1 for "sum", 1/F for "mean"
  Accumulate decay, one_minus_decay;
  Accumulate beta1_complement, beta2, beta2_complement, eps;
  Accumulate step_size;              // lr / (1 - beta1^step)
  Accumulate root_bias_correction2;  // sqrt(1 - beta2^step)
  Accumulate gradient_scale;         // 2 or 2/F, of the mean squared error that Adam minimises
  bool update;
};

// Adam's learning rate, and the logarithms of its betas.
struct AdamSchedule {
  double lr, log_beta1, log_beta2;
};

inline AdamSchedule adam_schedule(double lr, double beta1, double beta2) {
  return {lr, std::log(beta1), std::log(beta2)};
}

// What Adam makes of the number of steps, this one included. 1 - beta^step as pow would have it loses digits, and is a
// call on a GPU. Before the first step both may be anything: no average is updated then.
template <class Accumulate>
MOMENT_OPS_HOST_DEVICE void set_step(MatchParameters<Accumulate>& p, const AdamSchedule& adam, double step) {
  p.step_size = static_cast<Accumulate>(adam.lr / -std::expm1(step * adam.log_beta1));
  p.root_bias_correction2 = static_cast<Accumulate>(std::sqrt(-std::expm1(step * adam.log_beta2)));
}

// The packed vectors of one quantity, mean or variance; those that its average does not use are null.
template <class Accumulate>
struct MatchVectors {
  const Accumulate* target = nullptr;
  const Accumulate* weight = nullptr;
  Accumulate scale = 1;
  Accumulate* average = nullptr;
  Accumulate* exp_avg = nullptr;
  Accumulate* exp_avg_sq = nullptr;
  Accumulate* grad = nullptr;
};

// Each returns the column's share of the loss and sets its derivative.

// No average: r w (value - target)^2.
template <class Accumulate>
MOMENT_OPS_HOST_DEVICE Accumulate match_none(Accumulate value, Accumulate target, Accumulate weight, Accumulate& grad,
                                             const MatchParameters<Accumulate>& p) {
  const Accumulate difference = value - target;
  const Accumulate scaled = p.reduction * weight * difference;
  grad = 2 * scaled;
  return scaled * difference;
}

// Moving average of the batch's value, the gradient through the current batch only.
template <class Accumulate>
MOMENT_OPS_HOST_DEVICE Accumulate match_moving(Accumulate value, Accumulate target, Accumulate weight, bool started,
                                               bool store, Accumulate& average, Accumulate& grad,
                                               const MatchParameters<Accumulate>& p) {
  const Accumulate estimate = started ? p.decay * average + p.one_minus_decay * value : value;
  const Accumulate difference = estimate - target;
  const Accumulate scaled = p.reduction * weight * difference;
  average = store ? estimate : average;
  grad = p.one_minus_decay * (2 * scaled);
  return scaled * difference;
}

// ADAM moving average of target - value, in the order of operations of torch.optim.Adam.
template <class Accumulate>
MOMENT_OPS_HOST_DEVICE Accumulate match_adam(Accumulate value, Accumulate target, Accumulate weight, bool store,
                                             Accumulate& average, Accumulate& exp_avg, Accumulate& exp_avg_sq,
                                             Accumulate& grad, const MatchParameters<Accumulate>& p) {
  const Accumulate difference = target - value;
  const Accumulate step = p.gradient_scale * (average - difference);
  const Accumulate next_exp_avg = exp_avg + p.beta1_complement * (step - exp_avg);
  const Accumulate next_exp_avg_sq = exp_avg_sq * p.beta2 + p.beta2_complement * step * step;
  const Accumulate denominator = std::sqrt(next_exp_avg_sq) / p.root_bias_correction2 + p.eps;
  const Accumulate next_average = average - p.step_size * (next_exp_avg / denominator);
  exp_avg = store ? next_exp_avg : exp_avg;
  exp_avg_sq = store ? next_exp_avg_sq : exp_avg_sq;
  average = store ? next_average : average;
  const Accumulate weighted = weight * average;
  grad = -weighted;
  return weighted * difference;
}

}  // namespace moment_ops

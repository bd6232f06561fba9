// The averages of moments: what each keeps of a column, what it makes of its options, and a column's step of the loss.
// The same step serves means and variances, on host and device.
//
// An average has
//   kNumber        its number in the schema, as AVERAGES in moment_ops/ops/match.py has it;
//   kKept          the vectors that it keeps per quantity;
//   kStarts        whether a column's first finite values start it, which a byte per column remembers;
//   kCounts        whether its parameters depend on the number of steps: they have a set_step then, which gets the
//                  number of the step that is made, or that would be made where nothing is updated;
//   Parameters<A>  what is the same for all columns, made of the schema's options;
//   step           which returns the column's share of the loss, sets its derivative, and advances what is kept where
//                  the term says so.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "device/merge.h"

namespace moment_ops {

// A column's mean or variance on its way into the loss.
template <class A>
struct MatchTerm {
  A value, target, weight;
  A reduction;   // r: 1 for "sum", 1/F for "mean"
  bool started;  // of averages that start
  bool store;
};

// No average: r w (value - target)^2.
struct NoAverage {
  static constexpr int kNumber = 0;
  static constexpr int kKept = 0;
  static constexpr bool kStarts = false;
  static constexpr bool kCounts = false;

  template <class A>
  struct Parameters {
    Parameters() = default;
    explicit Parameters(const double*) {}
  };

  template <class A>
  MOMENT_OPS_HOST_DEVICE static A step(const MatchTerm<A>& term, A*, A& grad, const Parameters<A>&) {
    const A difference = term.value - term.target;
    const A scaled = term.reduction * term.weight * difference;
    grad = 2 * scaled;
    return scaled * difference;
  }
};

// Moving average of the batch's value, the gradient through the current batch only.
struct MovingAverage {
  static constexpr int kNumber = 1;
  static constexpr int kKept = 1;
  static constexpr bool kStarts = true;
  static constexpr bool kCounts = true;

  // Differences such as 1 - decay are formed in double.
  template <class A>
  struct Parameters {
    double one_minus_decay;
    double log_decay;  // minus infinity where the bias is not corrected: every power of the decay is then 0
    A past, batch;     // weights

    Parameters() = default;
    explicit Parameters(const double* options)
        : one_minus_decay(1 - options[0]),
          log_decay(options[1] != 0 ? std::log(options[0]) : -HUGE_VAL),
          past(0),
          batch(0) {}

    // The share of the batch is (1 - decay) / (1 - decay^step), whose denominator pow would take digits from. No branch
    // on a GPU: loads would wait for it.
    MOMENT_OPS_HOST_DEVICE void set_step(double step) {
      const double share = one_minus_decay / -std::expm1(step * log_decay);
      past = static_cast<A>(1 - share);
      batch = static_cast<A>(share);
    }
  };

  template <class A>
  MOMENT_OPS_HOST_DEVICE static A step(const MatchTerm<A>& term, A* kept, A& grad, const Parameters<A>& p) {
    const A estimate = term.started ? p.past * kept[0] + p.batch * term.value : term.value;
    const A difference = estimate - term.target;
    const A scaled = term.reduction * term.weight * difference;
    kept[0] = term.store ? estimate : kept[0];
    grad = p.batch * (2 * scaled);
    return scaled * difference;
  }
};

// ADAM moving average of target - value, in the order of operations of torch.optim.Adam.
struct AdamAverage {
  static constexpr int kNumber = 2;
  static constexpr int kKept = 3;
  static constexpr bool kStarts = false;
  static constexpr bool kCounts = true;

  template <class A>
  struct Parameters {
    double lr, log_beta1, log_beta2;
    A beta1_complement, beta2, beta2_complement, eps;
    A gradient_scale;  // 2 or 2/F, of the mean squared error that Adam minimises
    A step_size, root_bias_correction2;

    Parameters() = default;
    explicit Parameters(const double* options)
        : lr(options[0]),
          log_beta1(std::log(options[1])),
          log_beta2(std::log(options[2])),
          beta1_complement(A(1 - options[1])),
          beta2(A(options[2])),
          beta2_complement(A(1 - options[2])),
          eps(A(options[3])),
          gradient_scale(A(options[4])),
          step_size(0),
          root_bias_correction2(0) {}

    // 1 - beta^step as pow would have it loses digits, and is a call on a GPU.
    MOMENT_OPS_HOST_DEVICE void set_step(double step) {
      step_size = static_cast<A>(lr / -std::expm1(step * log_beta1));
      root_bias_correction2 = static_cast<A>(std::sqrt(-std::expm1(step * log_beta2)));
    }
  };

  template <class A>
  MOMENT_OPS_HOST_DEVICE static A step(const MatchTerm<A>& term, A* kept, A& grad, const Parameters<A>& p) {
    A &average = kept[0], &exp_avg = kept[1], &exp_avg_sq = kept[2];
    const A difference = term.target - term.value;
    const A error = p.gradient_scale * (average - difference);
    const A next_exp_avg = exp_avg + p.beta1_complement * (error - exp_avg);
    const A next_exp_avg_sq = exp_avg_sq * p.beta2 + p.beta2_complement * error * error;
    const A denominator = std::sqrt(next_exp_avg_sq) / p.root_bias_correction2 + p.eps;
    const A next_average = average - p.step_size * (next_exp_avg / denominator);
    exp_avg = term.store ? next_exp_avg : exp_avg;
    exp_avg_sq = term.store ? next_exp_avg_sq : exp_avg_sq;
    average = term.store ? next_average : average;
    const A weighted = term.weight * average;
    grad = -weighted;
    return weighted * difference;
  }
};

// All of them; a macro, because functions that are compiled once per x86-64 level cannot be templates.
#define MOMENT_OPS_AVERAGES(APPLY) \
  APPLY(NoAverage)                 \
  APPLY(MovingAverage)             \
  APPLY(AdamAverage)

// Calls body with the average of this number.
template <class Body>
inline auto dispatch_average(int64_t number, const Body& body) {
#define MOMENT_OPS_DISPATCH(Average) \
  if (number == Average::kNumber) return body(Average{});
  MOMENT_OPS_AVERAGES(MOMENT_OPS_DISPATCH)
#undef MOMENT_OPS_DISPATCH
  throw std::runtime_error("moment_ops: an average without a number");
}

}  // namespace moment_ops

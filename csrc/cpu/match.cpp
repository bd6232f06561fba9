// match_ on the CPU: the running average's step, the loss and its derivatives, in the pass that reduces the features.
#include "cpu/match.h"

#include <cmath>
#include <numeric>

#include "cpu/reduce_columns.h"
#include "match_arguments.h"

namespace moment_ops::cpu {

namespace {

// One quantity, mean or variance, over a strip of columns. Unused parts are null.
template <class A>
struct Quantity {
  const A* value;
  const A* target;
  const A* weight;
  A scale;
  A* average;
  A* exp_avg;
  A* exp_avg_sq;
  A* grad;
};

// The sum of a few terms in double, in an order that depends on their number alone.
template <class A>
inline double sum_terms(const A* terms, int64_t count) {
  double lanes[8] = {};
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += static_cast<double>(terms[j + lane]);
  }
  for (; j < count; ++j) lanes[j % 8] += static_cast<double>(terms[j]);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

constexpr int64_t kTerms = 512;

// Matches at most kTerms columns. `other` is the companion quantity: a column counts as finite where both are.
template <Average KIND, bool WEIGHTED, class A>
inline double match_terms(int64_t columns, const A* __restrict value, const A* __restrict target,
                          const A* __restrict weight, A scale, A* __restrict average, A* __restrict exp_avg,
                          A* __restrict exp_avg_sq, A* __restrict grad, const A* __restrict other,
                          const uint8_t* __restrict started, const MatchParameters<A> p) {
  A terms[kTerms];
  // A sum in this loop, or a short circuit, or a store that may not happen, would keep it scalar.
#pragma GCC ivdep
  for (int64_t j = 0; j < columns; ++j) {
    const A w = WEIGHTED ? weight[j] * scale : scale;
    A column_grad;
    if constexpr (KIND == Average::none) {
      terms[j] = match_none(value[j], target[j], w, column_grad, p);
    } else {
      const bool store = p.update & is_finite(value[j]) & is_finite(other[j]);
      A column_average = average[j];
      if constexpr (KIND == Average::moving) {
        terms[j] = match_moving(value[j], target[j], w, started[j] != 0, store, column_average, column_grad, p);
      } else {
        A column_exp_avg = exp_avg[j];
        A column_exp_avg_sq = exp_avg_sq[j];
        terms[j] = match_adam(value[j], target[j], w, store, column_average, column_exp_avg, column_exp_avg_sq,
                              column_grad, p);
        exp_avg[j] = column_exp_avg;
        exp_avg_sq[j] = column_exp_avg_sq;
      }
      average[j] = column_average;
    }
    grad[j] = column_grad;
  }
  return sum_terms(terms, columns);
}

template <Average KIND, bool WEIGHTED, class A>
inline double match_columns_as(int64_t columns, const Quantity<A>& q, const A* other, const uint8_t* started,
                               const MatchParameters<A>& p) {
  const auto at = [](auto* pointer, int64_t j) { return pointer ? pointer + j : nullptr; };
  double loss = 0;
  for (int64_t j = 0; j < columns; j += kTerms) {
    loss += match_terms<KIND, WEIGHTED>(std::min(kTerms, columns - j), q.value + j, q.target + j, at(q.weight, j),
                                        q.scale, at(q.average, j), at(q.exp_avg, j), at(q.exp_avg_sq, j), q.grad + j,
                                        other + j, at(started, j), p);
  }
  return loss;
}

template <Average KIND, class A>
inline double match_columns(int64_t columns, const Quantity<A>& q, const A* other, const uint8_t* started,
                            const MatchParameters<A>& p) {
  return q.weight ? match_columns_as<KIND, true>(columns, q, other, started, p)
                  : match_columns_as<KIND, false>(columns, q, other, started, p);
}

template <class A>
struct MatchLoops;

#define MOMENT_OPS_MATCH_LOOPS(A)                                                                                  \
  template <>                                                                                                      \
  struct MatchLoops<A> {                                                                                           \
    MOMENT_OPS_CLONES static double none(int64_t columns, const Quantity<A>& q, const A* other,                    \
                                         const uint8_t* started, const MatchParameters<A>& p) {                    \
      return match_columns<Average::none>(columns, q, other, started, p);                                          \
    }                                                                                                              \
    MOMENT_OPS_CLONES static double moving(int64_t columns, const Quantity<A>& q, const A* other,                  \
                                           const uint8_t* started, const MatchParameters<A>& p) {                  \
      return match_columns<Average::moving>(columns, q, other, started, p);                                        \
    }                                                                                                              \
    MOMENT_OPS_CLONES static double adam(int64_t columns, const Quantity<A>& q, const A* other,                    \
                                         const uint8_t* started, const MatchParameters<A>& p) {                    \
      return match_columns<Average::adam>(columns, q, other, started, p);                                          \
    }                                                                                                              \
  };
MOMENT_OPS_MATCH_LOOPS(float)
MOMENT_OPS_MATCH_LOOPS(double)
#undef MOMENT_OPS_MATCH_LOOPS

template <class A>
double match_strip(Average kind, int64_t columns, const Quantity<A>& q, const A* other, const uint8_t* started,
                   const MatchParameters<A>& p) {
  switch (kind) {
    case Average::none: return MatchLoops<A>::none(columns, q, other, started, p);
    case Average::moving: return MatchLoops<A>::moving(columns, q, other, started, p);
    default: return MatchLoops<A>::adam(columns, q, other, started, p);
  }
}

// A strip whose packed entries lie together.
template <class A>
double match_packed(Average kind, const MatchState<A>& state, int64_t offset, int64_t columns, const A* mean,
                    const A* var) {
  const auto at = [&](const MatchVectors<A>& v, const A* value) {
    const auto shifted = [&](auto* pointer) { return pointer ? pointer + offset : nullptr; };
    return Quantity<A>{value,
                       shifted(v.target),
                       shifted(v.weight),
                       v.scale,
                       shifted(v.average),
                       shifted(v.exp_avg),
                       shifted(v.exp_avg_sq),
                       shifted(v.grad)};
  };
  uint8_t* started = state.started ? state.started + offset : nullptr;
  const bool has_var = state.var.target != nullptr;
  double loss = match_strip(kind, columns, at(state.mean, mean), has_var ? var : mean, started, state.parameters);
  if (has_var) loss += match_strip(kind, columns, at(state.var, var), mean, started, state.parameters);
  if (started && state.parameters.update) {
    for (int64_t j = 0; j < columns; ++j) {
      started[j] |= static_cast<uint8_t>(is_finite(mean[j]) && (!has_var || is_finite(var[j])));
    }
  }
  return loss;
}

constexpr int64_t kMatchColumns = 16384;

}  // namespace

void match_(std::optional<Tensor> mean, std::optional<Tensor> var, std::vector<Tensor> input, int64_t correction,
            Tensor target_mean, std::optional<Tensor> target_var, double mean_scale, double var_scale,
            std::optional<Tensor> mean_weight, std::optional<Tensor> var_weight, double reduction, int64_t average,
            std::vector<double> options, std::vector<Tensor> state, bool update, Tensor loss,
            std::optional<Tensor> batch_mean, Tensor grad_mean, std::optional<Tensor> grad_var) {
  const int64_t total = target_mean.numel();
  const auto kind = static_cast<Average>(average);
  dispatch_dtype(input.empty() ? *mean : input[0], [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    MatchState<A> match = unpack<A>({target_mean, target_var, mean_scale, var_scale, mean_weight, var_weight, reduction,
                                     kind, options, state, update, grad_mean, grad_var});
    if (kind == Average::adam) {
      set_step(match.parameters, match.adam, static_cast<double>(*match.step + (update ? 1 : 0)));
    }

    // Moments of [begin, end) of the packed columns, matched where the strips of memory order cannot be.
    const auto match_range = [&](const A* all_mean, const A* all_var, int64_t begin, int64_t end) {
      std::vector<double> losses((end - begin + kMatchColumns - 1) / kMatchColumns);
      for_each_piece(losses.size(), workers_for(end - begin), [&](int64_t piece, int64_t) {
        const int64_t first = begin + piece * kMatchColumns;
        const int64_t columns = std::min(kMatchColumns, end - first);
        losses[piece] = match_packed(kind, match, first, columns, all_mean + first, all_var ? all_var + first : nullptr);
      });
      return std::accumulate(losses.begin(), losses.end(), 0.0);
    };

    double value = 0;
    if (input.empty()) {
      value = match_range(data<A>(mean), target_var ? data<A>(var) : nullptr, 0, total);
    } else {
      const std::vector<Layer> layers = make_layers(input, 0);
      const std::vector<Strip> strips = make_strips<A>(layers);
      A* mean_out = data<A>(batch_mean);
      // Variances are kept only for layers whose packed order is not their memory order.
      const bool keep_var =
          target_var && !std::all_of(layers.begin(), layers.end(), [](const Layer& l) { return l.logical_order; });
      std::vector<A> var_out(keep_var ? total : 0);
      std::vector<double> losses(strips.size(), 0.0);
      reduce_columns<T>(layers, strips, [&](int64_t index, const Strip& strip, StripMoments<A>& moments) {
        const Layer& layer = layers[strip.layer];
        const int64_t columns = strip.end - strip.begin;
        moments.finish(columns, layer.rows, correction);
        scatter(layer, moments.mean.data(), strip.begin, strip.end, mean_out);
        if (layer.logical_order) {
          losses[index] = match_packed(kind, match, layer.offset + strip.begin, columns, moments.mean.data(),
                                       moments.m2.data());
        } else if (keep_var) {
          scatter(layer, moments.m2.data(), strip.begin, strip.end, var_out.data());
        }
      });
      value = std::accumulate(losses.begin(), losses.end(), 0.0);
      for (const Layer& layer : layers) {
        if (layer.logical_order) continue;
        value += match_range(mean_out, keep_var ? var_out.data() : nullptr, layer.offset, layer.offset + layer.columns);
      }
    }
    *static_cast<A*>(loss.mutable_data_ptr()) = static_cast<A>(value);
    if (update && kind != Average::none) ++*match.step;
  });
}

}  // namespace moment_ops::cpu

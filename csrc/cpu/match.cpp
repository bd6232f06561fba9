// match_ on the CPU: the running average's step, the loss and its derivatives, in the pass that reduces the features.
#include "cpu/match.h"

#include <functional>
#include <numeric>

#include "cpu/reduce_columns.h"

namespace moment_ops::cpu {

namespace {

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

// Matches the columns [at, at + columns) of the packed vectors, at most kTerms. `other` is the companion quantity: a
// column counts as finite where both are.
template <bool WEIGHTED, class Average, class A>
inline double match_terms(const Matching<Average, A>& m, const MatchVectors<Average, A>& v, int64_t at, int64_t columns,
                          const A* __restrict value, const A* __restrict other) {
  const auto from_here = [at](auto* pointer) { return pointer ? pointer + at : nullptr; };
  const A* __restrict target = v.target + at;
  const A* __restrict weight = from_here(v.weight);
  const uint8_t* __restrict started = from_here(m.started);
  A* __restrict grad = v.grad + at;
  A* kept[kPlaces<Average>];
  for (int k = 0; k < Average::kKept; ++k) kept[k] = v.kept[k] + at;
  const auto parameters = m.parameters;
  const A scale = v.scale, reduction = m.reduction;
  const bool update = m.update;
  A terms[kTerms];
  // A sum in this loop, or a short circuit, or a store that may not happen, would keep it scalar.
#pragma GCC ivdep
  for (int64_t j = 0; j < columns; ++j) {
    const bool store = update & is_finite(value[j]) & is_finite(other[j]);
    const MatchTerm<A> term{value[j], target[j],          WEIGHTED ? weight[j] * scale : scale,
                            reduction, Average::kStarts ? started[j] != 0 : true, store};
    A column[kPlaces<Average>], column_grad;
    for (int k = 0; k < Average::kKept; ++k) column[k] = kept[k][j];
    terms[j] = loss_term(Average::step(term, column, column_grad, parameters), value[j], target[j]);
    for (int k = 0; k < Average::kKept; ++k) kept[k][j] = column[k];
    grad[j] = column_grad;
  }
  return sum_terms(terms, columns);
}

template <class Average, class A>
inline double match_quantity(const Matching<Average, A>& m, const MatchVectors<Average, A>& v, int64_t at,
                             int64_t columns, const A* value, const A* other) {
  double loss = 0;
  for (int64_t j = 0; j < columns; j += kTerms) {
    const int64_t count = std::min(kTerms, columns - j);
    loss += v.weight ? match_terms<true>(m, v, at + j, count, value + j, other + j)
                     : match_terms<false>(m, v, at + j, count, value + j, other + j);
  }
  return loss;
}

template <class Average, class A>
struct MatchLoops;

#define MOMENT_OPS_MATCH_LOOPS_IN(Average, A)                                                                      \
  template <>                                                                                                      \
  struct MatchLoops<Average, A> {                                                                                  \
    MOMENT_OPS_CLONES static double quantity(const Matching<Average, A>& m, const MatchVectors<Average, A>& v,     \
                                             int64_t at, int64_t columns, const A* value, const A* other) {        \
      return match_quantity(m, v, at, columns, value, other);                                                      \
    }                                                                                                              \
  };
#define MOMENT_OPS_MATCH_LOOPS(Average) \
  MOMENT_OPS_MATCH_LOOPS_IN(Average, float) MOMENT_OPS_MATCH_LOOPS_IN(Average, double)
MOMENT_OPS_AVERAGES(MOMENT_OPS_MATCH_LOOPS)
#undef MOMENT_OPS_MATCH_LOOPS
#undef MOMENT_OPS_MATCH_LOOPS_IN

// Matches the columns [at, at + columns) of the packed vectors, whose means and variances begin at `mean` and `var`.
template <class Average, class A>
double match_columns(const Matching<Average, A>& m, int64_t at, int64_t columns, const A* mean, const A* var) {
  using Loops = MatchLoops<Average, A>;
  const bool has_var = m.var.target != nullptr;
  double loss = Loops::quantity(m, m.mean, at, columns, mean, has_var ? var : mean);
  if (has_var) loss += Loops::quantity(m, m.var, at, columns, var, mean);
  if (Average::kStarts && m.update) {
    uint8_t* started = m.started + at;
    for (int64_t j = 0; j < columns; ++j) {
      started[j] |= static_cast<uint8_t>(is_finite(mean[j]) && (!has_var || is_finite(var[j])));
    }
  }
  return loss;
}

// match_columns of one call of the operator, whatever its average.
template <class A>
using MatchColumns = std::function<double(int64_t at, int64_t columns, const A* mean, const A* var)>;

constexpr int64_t kMatchColumns = 16384;

// From packed moments, of the columns [begin, end).
template <class A>
double match_moments(const MatchColumns<A>& match, const A* mean, const A* var, int64_t begin, int64_t end) {
  std::vector<double> losses((end - begin + kMatchColumns - 1) / kMatchColumns);
  for_each_piece(losses.size(), workers_for(end - begin), [&](int64_t piece, int64_t) {
    const int64_t at = begin + piece * kMatchColumns;
    losses[piece] = match(at, std::min(kMatchColumns, end - at), mean + at, var ? var + at : nullptr);
  });
  return std::accumulate(losses.begin(), losses.end(), 0.0);
}

template <class T, class A>
double match_features(const MatchColumns<A>& match, const MatchArguments<Tensor>& from) {
  const std::vector<Layer> layers = make_layers(from.input, 0);
  const std::vector<Strip> strips = make_strips<A>(layers);
  A* mean = data<A>(from.batch_mean);
  // Variances are kept only for layers whose packed order is not their memory order.
  const bool keep_var =
      from.target_var && !std::all_of(layers.begin(), layers.end(), [](const Layer& l) { return l.logical_order; });
  std::vector<A> var(keep_var ? from.target_mean.numel() : 0);
  std::vector<double> losses(strips.size(), 0.0);
  const auto match_strip = [&](int64_t index, const Strip& strip, const A* means, const A* variances) {
    const Layer& layer = layers[strip.layer];
    scatter(layer, means, strip.begin, strip.end, mean);
    if (layer.logical_order) {
      losses[index] = match(layer.offset + strip.begin, strip.end - strip.begin, means, variances);
    } else if (keep_var) {
      scatter(layer, variances, strip.begin, strip.end, var.data());
    }
  };
  reduce_columns<T>(layers, strips, from.correction, match_strip);
  double loss = std::accumulate(losses.begin(), losses.end(), 0.0);
  for (const Layer& layer : layers) {
    if (layer.logical_order) continue;
    loss += match_moments(match, mean, keep_var ? var.data() : nullptr, layer.offset, layer.offset + layer.columns);
  }
  return loss;
}

}  // namespace

void match_(const MatchArguments<Tensor>& from) {
  dispatch_dtype(from.input.empty() ? *from.mean : from.input[0], [&](auto sample) {
    using T = decltype(sample);
    using A = accumulate_t<T>;
    dispatch_average(from.average_kind, [&](auto average) {
      auto matching = make_matching<decltype(average), A>(from);
      if constexpr (average.kCounts) {
        matching.parameters.set_step(static_cast<double>(*matching.step + 1));
      }
      const MatchColumns<A> match = [&](int64_t at, int64_t columns, const A* mean, const A* var) {
        return match_columns(matching, at, columns, mean, var);
      };
      *matching.loss = static_cast<A>(from.input.empty() ? match_moments(match, data<A>(from.mean), data<A>(from.var), 0,
                                                                         from.target_mean.numel())
                                                         : match_features<T>(match, from));
      if (matching.update) ++*matching.step;
    });
  });
}

}  // namespace moment_ops::cpu

// Results that fit although sums or differences on the way to them do not; for host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "device/merge.h"

namespace moment_ops {

// By magnitude: `value - value == 0` of a product is contracted to fma(a, b, -(a * b)), the product's rounding.
template <class A>
MOMENT_OPS_HOST_DEVICE bool is_finite(A value) {
  return std::abs(value) < std::numeric_limits<A>::infinity();
}

// A term of a loss, which does not fit where it is infinity less infinity, or nothing times infinity. Without a branch.
template <class A>
MOMENT_OPS_HOST_DEVICE A loss_term(A term, A value, A target) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  return (term != term) & (std::abs(value) + std::abs(target) == kInfinity) ? kInfinity : term;
}

// A sum that keeps what its rounding drops (Kahan 1965), however many terms it has.
struct CompensatedSum {
  double total = 0, dropped = 0;

  MOMENT_OPS_HOST_DEVICE void add(double term) {
    const double rest = term - dropped, next = total + rest;
    dropped = (next - total) - rest;
    total = next;
  }
};

// A column's mean and variance from its values, read(row), in double; doubles are scaled by a power of two that leaves
// room for their squares. False where a value is not finite: the moments stay as they are.
template <class A, class Read>
MOMENT_OPS_HOST_DEVICE bool wide_moments(const Read& read, int64_t rows, int64_t correction, A& mean, A& var) {
  constexpr double kDown = sizeof(A) == sizeof(double) ? 0x1p-600 : 1, kUp = 1 / kDown;
  const auto count = static_cast<double>(rows), freedom = static_cast<double>(rows - correction);
  CompensatedSum sum, rest, m2;
  for (int64_t row = 0; row < rows; ++row) sum.add(static_cast<double>(read(row)) * kDown);
  if (!is_finite(sum.total)) return false;
  const double pivot = sum.total / count;
  for (int64_t row = 0; row < rows; ++row) {
    const double deviation = static_cast<double>(read(row)) * kDown - pivot;
    rest.add(deviation);
    m2.add(deviation * deviation);
  }
  const double shift = rest.total / count;
  mean = static_cast<A>((pivot + shift) * kUp);
  var = freedom > 0 ? static_cast<A>((m2.total - rest.total * shift) / freedom * kUp * kUp)
                    : std::numeric_limits<A>::quiet_NaN();
  return true;
}

// The difference between a feature and a mean as large as this, which is half of the last digit of the largest number,
// may overflow: half of it does not.
template <class A>
inline constexpr A kLargeMean = std::numeric_limits<A>::max() * (std::numeric_limits<A>::epsilon() / 4);

// a + b * (x - mean), where b and mean are multiplied by 1 / scale and scale, which is 1 or 1/2: the same to the last bit
// unless it overflows or is subnormal.
template <class A>
MOMENT_OPS_HOST_DEVICE A scaled_gradient(A a, A b, A x, A mean, A scale) {
  return a + b * (x * scale - mean);
}

}  // namespace moment_ops

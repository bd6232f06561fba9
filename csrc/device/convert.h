// Loads and stores of every feature dtype, in integer arithmetic that the vectoriser understands.
//
// Hardware half-precision casts stay scalar in gcc up to 13 (`_Float16` in a loop), four times slower than these. On a
// GPU they are single instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "device/merge.h"

#if defined(__CUDA_ARCH__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace moment_ops {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

MOMENT_OPS_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

MOMENT_OPS_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Statistics are in fp32 for 16- and 32-bit features, in fp64 for fp64.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename AccumulateOf<T>::type;

MOMENT_OPS_HOST_DEVICE double load(double value) { return value; }
MOMENT_OPS_HOST_DEVICE float load(float value) { return value; }

MOMENT_OPS_HOST_DEVICE float load(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

MOMENT_OPS_HOST_DEVICE float load(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7FFFu;
  // The exponent's bias grows from 15 to 127; inf and NaN keep the largest exponent by growing once more.
  const uint32_t normal = (magnitude << 13) + (112u << 23) + (magnitude >= 0x7C00u ? 112u << 23 : 0u);
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x0400u ? subnormal : normal));
#endif
}

MOMENT_OPS_HOST_DEVICE void store(double& out, double value) { out = value; }
MOMENT_OPS_HOST_DEVICE void store(float& out, float value) { out = value; }

MOMENT_OPS_HOST_DEVICE void store(BFloat16& out, float value) {
#if defined(__CUDA_ARCH__)
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out.bits = static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded);
#endif
}

MOMENT_OPS_HOST_DEVICE void store(Half& out, float value) {
#if defined(__CUDA_ARCH__)
  out.bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Round to nearest even; a carry out of the mantissa raises the exponent, up to inf.
  const uint32_t normal = (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // The spacing of floats at 0.5 is that of subnormal halves: the addition rounds.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  out.bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (magnitude < 0x47800000u ? finite : special));
#endif
}

#if defined(__CUDA_ARCH__)
// Two numbers as two 16-bit features, the first in the low half: one instruction.
template <class T>
__device__ __forceinline__ uint32_t to_pair(float first, float second);

template <>
__device__ __forceinline__ uint32_t to_pair<BFloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

template <>
__device__ __forceinline__ uint32_t to_pair<Half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
#endif

}  // namespace moment_ops

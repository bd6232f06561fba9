// 16-byte accesses to features of any dtype.
#pragma once

#include "device/convert.h"

namespace moment_ops {

// On a GPU, 16-bit features stay in pairs between memory and arithmetic: one by one, each would take a register.
template <class T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Vector {
  T values[WIDTH];

  MOMENT_OPS_HOST_DEVICE accumulate_t<T> operator[](int c) const {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == 2 && WIDTH % 2 == 0) {
      uint32_t pair;
      memcpy(&pair, values + c / 2 * 2, sizeof pair);
      return load(T{static_cast<uint16_t>(c % 2 == 0 ? pair : pair >> 16)});
    }
#endif
    return load(values[c]);
  }
};

template <class T, int WIDTH>
MOMENT_OPS_HOST_DEVICE Vector<T, WIDTH> to_vector(const accumulate_t<T> (&numbers)[WIDTH]) {
  Vector<T, WIDTH> vector;
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == 2 && WIDTH % 2 == 0) {
      if (c % 2 != 0) continue;
      const uint32_t pair = to_pair<T>(numbers[c], numbers[c + 1]);
      memcpy(vector.values + c, &pair, sizeof pair);
      continue;
    }
#endif
    store(vector.values[c], numbers[c]);
  }
  return vector;
}

template <int WIDTH, class T>
MOMENT_OPS_HOST_DEVICE Vector<T, WIDTH> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, WIDTH>*>(from);
}

template <int WIDTH, class T>
MOMENT_OPS_HOST_DEVICE void store_vector(T* to, const Vector<T, WIDTH>& vector) {
#if defined(__CUDA_ARCH__)
  // A struct of values that were just computed would be stored one by one.
  if constexpr (sizeof(vector) == 16) {
    uint32_t words[4];
    memcpy(words, vector.values, 16);
    __stwb(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
    return;
  }
#endif
  *reinterpret_cast<Vector<T, WIDTH>*>(to) = vector;
}

}  // namespace moment_ops

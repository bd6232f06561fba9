// 16-byte accesses to features of any dtype.
#pragma once

#include "device/convert.h"

namespace moment_ops {

template <class T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Vector {
  T values[WIDTH];
};

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

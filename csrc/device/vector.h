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
  *reinterpret_cast<Vector<T, WIDTH>*>(to) = vector;
}

}  // namespace moment_ops

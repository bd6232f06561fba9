// Addresses of what tensors hold, torch's or others that answer as they do.
#pragma once

#include <optional>

namespace moment_ops {

template <class T, class Tensor>
inline T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T, class Tensor>
inline T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

}  // namespace moment_ops

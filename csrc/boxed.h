// Kernels whose arguments are one struct, for registration: what TORCH_BOX does for functions of many parameters.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "record.h"

namespace moment_ops {

using torch::stable::Tensor;

// An argument on the stack, which is read once: that takes over the reference to a tensor and frees a list.
struct Boxed {
  StableIValue value;

  // Of types, not a template: in the way of a template there is the constructor of std::optional, which takes anything.
  operator bool() { return torch::stable::detail::to<bool>(value); }
  operator int64_t() { return torch::stable::detail::to<int64_t>(value); }
  operator double() { return torch::stable::detail::to<double>(value); }
  operator Tensor() { return torch::stable::detail::to<Tensor>(value); }
  operator std::optional<Tensor>() { return torch::stable::detail::to<std::optional<Tensor>>(value); }
  operator std::vector<Tensor>() { return torch::stable::detail::to<std::vector<Tensor>>(value); }
  operator std::vector<double>() { return torch::stable::detail::to<std::vector<double>>(value); }
};

template <class Record, void (*kernel)(const Record&)>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  STD_TORCH_CHECK(arguments == Record::kCount && outputs == 0, "moment_ops: the schema has ", arguments,
                  " arguments and ", outputs, " outputs, the kernel ", Record::kCount, " and none");
  kernel(read_record<Record>([&](size_t i) { return Boxed{stack[i]}; }));
}

}  // namespace moment_ops

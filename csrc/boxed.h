// Boxes kernels whose arguments are one struct, as TORCH_BOX boxes functions of many parameters.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "record.h"

namespace moment_ops {

using torch::stable::Tensor;

// An argument on the stack. It may be read once: reading takes over the reference to a tensor, and frees a list.
struct Boxed {
  StableIValue value;

  // One function per type: a template would be ambiguous with the constructor of std::optional that takes any type.
  operator bool() { return torch::stable::detail::to<bool>(value); }
  operator int64_t() { return torch::stable::detail::to<int64_t>(value); }
  operator double() { return torch::stable::detail::to<double>(value); }
  operator Tensor() { return torch::stable::detail::to<Tensor>(value); }
  operator std::optional<Tensor>() { return torch::stable::detail::to<std::optional<Tensor>>(value); }
  operator std::vector<Tensor>() { return torch::stable::detail::to<std::vector<Tensor>>(value); }
  operator std::vector<double>() { return torch::stable::detail::to<std::vector<double>>(value); }
};

template <class Record>
Record record_of(void (*kernel)(const Record&));

template <auto kernel>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  using Record = decltype(record_of(kernel));
  STD_TORCH_CHECK(arguments == Record::kCount && outputs == 0, "moment_ops: a schema of ", arguments, " arguments and ",
                  outputs, " outputs for a kernel of ", Record::kCount, " arguments without outputs");
  kernel(read_record<Record>([&](size_t i) { return Boxed{stack[i]}; }));
}

}  // namespace moment_ops

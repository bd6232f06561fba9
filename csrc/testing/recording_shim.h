// Launches run here, or are described to whoever runs them elsewhere: the kernel's symbol, which has to be visible, and
// the bytes of its arguments.
#pragma once

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "testing/shim.h"

namespace shim {

// Of (symbol, blocks, threads, bytes of every argument).
inline std::function<void(const std::string&, int, int, const std::vector<pybind11::bytes>&)> recorder;

template <class... Parameters, class... Arguments>
inline void record(int blocks, int threads, void (*kernel)(Parameters...), const Arguments&... arguments) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(kernel), &info) == 0 || info.dli_sname == nullptr) {
    throw std::runtime_error("a kernel without a symbol");
  }
  const auto bytes = [](const auto& value) {
    return pybind11::bytes(reinterpret_cast<const char*>(&value), sizeof value);
  };
  recorder(info.dli_sname, blocks, threads, {bytes(static_cast<const Parameters&>(arguments))...});
}

}  // namespace shim

#undef MOMENT_OPS_LAUNCH
#define MOMENT_OPS_LAUNCH(kernel, blocks, threads, stream, ...)                                                   \
  (shim::recorder ? shim::record((blocks), (threads), MOMENT_OPS_UNWRAP kernel, __VA_ARGS__)                      \
                  : shim::launch((blocks), (threads), [&] { (void)(stream); MOMENT_OPS_UNWRAP kernel(__VA_ARGS__); }))

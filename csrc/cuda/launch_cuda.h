// Streams, launches and errors on the GPU, without the headers of a CUDA build of torch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

// Weak: the symbol lives in libtorch_cuda, which a CPU build of torch does not have. There no CUDA tensor exists that
// could bring anybody here.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));

#define MOMENT_OPS_STREAM cudaStream_t
#define MOMENT_OPS_LAUNCH(kernel, blocks, threads, stream, ...)                                        \
  do {                                                                                                 \
    kernel<<<(blocks), (threads), 0, (stream)>>>(__VA_ARGS__);                                         \
    const cudaError_t launch_error = cudaGetLastError();                                               \
    STD_TORCH_CHECK(launch_error == cudaSuccess, "moment_ops: ", cudaGetErrorString(launch_error));    \
  } while (false)

namespace moment_ops::cuda {

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace moment_ops::cuda

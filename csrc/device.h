// Where a tensor lives: the switch between the CPU kernels and the CUDA launchers, and what an entry point needs to
// call the latter. CMD_EXT_CUDA is defined in a build with CUDA kernels. CMD_EXT_SIMT is a build for tests only, in
// which the launchers run in an emulator on the memory of CPU tensors, so that the whole path from the schema to the
// kernel is tested on a machine without a GPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#if defined(CMD_EXT_CUDA) || defined(CMD_EXT_SIMT)
#define CMD_EXT_GPU
#endif

#ifdef CMD_EXT_GPU
#include "cuda/kernels.h"
#endif
#ifdef CMD_EXT_SIMT
#include "simt.h"
#elif defined(CMD_EXT_CUDA)
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace cmd_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool on_gpu([[maybe_unused]] const Tensor& t) {
#if defined(CMD_EXT_SIMT)
  return true;
#elif defined(CMD_EXT_CUDA)
  return t.is_cuda();
#else
  return false;
#endif
}

#ifdef CMD_EXT_GPU

// Makes the device of `t` the current one while it lives, and holds that device's current stream.
class Gpu {
 public:
#ifdef CMD_EXT_SIMT
  explicit Gpu(const Tensor&) {}
#else
  explicit Gpu(const Tensor& t) : guard_(t.get_device_index()) {
    // Looked up by name, as libtorch_cuda is absent where the same library is loaded by a CPU build of torch.
    static const auto current_stream = reinterpret_cast<AOTITorchError (*)(int32_t, void**)>(
        dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
    if (!current_stream) throw std::runtime_error("cmd_ext: this torch has no CUDA streams");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif
  cudaStream_t stream() const { return stream_; }

 private:
#ifndef CMD_EXT_SIMT
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
}

// Scratch memory from torch's caching allocator, on the device of `like`.
inline Tensor workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls body(T{}) with T = float, double, __half or __nv_bfloat16.
template <class Body>
void dispatch_gpu(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(__half{});
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    default:
      return body(float{});
  }
}

#endif  // CMD_EXT_GPU

}  // namespace cmd_ext

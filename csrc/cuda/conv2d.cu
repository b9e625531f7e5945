// Instantiations of conv2d.cuh.
#include "conv2d.cuh"

namespace cmd_ext::cuda {

#define INSTANTIATE(T)                                                                                            \
  template cudaError_t sparse_conv2d(const T*, const Csr<T>&, const T*, int, T*, const ConvShape&, cudaStream_t); \
  template int64_t sparse_conv2d_grad_input_workspace_bytes<T>(int64_t);                                          \
  template cudaError_t sparse_conv2d_grad_input(const T*, const Csr<T>&, const int32_t*, const int32_t*,          \
                                                const int32_t*, int, T*, const ConvShape&, void*, cudaStream_t);  \
  template int64_t sparse_conv2d_grad_values_workspace_bytes<T>(int64_t, const ConvShape&);                       \
  template cudaError_t sparse_conv2d_grad_values(const T*, const T*, const Csr<T>&, T*, const ConvShape&, void*,  \
                                                 cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace cmd_ext::cuda

// Instantiations of threshold.cuh, and csr_transpose.cuh.
#include "csr_transpose.cuh"
#include "threshold.cuh"

namespace cmd_ext::cuda {

#define INSTANTIATE(T)                                                                                       \
  template cudaError_t topk_csr(const T*, int64_t, int64_t, int64_t, int64_t, T*, int32_t*, int32_t*, void*, \
                                cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

#define INSTANTIATE_RESIDUAL(T)                                                                                     \
  template cudaError_t residual_topk_csr(const T*, const T*, const T*, int64_t, int64_t, int64_t, int64_t, int64_t, \
                                         int64_t, T*, T*, int32_t*, int32_t*, void*, cudaStream_t);
INSTANTIATE_RESIDUAL(float)
INSTANTIATE_RESIDUAL(double)

}  // namespace cmd_ext::cuda

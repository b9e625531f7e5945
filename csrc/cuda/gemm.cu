// Instantiations of gemm.cuh.
#include "gemm.cuh"

namespace cmd_ext::cuda {

#define INSTANTIATE(T)                                                                                               \
  template int64_t gemm_splits<T>(const GemmShape&, int64_t, int64_t);                                               \
  template cudaError_t gemm(GemmShape, const GemmOperand<T>&, const GemmSparse<T>&, const GemmOperand<T>&, const T*, \
                            const T*, T*, float*, cudaStream_t);                                                     \
  template cudaError_t gemm_onepass(GemmShape, const GemmOperand<T>&, const T*, const T*, int64_t,                   \
                                    const GemmSparse<T>&, const T*, T*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace cmd_ext::cuda

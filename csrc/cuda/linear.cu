// Instantiations of linear.cuh.
#include "linear.cuh"

namespace cmd_ext::cuda {

#define INSTANTIATE(T) \
  template cudaError_t spmm_few(const T*, int64_t, const Csr<T>&, const T*, int, T*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace cmd_ext::cuda

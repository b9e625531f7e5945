// Instantiations of linear.cuh.
#include "linear.cuh"

namespace cmd_ext::cuda {

#define INSTANTIATE(T)                                                                                   \
  template cudaError_t transpose(const T*, int64_t, int64_t, T*, int64_t, cudaStream_t);                 \
  template cudaError_t spmm(const T*, int64_t, int64_t, const Csr<T>&, const T*, int, T*, cudaStream_t); \
  template cudaError_t spmm_few(const T*, int64_t, const Csr<T>&, const T*, int, T*, cudaStream_t);      \
  template int64_t sddmm_workspace_bytes<T>(int64_t, int64_t, int64_t, int64_t);                         \
  template cudaError_t sddmm(const T*, const T*, int64_t, const Csr<T>&, T*, void*, cudaStream_t);       \
  template cudaError_t rebuild(const T*, const T*, int64_t, int64_t, const Csr<T>&, T*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
template cudaError_t add_sparse(const Csr<float>&, float*, cudaStream_t);
template cudaError_t add_sparse(const Csr<double>&, double*, cudaStream_t);

}  // namespace cmd_ext::cuda

// Instantiations of svd.cuh.
#include "svd.cuh"

namespace cmd_ext::cuda {

#define INSTANTIATE(T)                                                                                        \
  template cudaError_t normalize_columns(const T*, int64_t, int64_t, int64_t, double, double*, cudaStream_t); \
  template int64_t jacobi_svd_workspace_bytes<T>(int64_t, int64_t);                                           \
  template cudaError_t jacobi_svd(const double*, int64_t, int64_t, int64_t, T*, T*, T*, void*, cudaStream_t); \
  template cudaError_t fix_signs(T*, T*, int64_t, int64_t, int64_t, int64_t, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace cmd_ext::cuda

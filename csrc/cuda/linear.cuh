#pragma once

#include "gpu.h"
#include "kernels.h"

namespace cmd_ext::cuda {

constexpr int kFewThreads = 128;  // a warp per output row

template <class T, int kTokens>
__global__ void __launch_bounds__(kFewThreads)
    spmm_few_kernel(const T* __restrict__ x, int tokens, Csr<T> s, const T* __restrict__ bias, int beta,
                    T* __restrict__ y) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * (kFewThreads / 32) + threadIdx.x / 32;
  if (row >= s.rows) return;
  gpu::Acc<T> sums[kTokens] = {};
  const int end = s.row_ptr[row + 1];
  for (int i = s.row_ptr[row] + lane; i < end; i += 32) {
    const gpu::Acc<T> value = gpu::widen(s.values[i]);
    const T* column = x + s.col_idx[i];
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      if (t < tokens) sums[t] += value * gpu::widen(column[t * s.cols]);
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sums[t] += __shfl_xor_sync(~0u, sums[t], offset);
    if (lane == 0 && t < tokens) {
      const gpu::Acc<T> old = beta ? gpu::widen(y[t * s.rows + row]) : gpu::Acc<T>(0);
      y[t * s.rows + row] = gpu::narrow<T>(old + sums[t] + (bias ? gpu::widen(bias[row]) : gpu::Acc<T>(0)));
    }
  }
}

template <class T>
cudaError_t spmm_few(const T* x, int64_t tokens, const Csr<T>& s, const T* bias, int beta, T* y, cudaStream_t stream) {
  return gpu::launch(spmm_few_kernel<T, 16>, dim3(unsigned(gpu::ceil_div(s.rows, kFewThreads / 32))), dim3(kFewThreads),
                     0, stream, x, int(tokens), s, bias, beta, y);
}

}  // namespace cmd_ext::cuda

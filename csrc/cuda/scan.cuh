// Prefix sums of integers over a warp and over a block.
#pragma once

#include "gpu.h"

namespace cmd_ext::cuda::scan {

template <class V>
__device__ __forceinline__ V warp_inclusive_sum(V value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const V other = __shfl_up_sync(~0u, value, offset);
    if (int(threadIdx.x % 32) >= offset) value += other;
  }
  return value;
}

// The sum of `value` over the threads before this one, and over all. `sums` may be used again right after.
template <int kBlock, class V>
__device__ __forceinline__ V block_exclusive_sum(V value, V* sums, V& total) {
  const int warp = threadIdx.x / 32;
  const V inclusive = warp_inclusive_sum(value);
  if (threadIdx.x % 32 == 31) sums[warp] = inclusive;
  __syncthreads();
  V before = inclusive - value;
  total = 0;
#pragma unroll
  for (int w = 0; w < kBlock / 32; ++w) {
    if (w < warp) before += sums[w];
    total += sums[w];
  }
  __syncthreads();
  return before;
}

}  // namespace cmd_ext::cuda::scan

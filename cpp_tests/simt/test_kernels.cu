#include "test_kernels.h"

namespace simt_test {

namespace gpu = cmd_ext::cuda::gpu;

constexpr int kTile = 16;

__global__ void __launch_bounds__(kTile* kTile)
    product_kernel(Fault fault, const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ c,
                   int n) {
  __shared__ float a_tile[kTile][kTile], b_tile[kTile][kTile];
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  const int row = blockIdx.y * kTile + y, col = blockIdx.x * kTile + x;
  if (fault == Fault::kEarlyReturn && row >= n) return;
  float sum = 0;
  for (int k0 = 0; k0 < n; k0 += kTile) {
    const bool a_in = row < n && (k0 + x < n || fault == Fault::kGlobalRead);
    a_tile[y][fault == Fault::kSharedIndex ? x + 1 : x] = a_in ? a[row * n + k0 + x] : 0;
    b_tile[y][x] = k0 + y < n && col < n ? b[(k0 + y) * n + col] : 0;
    if (fault == Fault::kSharedPointer && threadIdx.x == 0) (&a_tile[0][0])[n * kTile] = 1;
    if (fault == Fault::kDivergentBarrier && x % 2) {
      __syncthreads();
    } else {
      __syncthreads();
    }
    for (int k = 0; k < kTile; ++k) sum += a_tile[y][k] * b_tile[k][x];
    if (fault != Fault::kMissingBarrier) __syncthreads();
  }
  if (row < n && col < n) c[row * n + col] = sum;
}

cudaError_t product(Fault fault, const float* a, const float* b, float* c, int n) {
  const unsigned tiles = unsigned(gpu::ceil_div(n, kTile));
  return gpu::launch(product_kernel, dim3(tiles, tiles), dim3(kTile * kTile), 0, nullptr, fault, a, b, c, n);
}

constexpr int kRows = 64, kDepth = 32, kPitch = kDepth + 8;  // 80 bytes: rows of ldmatrix in different banks
struct Stage {
  __nv_bfloat16 a[kRows][kPitch], b[kRows][kPitch];
};

__device__ void load_stage(Stage& stage, const __nv_bfloat16* a, const __nv_bfloat16* b, int k0, int k) {
  for (int i = threadIdx.x; i < kRows * kDepth / 8; i += blockDim.x) {
    const int row = i / (kDepth / 8), column = i % (kDepth / 8) * 8;
    gpu::cp_async16(&stage.a[row][column], a + row * k + k0 + column);
    gpu::cp_async16(&stage.b[row][column], b + row * k + k0 + column);
  }
  gpu::cp_async_commit();
}

// Four warps, 16 rows of a each.
__global__ void __launch_bounds__(128)
    mma_product_kernel(Fault fault, const __nv_bfloat16* __restrict__ a, const __nv_bfloat16* __restrict__ b,
                       float* __restrict__ c, int k) {
  GPU_DYNAMIC_SHARED(shared);
  Stage* stages = reinterpret_cast<Stage*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, steps = k / kDepth;
  float sums[8][4] = {};
  load_stage(stages[0], a, b, 0, k);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps)
      load_stage(stages[(step + 1) % 2], a, b, (step + 1) * kDepth, k);
    else
      gpu::cp_async_commit();
    if (fault != Fault::kMissingWait) gpu::cp_async_wait<1>();
    __syncthreads();
    const Stage& stage = stages[step % 2];
    for (int kk = 0; kk < kDepth; kk += 16) {
      uint32_t a_fragment[4], b_fragments[4];
      gpu::ldmatrix_x4(a_fragment, &stage.a[warp * 16 + lane % 16][kk + lane / 16 * 8]);
      for (int j = 0; j < 8; j += 2) {
        gpu::ldmatrix_x4(b_fragments, &stage.b[j * 8 + lane / 16 * 8 + lane % 8][kk + lane / 8 % 2 * 8]);
        const uint32_t first[2] = {b_fragments[0], b_fragments[1]}, second[2] = {b_fragments[2], b_fragments[3]};
        gpu::mma(sums[j], a_fragment, first, __nv_bfloat16());
        gpu::mma(sums[j + 1], a_fragment, second, __nv_bfloat16());
      }
    }
    if (fault != Fault::kMissingBarrier) __syncthreads();
  }
  gpu::cp_async_wait<0>();
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 4; ++i)
      c[(warp * 16 + lane / 4 + i / 2 * 8) * kRows + j * 8 + lane % 4 * 2 + i % 2] = sums[j][i];
}

cudaError_t mma_product(Fault fault, const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int k) {
  return gpu::launch(mma_product_kernel, dim3(1), dim3(128), 2 * sizeof(Stage), nullptr, fault, a, b, c, k);
}

__device__ float block_sum(Fault fault, float value) {
  __shared__ float parts[8];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (fault == Fault::kBarrierInsteadOfShuffle && lane == 7) __syncthreads();
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  if (lane == 0) parts[warp] = value;
  if (fault != Fault::kMissingBarrier) __syncthreads();
  if (warp > 0) return 0;
  value = lane < 8 ? parts[lane] : 0;
  if (fault == Fault::kInactiveLane) {
    if (lane < 8)
      for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xff, value, offset);
  } else if (fault == Fault::kDifferentMasks) {
    value += __shfl_xor_sync(lane < 16 ? ~0u : 0xffff0000u, value, 1);
  } else {
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  }
  return value;
}

__global__ void __launch_bounds__(256) block_sums_kernel(Fault fault, const float* __restrict__ x, float* out) {
  const float sum = block_sum(fault, x[blockIdx.x * 256 + threadIdx.x]);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

cudaError_t block_sums(Fault fault, const float* x, int blocks, float* out) {
  return gpu::launch(block_sums_kernel, dim3(blocks), dim3(256), 0, nullptr, fault, x, out);
}

__global__ void __launch_bounds__(256)
    last_block_sum_kernel(Fault fault, const float* __restrict__ x, float* partial, unsigned* ticket, float* out) {
  __shared__ bool last;
  const float sum = block_sum(Fault::kNone, x[blockIdx.x * 256 + threadIdx.x]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    if (fault != Fault::kMissingRelease) __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  if (fault != Fault::kMissingAcquire) __threadfence();
  float total = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) total += partial[i];
  total = block_sum(Fault::kNone, total);
  if (threadIdx.x == 0) *out = total;
}

cudaError_t last_block_sum(Fault fault, const float* x, int blocks, float* partial, unsigned* ticket, float* out) {
  return gpu::launch(last_block_sum_kernel, dim3(blocks), dim3(256), 0, nullptr, fault, x, partial, ticket, out);
}

__global__ void __launch_bounds__(64) histogram_kernel(Fault fault, const unsigned* __restrict__ x, int n,
                                                       unsigned* counts, unsigned* ticket, unsigned* out) {
  __shared__ unsigned shared_counts[16];
  __shared__ bool last;
  if (threadIdx.x < 16 && fault != Fault::kUninitialised) shared_counts[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    atomicAdd(&shared_counts[x[i] % 16], 1u);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&counts[threadIdx.x], shared_counts[threadIdx.x]);
  if (threadIdx.x != 3 || fault != Fault::kMissingRelease) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x < 16) out[threadIdx.x] = counts[15 - threadIdx.x];
}

cudaError_t histogram(Fault fault, const unsigned* x, int n, unsigned* counts, unsigned* ticket, unsigned* out) {
  return gpu::launch(histogram_kernel, dim3(3), dim3(64), 0, nullptr, fault, x, n, counts, ticket, out);
}

__global__ void __launch_bounds__(32) reverse_warp_kernel(Fault fault, const float* x, float* y) {
  __shared__ float values[32];
  values[threadIdx.x] = x[threadIdx.x];
  if (fault == Fault::kMissingSyncwarp)
    __shfl_sync(~0u, 0, 0);  // orders no memory
  else
    __syncwarp();
  y[threadIdx.x] = values[31 - threadIdx.x];
}

cudaError_t reverse_warp(Fault fault, const float* x, float* y) {
  return gpu::launch(reverse_warp_kernel, dim3(1), dim3(32), 0, nullptr, fault, x, y);
}

__global__ void __launch_bounds__(64) overwrite_kernel(Fault fault, const float* x, float* out) {
  __shared__ float word;
  if (threadIdx.x == 0) word = *x;
  __syncthreads();
  out[threadIdx.x] = word;
  if (fault != Fault::kMissingBarrier) __syncthreads();
  __syncwarp();
  if (threadIdx.x == 40) word = 0;
}

cudaError_t overwrite(Fault fault, const float* x, float* out) {
  return gpu::launch(overwrite_kernel, dim3(1), dim3(64), 0, nullptr, fault, x, out);
}

__global__ void __launch_bounds__(32) copy_vectors_kernel(const float* x, float* y, int vectors) {
  for (int i = threadIdx.x; i < vectors; i += 32) {
    float4 value = reinterpret_cast<const float4*>(x)[i];
    value.x += 0;
    reinterpret_cast<float4*>(y)[i] = value;
  }
}

cudaError_t copy_vectors(Fault fault, const float* x, float* y, int vectors) {
  const int shift = fault == Fault::kMisaligned ? 1 : 0;
  return gpu::launch(copy_vectors_kernel, dim3(1), dim3(32), 0, nullptr, x + shift, y, vectors - shift);
}

__global__ void __launch_bounds__(32)
    move_records_kernel(Fault fault, const Record* x, Record* y, unsigned char* bytes) {
  __shared__ Record records[32];
  __shared__ unsigned char marks[32];
  if (threadIdx.x % 2)
    memcpy(&records[threadIdx.x], &x[threadIdx.x], sizeof(Record));
  else
    records[threadIdx.x] = x[threadIdx.x];
  marks[threadIdx.x] = static_cast<unsigned char>(threadIdx.x);
  if (fault != Fault::kMissingBarrier) __syncthreads();
  y[threadIdx.x] = records[31 - threadIdx.x];
  bytes[threadIdx.x] = marks[31 - threadIdx.x];
}

cudaError_t move_records(Fault fault, const Record* x, Record* y, unsigned char* bytes) {
  return gpu::launch(move_records_kernel, dim3(1), dim3(32), 0, nullptr, fault, x, y, bytes);
}

__global__ void __launch_bounds__(64) copy_async_kernel(Fault fault, const float* x, int count, float* y) {
  GPU_DYNAMIC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);
  const int i = threadIdx.x * 4;
  gpu::cp_async16(values + i, i < count ? x + i : x, i < count);
  gpu::cp_async_commit();
  if (fault == Fault::kOverwrittenCopy) values[i] = 1;
  if (fault == Fault::kCopyInFlight) return;
  gpu::cp_async_wait<0>();
  if (fault != Fault::kMissingBarrier) __syncthreads();
  for (int j = threadIdx.x; j < 256; j += 64) y[j] = values[j];
}

cudaError_t copy_async(Fault fault, const float* x, int count, float* y) {
  return gpu::launch(copy_async_kernel, dim3(1), dim3(64), 256 * sizeof(float), nullptr, fault, x, count, y);
}

__global__ void __launch_bounds__(32) operations_kernel(const uint32_t* x, uint32_t* out) {
  __shared__ uint32_t cells[8];
  const uint32_t value = x[threadIdx.x];
  const int lane = threadIdx.x;
  if (lane < 8) cells[lane] = lane == 1 || lane == 2 ? 100 : 0;
  __syncwarp();
  uint32_t results[kOperations] = {
      __shfl_sync(~0u, value, lane + 5, 8),
      __shfl_up_sync(~0u, value, 3),
      __shfl_down_sync(~0u, value, 3, 16),
      __shfl_xor_sync(~0u, value, 9),
      __ballot_sync(~0u, value & 1),
      uint32_t(__any_sync(~0u, value == 7)),
      uint32_t(__all_sync(~0u, value < 100)),
      __match_any_sync(~0u, value % 4),
      __reduce_add_sync(~0u, value),
      uint32_t(__reduce_min_sync(~0u, int(value) - 50)),
      __reduce_max_sync(~0u, value),
      __reduce_xor_sync(~0u, value),
      __activemask(),
  };
  atomicAdd(&cells[0], value);
  atomicMin(&cells[1], value);
  atomicMax(&cells[2], value);
  atomicOr(&cells[3], 1u << lane);
  atomicInc(&cells[4], 9u);
  atomicCAS(&cells[5], 0u, value + 1);
  __syncwarp();
  for (int i = 0; i < 5; ++i) results[13 + i] = cells[i];
  for (int i = 0; i < kOperations; ++i) out[i * 32 + lane] = results[i];
}

cudaError_t operations(const uint32_t* x, uint32_t* out) {
  return gpu::launch(operations_kernel, dim3(1), dim3(32), 0, nullptr, x, out);
}

__global__ void __launch_bounds__(64) block_votes_kernel(const int* x, int* out) {
  const int value = x[threadIdx.x];
  const int count = __syncthreads_count(value), all = __syncthreads_and(value), any = __syncthreads_or(value);
  out[threadIdx.x] = count * 4 + all * 2 + any;
}

cudaError_t block_votes(const int* x, int* out) {
  return gpu::launch(block_votes_kernel, dim3(1), dim3(64), 0, nullptr, x, out);
}

template <class T>
__global__ void __launch_bounds__(32) fragments_kernel(const T* a, const T* b, bool transposed, float* d) {
  __shared__ __align__(16) T a_tile[16][16];
  __shared__ __align__(16) T b_tile[32][8];  // two matrices [8, 8] of k below each other; ldmatrix names 32 rows
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) {
    a_tile[i / 16][i % 16] = a[i];
    if (i < 128 && transposed) b_tile[i / 8][i % 8] = b[i];                     // b is [16, 8]: rows are k
    if (i < 128 && !transposed) b_tile[i % 16 / 8 * 8 + i / 16][i % 8] = b[i];  // b is [8, 16]
    if (i >= 128) b_tile[i / 8][i % 8] = gpu::narrow<T>(0);
  }
  __syncwarp();
  uint32_t a_fragment[4], b_fragment[4];
  gpu::ldmatrix_x4(a_fragment, &a_tile[lane % 16][lane / 16 * 8]);
  if (transposed)
    gpu::ldmatrix_x4_trans(b_fragment, b_tile[lane]);
  else
    gpu::ldmatrix_x4(b_fragment, b_tile[lane]);
  const uint32_t b_pair[2] = {b_fragment[0], b_fragment[1]};
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
  gpu::mma(sums, a_fragment, b_pair, T());
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

cudaError_t fragments_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, bool transposed, float* d) {
  return gpu::launch(fragments_kernel<__nv_bfloat16>, dim3(1), dim3(32), 0, nullptr, a, b, transposed, d);
}
cudaError_t fragments_f16(const __half* a, const __half* b, bool transposed, float* d) {
  return gpu::launch(fragments_kernel<__half>, dim3(1), dim3(32), 0, nullptr, a, b, transposed, d);
}

__global__ void __launch_bounds__(32) fragments_tf32_kernel(const float* a, const float* b, float* d) {
  const int group = threadIdx.x / 4, k = threadIdx.x % 4;
  uint32_t a_fragment[4], b_fragment[2];
  for (int i = 0; i < 4; ++i) a_fragment[i] = gpu::to_tf32(__float_as_uint(a[(group + i % 2 * 8) * 8 + k + i / 2 * 4]));
  for (int i = 0; i < 2; ++i) b_fragment[i] = gpu::to_tf32(__float_as_uint(b[group * 8 + k + i * 4]));
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(group + i / 2 * 8) * 8 + k * 2 + i % 2];
  gpu::mma(sums, a_fragment, b_fragment, float());
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + k * 2 + i % 2] = sums[i];
}

cudaError_t fragments_tf32(const float* a, const float* b, float* d) {
  return gpu::launch(fragments_tf32_kernel, dim3(1), dim3(32), 0, nullptr, a, b, d);
}

const int write_same_line = __LINE__ + 1;
__global__ void write_same_kernel(int* out) { *out = 1; }

cudaError_t write_same(int* out, int blocks, int threads) {
  return gpu::launch(write_same_kernel, dim3(blocks), dim3(threads), 0, nullptr, out);
}

__global__ void arrival_kernel(unsigned* counter, unsigned* order) {
  order[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1u);
}

cudaError_t arrival(unsigned* counter, unsigned* order, int blocks, int threads) {
  return gpu::launch(arrival_kernel, dim3(blocks), dim3(threads), 0, nullptr, counter, order);
}

__global__ void leftovers_kernel(unsigned* values) {
  GPU_DYNAMIC_SHARED(shared);
  __shared__ unsigned static_word;
  unsigned* dynamic_word = reinterpret_cast<unsigned*>(shared);
  values[blockIdx.x * 2] = static_word;
  values[blockIdx.x * 2 + 1] = *dynamic_word;
  static_word = *dynamic_word = 1;
}

cudaError_t leftovers(unsigned* values, int blocks) {
  return gpu::launch(leftovers_kernel, dim3(blocks), dim3(1), sizeof(unsigned), nullptr, values);
}

__global__ void empty_kernel() {}

cudaError_t empty(dim3 grid, dim3 block, size_t shared) {
  return gpu::launch(empty_kernel, grid, block, shared, nullptr);
}

__global__ void parameters_kernel(char a, double b, short c, float d, Record record, double* out) {
  *out = a + b + c + double(d) + double(record.words[4]);
}

cudaError_t parameters(char a, double b, short c, float d, Record record, double* out) {
  return gpu::launch(parameters_kernel, dim3(1), dim3(1), 0, nullptr, a, b, c, d, record, out);
}

}  // namespace simt_test

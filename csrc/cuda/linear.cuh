// Products with the sparse branch S of a linear layer, and the dense weight U V + S. CUDA cores, fp32 (fp64 for double)
// accumulation; the tensor-core kernels are in gemm.cuh.
//
// spmm: y[t, i] = beta y[t, i] + bias[i] + sum over nonzeros (i, k) of value * x[t, k].
//   A CTA of 16 warps owns 128 rows of S (64 for 16-bit types) and 32 lanes x 16 bytes of tokens. Tiles of 64 features
//   of x^T are staged in shared memory by cp.async, two deep; each warp walks its 8 (4) rows with a cursor per row, as
//   columns ascend: one coalesced load of up to 32 (column, value) pairs, a ballot that counts those in the tile, then
//   two shuffles, one LDS.128 and 4 FFMA a nonzero. Sums stay in registers; the tile of y leaves through shared memory
//   so that its rows are written 128 bytes at a time. Why not gather x from L2 (a warp per row, as most libraries do):
//   a nonzero needs 16 bytes a lane, and L2 gives a fifth of what shared memory does; staging reads each element once
//   per 128 rows instead of once per nonzero. LDS.128 bounds it at a quarter of the FFMA peak.
//   Operations 2 nnz T, bytes 4 (K T ceil(M / 128) from L2, K T + M T from memory) + 8 nnz ceil(T / 128) from L2.
// spmm_few: the same for a few tokens, x token-major: a warp per row, lanes over nonzeros, up to 16 tokens in
//   registers. S is read once and dominates: bytes 8 nnz.
// sddmm: out[(i, j)] = sum_t a[i, t] b[j, t]. A CTA stages 64 rows of b, 2 KB of t each (128 KB), and its 16 warps walk
//   the rows of S: the row of a stays in registers, each nonzero of the row in these columns (found by a first small
//   kernel) costs 4 LDS.128 and 16 FFMA a lane, and 8 nonzeros share 9 shuffles of the sum over lanes. Reading b's rows
//   from L2 per nonzero instead would move 4 nnz T bytes: at 5 % longer than the dense product takes. Here L2 serves
//   a once per 64 columns; LDS.128 bounds it at a fifth of the FFMA peak. Chunks of t are summed in order by a
//   second kernel: no atomics. Where 128 KB do not fit, or rows are not aligned, a warp sums each nonzero plainly.
// rebuild: w = U V + S, 64 x 64 tiles (32 x 32 for double), 4 x 4 sums a thread; S is added in the shared tile that the
//   result leaves through, so that w is written once and never read. Bytes s (M K + nnz) + factors; r is small.
//
// roofline spmm linear4096 fp32 d=0.05: 73.8 MB, 3.44 GFLOP, 51.3 us, 0.2
// roofline spmm linear4096 bf16 d=0.05: 38.6 MB, 3.44 GFLOP, 51.3 us, 0.35
// roofline spmm_few linear4096 fp32 d=0.05 t=16: 7.25 MB, 0.0268 GFLOP, 2.42 us, 0.15
// roofline spmm_few linear4096 fp32 d=0.05 t=1: 6.76 MB, 0.00168 GFLOP, 2.25 us, 0.5
// roofline sddmm linear4096 fp32 d=0.05 splits=4: 101 MB, 3.44 GFLOP, 51.3 us, 0.13
// roofline rebuild layer3 fp32 r=26 d=0.05: 2.86 MB, 0.0307 GFLOP, 0.954 us, 0.3
// roofline rebuild conv4 fp32 r=51 d=0.05: 11.4 MB, 0.241 GFLOP, 3.81 us, 0.5
// roofline rebuild linear4096 fp32 r=64 d=0.05: 75.9 MB, 2.15 GFLOP, 32.1 us, 0.5
#pragma once

#include "gpu.h"
#include "kernels.h"

namespace cmd_ext::cuda {

// transpose ----------------------------------------------------------------------------------------------------------

constexpr int kTransposeTile = 32, kTransposeRows = 8;

// out [cols, pitch] = in [rows, cols]^T, zeros from rows to pitch. A 32 x 32 tile through shared memory.
template <class T>
__global__ void __launch_bounds__(kTransposeTile* kTransposeRows)
    transpose_kernel(const T* __restrict__ in, int64_t rows, int64_t cols, T* __restrict__ out, int64_t pitch) {
  __shared__ gpu::Acc<T> tile[kTransposeTile][kTransposeTile + 1];
  const int64_t row0 = int64_t(blockIdx.x) * kTransposeTile, col0 = int64_t(blockIdx.y) * kTransposeTile;
  const int x = threadIdx.x % kTransposeTile, y = threadIdx.x / kTransposeTile;
#pragma unroll
  for (int i = y; i < kTransposeTile; i += kTransposeRows)
    tile[i][x] = row0 + i < rows && col0 + x < cols ? gpu::widen(in[(row0 + i) * cols + col0 + x]) : gpu::Acc<T>(0);
  __syncthreads();
#pragma unroll
  for (int i = y; i < kTransposeTile; i += kTransposeRows)
    if (col0 + i < cols && row0 + x < pitch) out[(col0 + i) * pitch + row0 + x] = gpu::narrow<T>(tile[x][i]);
}

template <class T>
cudaError_t transpose(const T* in, int64_t rows, int64_t cols, T* out, int64_t pitch, cudaStream_t stream) {
  const dim3 grid(unsigned(gpu::ceil_div(pitch, kTransposeTile)), unsigned(gpu::ceil_div(cols, kTransposeTile)));
  return gpu::launch(transpose_kernel<T>, grid, dim3(kTransposeTile * kTransposeRows), 0, stream, in, rows, cols, out,
                     pitch);
}

// spmm ---------------------------------------------------------------------------------------------------------------

template <class T>
struct SpmmTile {
  static constexpr int kWarps = 16, kThreads = 32 * kWarps, kStages = 2;
  static constexpr int kVec = 16 / int(sizeof(T));  // tokens a lane
  static constexpr int kTokens = 32 * kVec, kFeatures = 64;
  static constexpr int kWarpRows = kVec == 8 ? 4 : 8;  // 32 sums a lane, 16 in double
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kPitch = kRows + 1;  // of the tile of y: odd, so that a column of it has no bank conflicts
  static constexpr int kStageBytes = kFeatures * kTokens * int(sizeof(T));
  static constexpr int kOutBytes = 32 * kPitch * int(sizeof(gpu::Acc<T>));
  static constexpr int kSharedBytes = kStages * kStageBytes > kOutBytes ? kStages * kStageBytes : kOutBytes;
};

template <class T>
struct alignas(16) Vec16 {
  T lane[16 / sizeof(T)];
};

// Starts the copy of features [k0, k0 + 64) of the tokens of this CTA into one stage; zeros beyond the last feature.
template <class T>
__device__ __forceinline__ void spmm_load(unsigned char* stage, const T* xt, int64_t pitch, int64_t token0, int64_t k0,
                                          int64_t features) {
  using Tile = SpmmTile<T>;
  const int lane = threadIdx.x % 32;
  const bool token_in = token0 + lane * Tile::kVec < pitch;
  for (int k = threadIdx.x / 32; k < Tile::kFeatures; k += Tile::kWarps) {
    const bool in_range = token_in && k0 + k < features;
    const T* source = in_range ? xt + (k0 + k) * pitch + token0 + lane * Tile::kVec : xt;
    gpu::cp_async16(stage + (k * 32 + lane) * 16, source, in_range);
  }
  gpu::cp_async_commit();
}

template <class T>
__global__ void __launch_bounds__(SpmmTile<T>::kThreads, 1)
    spmm_kernel(const T* __restrict__ xt, int64_t tokens, int64_t pitch, Csr<T> s, const T* __restrict__ bias, int beta,
                T* __restrict__ y) {
  using Tile = SpmmTile<T>;
  using A = gpu::Acc<T>;
  GPU_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t token0 = int64_t(blockIdx.x) * Tile::kTokens;
  const int64_t row0 = int64_t(blockIdx.y) * Tile::kRows + warp * Tile::kWarpRows;

  A sums[Tile::kWarpRows][Tile::kVec] = {};
  int cursor[Tile::kWarpRows], end[Tile::kWarpRows];
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows; ++i) {
    const bool in_range = row0 + i < s.rows;
    cursor[i] = in_range ? s.row_ptr[row0 + i] : 0;
    end[i] = in_range ? s.row_ptr[row0 + i + 1] : 0;
  }

  const int steps = int(gpu::ceil_div(s.cols, Tile::kFeatures));
  if (steps > 0) spmm_load(shared, xt, pitch, token0, 0, s.cols);
  for (int step = 0; step < steps; ++step) {
    const int k0 = step * Tile::kFeatures;
    if (step + 1 < steps)
      spmm_load(shared + (step + 1) % 2 * Tile::kStageBytes, xt, pitch, token0, k0 + Tile::kFeatures, s.cols);
    else
      gpu::cp_async_commit();
    gpu::cp_async_wait<1>();
    __syncthreads();
    const Vec16<T>* stage = reinterpret_cast<const Vec16<T>*>(shared + step % 2 * Tile::kStageBytes);
#pragma unroll
    for (int i = 0; i < Tile::kWarpRows; ++i) {
      for (int count = 32; count == 32;) {
        const int at = cursor[i] + lane;
        const int k = at < end[i] ? s.col_idx[at] - k0 : Tile::kFeatures;
        const A value = k < Tile::kFeatures ? gpu::widen(s.values[at]) : A(0);
        count = __popc(__ballot_sync(~0u, k < Tile::kFeatures));
        cursor[i] += count;
        for (int j = 0; j < count; ++j) {
          const A weight = __shfl_sync(~0u, value, j);
          const Vec16<T> x = stage[__shfl_sync(~0u, k, j) * 32 + lane];
#pragma unroll
          for (int v = 0; v < Tile::kVec; ++v) sums[i][v] += weight * gpu::widen(x.lane[v]);
        }
      }
    }
    __syncthreads();
  }
  gpu::cp_async_wait<0>();

  // One of the lane's tokens at a time: 32 tokens x all rows fit, then each warp writes two of the tokens.
  A* tile = reinterpret_cast<A*>(shared);
#pragma unroll
  for (int v = 0; v < Tile::kVec; ++v) {
#pragma unroll
    for (int i = 0; i < Tile::kWarpRows; ++i) tile[lane * Tile::kPitch + warp * Tile::kWarpRows + i] = sums[i][v];
    __syncthreads();
    for (int slot = warp; slot < 32; slot += Tile::kWarps) {
      const int64_t token = token0 + slot * Tile::kVec + v;
      if (token >= tokens) continue;
      for (int i = lane; i < Tile::kRows; i += 32) {
        const int64_t row = int64_t(blockIdx.y) * Tile::kRows + i;
        if (row >= s.rows) break;
        A sum = tile[slot * Tile::kPitch + i];
        if (bias) sum += gpu::widen(bias[row]);
        if (beta) sum += gpu::widen(y[token * s.rows + row]);
        y[token * s.rows + row] = gpu::narrow<T>(sum);
      }
    }
    __syncthreads();
  }
}

template <class T>
cudaError_t spmm(const T* xt, int64_t tokens, int64_t pitch, const Csr<T>& s, const T* bias, int beta, T* y,
                 cudaStream_t stream) {
  using Tile = SpmmTile<T>;
  const dim3 grid(unsigned(gpu::ceil_div(tokens, Tile::kTokens)), unsigned(gpu::ceil_div(s.rows, Tile::kRows)));
  return gpu::launch(spmm_kernel<T>, grid, dim3(Tile::kThreads), Tile::kSharedBytes, stream, xt, tokens, pitch, s, bias,
                     beta, y);
}

// spmm_few -----------------------------------------------------------------------------------------------------------

constexpr int kFewThreads = 128;  // a warp a row of S

template <class T, int kTokens>
__global__ void __launch_bounds__(kFewThreads)
    spmm_few_kernel(const T* __restrict__ x, int64_t tokens, Csr<T> s, const T* __restrict__ bias, int beta,
                    T* __restrict__ y) {
  using A = gpu::Acc<T>;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * (kFewThreads / 32) + threadIdx.x / 32;
  if (row >= s.rows) return;
  const int64_t token0 = int64_t(blockIdx.y) * kTokens;
  x += token0 * s.cols;
  y += token0 * s.rows;
  const int count = int(tokens - token0 < kTokens ? tokens - token0 : kTokens);
  A sums[kTokens] = {};
  const int end = s.row_ptr[row + 1];
  for (int i = s.row_ptr[row] + lane; i < end; i += 32) {
    const A value = gpu::widen(s.values[i]);
    const T* column = x + s.col_idx[i];
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      if (t < count) sums[t] += value * gpu::widen(column[t * s.cols]);
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sums[t] += __shfl_xor_sync(~0u, sums[t], offset);
    if (lane != 0 || t >= count) continue;
    if (bias) sums[t] += gpu::widen(bias[row]);
    if (beta) sums[t] += gpu::widen(y[t * s.rows + row]);
    y[t * s.rows + row] = gpu::narrow<T>(sums[t]);
  }
}

template <class T>
cudaError_t spmm_few(const T* x, int64_t tokens, const Csr<T>& s, const T* bias, int beta, T* y, cudaStream_t stream) {
  const int chunk = tokens <= 1 ? 1 : tokens <= 4 ? 4 : 16;
  const dim3 grid(unsigned(gpu::ceil_div(s.rows, kFewThreads / 32)), unsigned(gpu::ceil_div(tokens, chunk)));
  const auto kernel = chunk == 1 ? spmm_few_kernel<T, 1> : chunk == 4 ? spmm_few_kernel<T, 4> : spmm_few_kernel<T, 16>;
  return gpu::launch(kernel, grid, dim3(kFewThreads), 0, stream, x, tokens, s, bias, beta, y);
}

// sddmm --------------------------------------------------------------------------------------------------------------

constexpr int kReduceThreads = 256;

// out [count] = sum of partial [splits, count], in order.
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_splits_kernel(const gpu::Acc<T>* __restrict__ partial, int64_t count, int splits, T* __restrict__ out) {
  const int64_t i = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (i >= count) return;
  gpu::Acc<T> sum = 0;
  for (int split = 0; split < splits; ++split) sum += partial[split * count + i];
  out[i] = gpu::narrow<T>(sum);
}

// First position in [begin, end) of ascending columns that is >= column.
__device__ __forceinline__ int lower_bound(const int32_t* col_idx, int begin, int end, int64_t column) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (col_idx[middle] < column)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

template <class T>
struct SddmmTile {
  static constexpr int kWarps = 16, kThreads = 32 * kWarps, kCols = 64, kSteps = 4;
  static constexpr int kVec = 16 / int(sizeof(T)), kRowBytes = kSteps * 512;
  static constexpr int kChunk = kSteps * 32 * kVec;  // of the summed dimension
  static constexpr int kSharedBytes = kCols * kRowBytes;
  static constexpr int kNonzeros = 8;  // summed over the lanes together
};

// starts [tiles + 1, rows]: the first nonzero of a row in a tile of columns.
__global__ inline void __launch_bounds__(kReduceThreads)
    sddmm_starts_kernel(const int32_t* __restrict__ row_ptr, const int32_t* __restrict__ col_idx, int64_t rows,
                        int tiles, int cols_per_tile, int32_t* __restrict__ starts) {
  const int64_t i = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (i >= rows * (tiles + 1)) return;
  const int64_t row = i % rows, tile = i / rows;
  starts[i] = lower_bound(col_idx, row_ptr[row], row_ptr[row + 1], tile * cols_per_tile);
}

// Sums 8 values of every lane over the warp at once: halving what a lane holds in each of three exchanges costs 9
// shuffles instead of 40. Lane l returns the total of value l % 8.
template <class A>
__device__ __forceinline__ A sum_eight(A (&values)[8]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int width = 4; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const bool upper = lane & width;
      const A sent = upper ? values[i] : values[i + width], kept = upper ? values[i + width] : values[i];
      values[i] = kept + __shfl_xor_sync(~0u, sent, width);
    }
  }
  values[0] += __shfl_xor_sync(~0u, values[0], 8);
  return values[0] + __shfl_xor_sync(~0u, values[0], 16);
}

template <class T>
__global__ void __launch_bounds__(SddmmTile<T>::kThreads, 1)
    sddmm_tile_kernel(const T* __restrict__ a, const T* __restrict__ b, int64_t k, Csr<T> pattern,
                      const int32_t* __restrict__ starts, gpu::Acc<T>* __restrict__ partial, T* __restrict__ out) {
  using Tile = SddmmTile<T>;
  using A = gpu::Acc<T>;
  GPU_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t col0 = int64_t(blockIdx.x) * Tile::kCols, k0 = int64_t(blockIdx.y) * Tile::kChunk;
  for (int i = threadIdx.x; i < Tile::kCols * Tile::kRowBytes / 16; i += Tile::kThreads) {
    const int col = i / (Tile::kRowBytes / 16);
    const int64_t at = k0 + i % (Tile::kRowBytes / 16) * Tile::kVec;
    const bool in_range = col0 + col < pattern.cols && at < k;
    gpu::cp_async16(shared + i * 16, in_range ? b + (col0 + col) * k + at : b, in_range);
  }
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  __syncthreads();

  const Vec16<T>* tile = reinterpret_cast<const Vec16<T>*>(shared);
  starts += blockIdx.x * pattern.rows;
  for (int64_t row = blockIdx.z * Tile::kWarps + warp; row < pattern.rows; row += gridDim.z * Tile::kWarps) {
    const int begin = starts[row], end = starts[pattern.rows + row];
    if (begin == end) continue;
    Vec16<T> left[Tile::kSteps];
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      const int64_t at = k0 + (step * 32 + lane) * Tile::kVec;
      if (at < k)
        left[step] = *reinterpret_cast<const Vec16<T>*>(a + row * k + at);
      else
#pragma unroll
        for (int v = 0; v < Tile::kVec; ++v) left[step].lane[v] = gpu::narrow<T>(0);
    }
    for (int first = begin; first < end; first += Tile::kNonzeros) {
      A sums[Tile::kNonzeros] = {};
#pragma unroll
      for (int i = 0; i < Tile::kNonzeros; ++i) {
        if (first + i >= end) break;
        const Vec16<T>* right = tile + (pattern.col_idx[first + i] - col0) * (Tile::kRowBytes / 16) + lane;
#pragma unroll
        for (int step = 0; step < Tile::kSteps; ++step) {
          const Vec16<T> x = right[step * 32];
#pragma unroll
          for (int v = 0; v < Tile::kVec; ++v) sums[i] += gpu::widen(left[step].lane[v]) * gpu::widen(x.lane[v]);
        }
      }
      const A total = sum_eight(sums);
      if (lane >= Tile::kNonzeros || first + lane >= end) continue;
      if (partial)
        partial[blockIdx.y * pattern.nnz + first + lane] = total;
      else
        out[first + lane] = gpu::narrow<T>(total);
    }
  }
}

constexpr int kSddmmThreads = 128;

// Any alignment and length: a warp per nonzero of a row, elements one by one.
template <class T>
__global__ void __launch_bounds__(kSddmmThreads) sddmm_plain_kernel(const T* __restrict__ a, const T* __restrict__ b,
                                                                    int64_t k, Csr<T> pattern, T* __restrict__ out) {
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x;
  for (int at = pattern.row_ptr[row] + threadIdx.x / 32; at < pattern.row_ptr[row + 1]; at += kSddmmThreads / 32) {
    const T *left = a + row * k, *right = b + pattern.col_idx[at] * k;
    gpu::Acc<T> sum = 0;
    for (int64_t t = lane; t < k; t += 32) sum += gpu::widen(left[t]) * gpu::widen(right[t]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (lane == 0) out[at] = gpu::narrow<T>(sum);
  }
}

// The tiled kernel reads all of b for every block of rows: it needs whole chunks of 16 bytes and enough rows.
template <class T>
bool sddmm_is_tiled(const T* a, const T* b, int64_t rows, int64_t k) {
  const bool aligned = k * int64_t(sizeof(T)) % 16 == 0 && reinterpret_cast<uintptr_t>(a) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(b) % 16 == 0;
  return aligned && rows >= 16 && k * int64_t(sizeof(T)) >= 512 &&
         SddmmTile<T>::kSharedBytes <= gpu::max_shared_bytes();
}

template <class T>
int64_t sddmm_workspace_bytes(int64_t rows, int64_t cols, int64_t nnz, int64_t k) {
  const int64_t splits = gpu::ceil_div(k, SddmmTile<T>::kChunk);
  const int64_t sums = splits > 1 ? splits * nnz * int64_t(sizeof(gpu::Acc<T>)) : 0;
  return sums + rows * (gpu::ceil_div(cols, SddmmTile<T>::kCols) + 1) * int64_t(sizeof(int32_t));
}

template <class T>
cudaError_t sddmm(const T* a, const T* b, int64_t k, const Csr<T>& pattern, T* out, void* workspace,
                  cudaStream_t stream) {
  using Tile = SddmmTile<T>;
  if (pattern.nnz == 0) return cudaSuccess;
  if (!sddmm_is_tiled(a, b, pattern.rows, k))
    return gpu::launch(sddmm_plain_kernel<T>, dim3(unsigned(pattern.rows)), dim3(kSddmmThreads), 0, stream, a, b, k,
                       pattern, out);
  const int64_t splits = gpu::ceil_div(k, Tile::kChunk), tiles = gpu::ceil_div(pattern.cols, Tile::kCols);
  auto* partial = splits > 1 ? static_cast<gpu::Acc<T>*>(workspace) : nullptr;
  auto* starts =
      reinterpret_cast<int32_t*>(static_cast<gpu::Acc<T>*>(workspace) + (partial ? splits * pattern.nnz : 0));
  cudaError_t error = gpu::launch(
      sddmm_starts_kernel, dim3(unsigned(gpu::ceil_div(pattern.rows * (tiles + 1), kReduceThreads))),
      dim3(kReduceThreads), 0, stream, pattern.row_ptr, pattern.col_idx, pattern.rows, int(tiles), Tile::kCols, starts);
  if (error != cudaSuccess) return error;
  // Blocks of rows until every SM has work; each of them stages the tile of b again.
  const int64_t wanted = gpu::ceil_div(2 * gpu::multiprocessors(), tiles * splits);
  const int64_t useful = gpu::ceil_div(pattern.rows, 4 * Tile::kWarps);
  const dim3 grid(unsigned(tiles), unsigned(splits), unsigned(wanted < useful ? wanted : useful));
  error = gpu::launch(sddmm_tile_kernel<T>, grid, dim3(Tile::kThreads), size_t(Tile::kSharedBytes), stream, a, b, k,
                      pattern, starts, partial, out);
  if (error != cudaSuccess || !partial) return error;
  return gpu::launch(reduce_splits_kernel<T>, dim3(unsigned(gpu::ceil_div(pattern.nnz, kReduceThreads))),
                     dim3(kReduceThreads), 0, stream, partial, pattern.nnz, int(splits), out);
}

// rebuild ------------------------------------------------------------------------------------------------------------

template <class T>
struct RebuildTile {
  using A = gpu::Acc<T>;
  static constexpr int kThreads = 256, kSide = sizeof(A) == 8 ? 32 : 64, kDepth = 16;
  static constexpr int kEach = kSide / 16;  // a thread's tile is kEach x kEach
  static constexpr int kPitch = kSide + 1;
};

// Adds the part of S that lies in rows [row0, row0 + rows) and columns [col0, col0 + kSide) to the shared tile.
template <class T>
__device__ __forceinline__ void add_sparse_tile(gpu::Acc<T>* tile, const Csr<T>& s, int64_t row0, int rows,
                                                int64_t col0) {
  using Tile = RebuildTile<T>;
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < rows; i += Tile::kThreads / 32) {
    const int end = s.row_ptr[row0 + i + 1];
    const int first = lower_bound(s.col_idx, s.row_ptr[row0 + i], end, col0);
    for (int at = first + lane; at < end && s.col_idx[at] < col0 + Tile::kSide; at += 32)
      tile[i * Tile::kPitch + int(s.col_idx[at] - col0)] += gpu::widen(s.values[at]);
  }
}

template <class T>
__global__ void __launch_bounds__(RebuildTile<T>::kThreads, 3)
    rebuild_kernel(const T* __restrict__ u, const T* __restrict__ v, int r, int64_t group_rows, Csr<T> s,
                   T* __restrict__ w) {
  using Tile = RebuildTile<T>;
  using A = gpu::Acc<T>;
  __shared__ A shared[Tile::kSide * Tile::kPitch];
  // u is stored down a column: its rows are 2 banks apart modulo 32, so that 16 of them have no bank conflicts.
  __shared__ A us[Tile::kDepth][Tile::kSide + 8 / sizeof(A)], vs[Tile::kDepth][Tile::kSide];
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int64_t tiles = gpu::ceil_div(group_rows, Tile::kSide), group = blockIdx.y / tiles;
  const int64_t in_group = blockIdx.y % tiles * Tile::kSide, row0 = group * group_rows + in_group;
  const int64_t col0 = int64_t(blockIdx.x) * Tile::kSide;
  const int rows = int(group_rows - in_group < Tile::kSide ? group_rows - in_group : Tile::kSide);
  v += group * r * s.cols;

  A sums[Tile::kEach][Tile::kEach] = {};
  for (int k0 = 0; k0 < r; k0 += Tile::kDepth) {
    for (int i = threadIdx.x; i < Tile::kDepth * Tile::kSide; i += Tile::kThreads) {
      const int row = i / Tile::kDepth, k = i % Tile::kDepth, kv = i / Tile::kSide, col = i % Tile::kSide;
      us[k][row] = row < rows && k0 + k < r ? gpu::widen(u[(row0 + row) * r + k0 + k]) : A(0);
      vs[kv][col] = col0 + col < s.cols && k0 + kv < r ? gpu::widen(v[(k0 + kv) * s.cols + col0 + col]) : A(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < Tile::kDepth; ++k)
#pragma unroll
      for (int i = 0; i < Tile::kEach; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kEach; ++j) sums[i][j] += us[k][ty + 16 * i] * vs[k][tx + 16 * j];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < Tile::kEach; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kEach; ++j) shared[(ty + 16 * i) * Tile::kPitch + tx + 16 * j] = sums[i][j];
  __syncthreads();
  add_sparse_tile(shared, s, row0, rows, col0);
  __syncthreads();
  for (int i = threadIdx.x; i < rows * Tile::kSide; i += Tile::kThreads) {
    const int row = i / Tile::kSide, col = i % Tile::kSide;
    if (col0 + col < s.cols) w[(row0 + row) * s.cols + col0 + col] = gpu::narrow<T>(shared[row * Tile::kPitch + col]);
  }
}

template <class T>
cudaError_t rebuild(const T* u, const T* v, int64_t r, int64_t groups, const Csr<T>& s, T* w, cudaStream_t stream) {
  using Tile = RebuildTile<T>;
  const dim3 grid(unsigned(gpu::ceil_div(s.cols, Tile::kSide)),
                  unsigned(groups * gpu::ceil_div(s.rows / groups, Tile::kSide)));
  return gpu::launch(rebuild_kernel<T>, grid, dim3(Tile::kThreads), 0, stream, u, v, int(r), s.rows / groups, s, w);
}

constexpr int kAddThreads = 128;

// w += S: a warp a row. Positions are distinct, so plain read-modify-writes do.
template <class T>
__global__ void __launch_bounds__(kAddThreads) add_sparse_kernel(Csr<T> s, T* __restrict__ w) {
  const int64_t row = int64_t(blockIdx.x) * (kAddThreads / 32) + threadIdx.x / 32;
  if (row >= s.rows) return;
  const int end = s.row_ptr[row + 1];
  for (int at = s.row_ptr[row] + threadIdx.x % 32; at < end; at += 32) w[row * s.cols + s.col_idx[at]] += s.values[at];
}

template <class T>
cudaError_t add_sparse(const Csr<T>& s, T* w, cudaStream_t stream) {
  return gpu::launch(add_sparse_kernel<T>, dim3(unsigned(gpu::ceil_div(s.rows, kAddThreads / 32))), dim3(kAddThreads),
                     0, stream, s, w);
}

}  // namespace cmd_ext::cuda

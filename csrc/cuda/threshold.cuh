// topk_csr, residual_topk_csr: the exactly nnz largest |a| of each matrix of a batch, straight into CSR.
//
// Selection. Magnitudes of IEEE numbers order like their bit patterns without the sign, so the nnz-th largest is found
// by radix select: a histogram of the top 11 of the 31 bits (63 of double, 15 of the 16-bit types), then of the next
// digit among the elements that share the winning prefix, and so on: 3 passes for float, 6 for double, 2 for 16 bits.
// The key found leaves `wanted` elements equal to it to be kept. nnz is known on the host, so nothing is read back.
//
// Compaction. A tile is 4096 consecutive elements of a matrix whatever its rows: 16 a thread in 128-bit loads. A pass
// counts (greater, equal) per tile, packed in one word, a block per matrix scans the counts, and a last pass places an
// element at greater_before + min(equal_before, wanted). Order, exact ties, row_ptr (the place of each row's first
// element) and determinism all come from this one integer scan; atomics occur in histograms only, where order is moot.
//
// Residual. R = W - U V in tiles of 64 x 64 x 16, 4 x 4 sums a thread, written in 128-bit stores; the first digit is
// counted before R leaves the registers, which saves one of five reads.
//
// Bytes, float, per element: 5 reads and 8 bytes a nonzero = 20.8 at 10 % density; with the residual 24.8, as W is
// read, R written and then read 4 times. Roofline on H100 (3.0 TB/s):
//   256 x 2304 (ResNet-18 layer3)   4.1 us,  residual   4.9 us
//   512 x 4608 (VGG conv4)           16 us,  residual    20 us
//   4096 x 4096                     116 us,  residual   139 us
// The first two stay in the 50 MB of L2 after the first read, and are bound by the latency of ten dependent launches,
// some 15 us, which all matrices of a batch share. Predicted 75 % of the roofline at 4096 x 4096: the first pass makes
// a shared-memory atomic of every element, and the digits of trained weights crowd into a few dozen buckets; the
// increments compile to the counting atomic, which merges equal addresses within a warp. The residual's 2 r FLOP an
// element outlast its own 8 bytes from a rank of some 64 on; at rank 410 it is FFMA-bound, 0.4 ms. A sort moves several
// times these bytes; keeping the candidates of the second digit would save one more read, but needs a copy of a.
//
// roofline topk_csr layer3 fp32 d=0.1: 12.3 MB, 0 GFLOP, 4.09 us, 0.2
// roofline topk_csr conv4 fp32 d=0.1: 49.1 MB, 0 GFLOP, 16.4 us, 0.5
// roofline topk_csr linear4096 fp32 d=0.1: 349 MB, 0 GFLOP, 116 us, 0.75
// roofline residual_topk_csr layer3 fp32 d=0.1 r=26: 14.9 MB, 0.0307 GFLOP, 4.96 us, 0.2
// roofline residual_topk_csr conv4 fp32 d=0.1 r=51: 59.6 MB, 0.241 GFLOP, 19.9 us, 0.5
// roofline residual_topk_csr linear4096 fp32 d=0.1 r=410: 430 MB, 13.8 GFLOP, 205 us, 0.5
#pragma once

#include <cstring>

#include "kernels.h"
#include "scan.cuh"

namespace cmd_ext::cuda {
namespace threshold {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kScanThreads = 1024;
constexpr int kPerThread = 16, kTile = kThreads * kPerThread;
constexpr int kDigitBits = 11, kBuckets = 1 << kDigitBits;
constexpr int kBlocksPerMultiprocessor = 4;  // 64 KB of loads in flight
constexpr int kSide = 64, kDepth = 16;       // tile of the residual

using Count = unsigned long long;

template <class B, class K, K infinity>
struct KeyTraits {
  using Bits = B;
  using Key = K;
  static constexpr int bits = 8 * sizeof(B) - 1;
  static constexpr K nan = infinity + 1;
};
template <class T>
struct KeyOf;
template <>
struct KeyOf<float> : KeyTraits<uint32_t, uint32_t, 0x7f800000u> {};
template <>
struct KeyOf<double> : KeyTraits<uint64_t, uint64_t, 0x7ff0000000000000u> {};
template <>
struct KeyOf<gpu::half> : KeyTraits<uint16_t, uint32_t, 0x7c00u> {};
template <>
struct KeyOf<gpu::bf16> : KeyTraits<uint16_t, uint32_t, 0x7f80u> {};
template <class T>
using Key = typename KeyOf<T>::Key;

template <class T>
__device__ __forceinline__ Key<T> magnitude_key(const T& value) {
  typename KeyOf<T>::Bits bits;
  memcpy(&bits, &value, sizeof bits);
  const Key<T> key = bits & (~Key<T>(0) >> (8 * sizeof(Key<T>) - KeyOf<T>::bits));
  return key < KeyOf<T>::nan ? key : KeyOf<T>::nan;  // all NaN tie, whatever their payload
}

// The digits found of a matrix's nnz-th largest key, and how many of the elements that begin with them are kept.
struct Selection {
  uint64_t prefix;
  uint32_t wanted;
};

// kPerThread elements a thread: each warp owns 512 consecutive ones and reads them as 16-byte vectors of a lane each.
template <class T>
struct Tile {
  static constexpr int kWidth = 16 / sizeof(T), kVectors = kPerThread / kWidth;
  struct alignas(16) Vector {
    T at[kWidth];
  };
  Vector vectors[kVectors];

  static __device__ __forceinline__ int offset(int vector) {
    return threadIdx.x / 32 * (32 * kPerThread) + (vector * 32 + threadIdx.x % 32) * kWidth;
  }

  __device__ __forceinline__ void load(const T* __restrict__ a, int count) {
    if (count == kTile && reinterpret_cast<uintptr_t>(a) % 16 == 0) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) vectors[v] = *reinterpret_cast<const Vector*>(a + offset(v));
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          vectors[v].at[j] = offset(v) + j < count ? a[offset(v) + j] : gpu::narrow<T>(0);
    }
  }
};

__device__ __forceinline__ int tile_count(int64_t size, int tile) {
  const int64_t left = size - int64_t(tile) * kTile;
  return left < kTile ? int(left) : kTile;
}

__device__ __forceinline__ void clear(uint32_t* histogram) {
  for (int i = threadIdx.x; i < kBuckets; i += kThreads) histogram[i] = 0;
  __syncthreads();
}
__device__ __forceinline__ void flush(const uint32_t* histogram, Count* total) {
  __syncthreads();
  for (int i = threadIdx.x; i < kBuckets; i += kThreads)
    if (histogram[i] != 0) atomicAdd(total + i, Count(histogram[i]));
}

// A block per matrix.
__global__ void __launch_bounds__(kThreads)
    begin_selection_kernel(uint32_t nnz, Count* __restrict__ histograms, Selection* __restrict__ selections) {
  Count* histogram = histograms + int64_t(blockIdx.x) * kBuckets;
  for (int i = threadIdx.x; i < kBuckets; i += kThreads) histogram[i] = 0;
  if (threadIdx.x == 0) selections[blockIdx.x] = {0, nnz};
}

// Counts bits [low, high) of the keys that begin with the prefix; `blocks` blocks share a matrix.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    digit_histogram_kernel(const T* __restrict__ a, int64_t size, int tiles, int blocks, int low, int high,
                           const Selection* __restrict__ selections, Count* __restrict__ histograms) {
  __shared__ uint32_t histogram[kBuckets];
  clear(histogram);
  const int matrix = blockIdx.x / blocks;
  const Key<T> prefix = Key<T>(selections[matrix].prefix);
  const uint32_t mask = (1u << (high - low)) - 1;
  for (int tile = blockIdx.x % blocks; tile < tiles; tile += blocks) {
    const int count = tile_count(size, tile);
    Tile<T> elements;
    elements.load(a + matrix * size + int64_t(tile) * kTile, count);
#pragma unroll
    for (int v = 0; v < Tile<T>::kVectors; ++v)
#pragma unroll
      for (int j = 0; j < Tile<T>::kWidth; ++j) {
        const Key<T> key = magnitude_key(elements.vectors[v].at[j]);
        if (Tile<T>::offset(v) + j < count && (key >> high) == prefix)
          atomicAdd(&histogram[uint32_t(key >> low) & mask], 1u);
      }
  }
  flush(histogram, histograms + int64_t(matrix) * kBuckets);
}

// Appends the next digit of `bits` bits to the prefix and clears the histogram for the pass after. A block per matrix.
__global__ void __launch_bounds__(kThreads)
    pick_digit_kernel(int bits, Count* __restrict__ histograms, Selection* __restrict__ selections) {
  constexpr int kOwn = kBuckets / kThreads;
  __shared__ Count sums[kWarps];
  Count* histogram = histograms + int64_t(blockIdx.x) * kBuckets;
  const Selection selection = selections[blockIdx.x];
  const int top = kBuckets - 1 - threadIdx.x * kOwn;  // this thread's largest bucket; larger ones are those before it
  Count counts[kOwn], sum = 0, total;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    counts[i] = histogram[top - i];
    histogram[top - i] = 0;
    sum += counts[i];
  }
  Count before = scan::block_exclusive_sum<kThreads>(sum, sums, total);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (before < selection.wanted && selection.wanted <= before + counts[i])
      selections[blockIdx.x] = {selection.prefix << bits | uint64_t(top - i), uint32_t(selection.wanted - before)};
    before += counts[i];
  }
}

// 1 for a greater key, 1 << 16 for an equal one; sums of a tile fit.
template <class T>
__device__ __forceinline__ uint32_t packed_count(const T& value, Key<T> threshold) {
  const Key<T> key = magnitude_key(value);
  return key > threshold ? 1u : key == threshold ? 1u << 16 : 0u;
}

// counts[matrix, tile] = (greater, equal). A block per tile.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    count_kernel(const T* __restrict__ a, int64_t size, int tiles, const Selection* __restrict__ selections,
                 uint2* __restrict__ counts) {
  __shared__ uint32_t sums[kWarps];
  const int matrix = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int count = tile_count(size, tile);
  Tile<T> elements;
  elements.load(a + matrix * size + int64_t(tile) * kTile, count);
  const Key<T> threshold = Key<T>(selections[matrix].prefix);
  uint32_t packed = 0;
#pragma unroll
  for (int v = 0; v < Tile<T>::kVectors; ++v)
#pragma unroll
    for (int j = 0; j < Tile<T>::kWidth; ++j)
      if (Tile<T>::offset(v) + j < count) packed += packed_count(elements.vectors[v].at[j], threshold);
  packed = __reduce_add_sync(~0u, packed);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = packed;
  __syncthreads();
  if (threadIdx.x != 0) return;
  packed = 0;
  for (int w = 0; w < kWarps; ++w) packed += sums[w];
  counts[blockIdx.x] = make_uint2(packed & 0xffff, packed >> 16);
}

// Turns the counts of each matrix's tiles into sums over the tiles before; equal ones are clipped at `wanted`, so that
// any number of them fits. A block per matrix.
__global__ void __launch_bounds__(kScanThreads)
    scan_tiles_kernel(int tiles, const Selection* __restrict__ selections, uint2* __restrict__ counts) {
  __shared__ uint64_t sums[kScanThreads / 32];
  const uint32_t wanted = selections[blockIdx.x].wanted;
  counts += int64_t(blockIdx.x) * tiles;
  uint32_t greater = 0, equal = 0;
  for (int first = 0; first < tiles; first += kScanThreads) {
    const int tile = first + threadIdx.x;
    const uint2 own = tile < tiles ? counts[tile] : make_uint2(0, 0);
    uint64_t total;
    const uint64_t before = scan::block_exclusive_sum<kScanThreads>(uint64_t(own.y) << 32 | own.x, sums, total);
    if (tile < tiles)
      counts[tile] = make_uint2(greater + uint32_t(before), min(equal + uint32_t(before >> 32), wanted));
    greater += uint32_t(total);
    equal = min(equal + uint32_t(total >> 32), wanted);
  }
}

// A block per tile; `before` as scan_tiles_kernel leaves it.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    compact_kernel(const T* __restrict__ a, int64_t m, int64_t n, int64_t nnz, int tiles,
                   const Selection* __restrict__ selections, const uint2* __restrict__ before, T* __restrict__ values,
                   int32_t* __restrict__ row_ptr, int32_t* __restrict__ col_idx) {
  __shared__ uint32_t sums[kWarps];
  const int matrix = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t first = int64_t(tile) * kTile;
  const int count = tile_count(m * n, tile);
  Tile<T> elements;
  elements.load(a + matrix * (m * n) + first, count);
  values += matrix * nnz;
  col_idx += matrix * nnz;
  row_ptr += matrix * (m + 1);
  const uint32_t wanted = selections[matrix].wanted;
  const Key<T> threshold = Key<T>(selections[matrix].prefix);

  uint32_t ranks[Tile<T>::kVectors], in_warp = 0;  // packed counts before each vector, first within the warp
#pragma unroll
  for (int v = 0; v < Tile<T>::kVectors; ++v) {
    uint32_t own = 0;
#pragma unroll
    for (int j = 0; j < Tile<T>::kWidth; ++j)
      if (Tile<T>::offset(v) + j < count) own += packed_count(elements.vectors[v].at[j], threshold);
    const uint32_t inclusive = scan::warp_inclusive_sum(own);
    ranks[v] = in_warp + inclusive - own;
    in_warp += __shfl_sync(~0u, inclusive, 31);
  }
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = in_warp;
  __syncthreads();
  uint32_t earlier = 0;
  for (int w = 0; w < int(threadIdx.x / 32); ++w) earlier += sums[w];

  const uint2 start = before[blockIdx.x];
  const int64_t first_row = first / n;
  const uint32_t first_col = uint32_t(first - first_row * n);
#pragma unroll
  for (int v = 0; v < Tile<T>::kVectors; ++v) {
    const uint32_t rank = earlier + ranks[v], place = first_col + Tile<T>::offset(v);
    uint32_t greater = start.x + (rank & 0xffff), equal = start.y + (rank >> 16);
    int64_t row = first_row + place / uint32_t(n);
    uint32_t col = place % uint32_t(n);
#pragma unroll
    for (int j = 0; j < Tile<T>::kWidth; ++j) {
      if (Tile<T>::offset(v) + j >= count) break;
      const uint32_t position = greater + min(equal, wanted);
      const uint32_t packed = packed_count(elements.vectors[v].at[j], threshold);
      if (col == 0) row_ptr[row] = int32_t(position);
      if (packed == 1 || (packed != 0 && equal < wanted)) {
        values[position] = elements.vectors[v].at[j];
        col_idx[position] = int32_t(col);
      }
      greater += packed & 0xffff;
      equal += packed >> 16;
      if (++col == n) col = 0, ++row;
    }
  }
  if (tile == tiles - 1 && threadIdx.x == 0) row_ptr[m] = int32_t(nnz);
}

__global__ void __launch_bounds__(kThreads) zero_kernel(int64_t count, int32_t* __restrict__ out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[i] = 0;
}

// Four neighbours, moved in 16-byte accesses.
template <class T>
struct alignas(16) Quad {
  T at[4];
};

struct ResidualShape {
  int64_t groups, m, n, r;  // m rows a group
  int tile_rows, tile_cols;
};

template <class T>
struct ResidualShared {
  Quad<T> u[kDepth][kSide / 4 + 1], v[kDepth][kSide / 4];
};

// sums = 4 x 4 entries of u v a thread; u and v begin at the tile, which has so many rows and columns.
template <class T>
__device__ __forceinline__ void multiply_tile(const T* __restrict__ u, const T* __restrict__ v, int64_t n, int64_t r,
                                              int rows, int cols, ResidualShared<T>& shared, T (&sums)[4][4]) {
  constexpr int kLoads = kSide * kDepth / kThreads;  // of u and of v, a thread and step
  const int u_row = threadIdx.x / kDepth, u_k = threadIdx.x % kDepth;
  const int v_k = threadIdx.x / kSide, v_col = threadIdx.x % kSide;
  u += u_row * r + u_k;
  v += v_k * n + v_col;
  for (int64_t left = r; left > 0; left -= kDepth, u += kDepth, v += kDepth * n) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = u_row + kSide / kLoads * i, k = v_k + kDepth / kLoads * i;
      shared.u[u_k][row / 4].at[row % 4] = row < rows && u_k < left ? u[kSide / kLoads * i * r] : T(0);
      shared.v[k][v_col / 4].at[v_col % 4] = v_col < cols && k < left ? v[kDepth / kLoads * i * n] : T(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const Quad<T> a = shared.u[k][threadIdx.x / 16], b = shared.v[k][threadIdx.x % 16];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += a.at[i] * b.at[j];
    }
  }
}

template <class T>
__device__ __forceinline__ T count_residual(T residual, uint32_t* histogram) {
  atomicAdd(&histogram[magnitude_key(residual) >> (KeyOf<T>::bits - kDigitBits)], 1u);
  return residual;
}

// residual = w - u v and the histogram of its first digit; `blocks` blocks share the groups of a matrix.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 2)
    residual_histogram_kernel(const T* __restrict__ w, const T* __restrict__ u, const T* __restrict__ v,
                              ResidualShape shape, int blocks, T* __restrict__ residual,
                              Count* __restrict__ histograms) {
  __shared__ ResidualShared<T> shared;
  __shared__ uint32_t histogram[kBuckets];
  clear(histogram);
  const int64_t m = shape.m, n = shape.n, r = shape.r;
  const int64_t matrix = blockIdx.x / blocks;
  const int x = threadIdx.x % 16 * 4, y = threadIdx.x / 16 * 4;
  const bool wide = n % 4 == 0 && (reinterpret_cast<uintptr_t>(w) | reinterpret_cast<uintptr_t>(residual)) % 16 == 0;
  const int tiles = int(shape.groups) * shape.tile_rows * shape.tile_cols;
  for (int tile = blockIdx.x % blocks; tile < tiles; tile += blocks) {
    const int64_t group = matrix * shape.groups + tile / shape.tile_cols / shape.tile_rows;
    const int64_t row = int64_t(tile / shape.tile_cols % shape.tile_rows) * kSide;
    const int col = tile % shape.tile_cols * kSide;  // with 64 bits the compiler splits the 128-bit stores
    const int rows = int(min(int64_t(kSide), m - row)), cols = min(kSide, int(n) - col);
    T sums[4][4] = {};
    multiply_tile(u + (group * m + row) * r, v + group * r * n + col, n, r, rows, cols, shared, sums);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (y + i >= rows || x >= cols) break;
      const int64_t at = (group * m + row + y + i) * n + col + x;
      if (wide) {
        Quad<T> out = *reinterpret_cast<const Quad<T>*>(w + at);
#pragma unroll
        for (int j = 0; j < 4; ++j) out.at[j] = count_residual(out.at[j] - sums[i][j], histogram);
        *reinterpret_cast<Quad<T>*>(residual + at) = out;
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (x + j < cols) residual[at + j] = count_residual(w[at + j] - sums[i][j], histogram);
      }
    }
  }
  flush(histogram, histograms + matrix * kBuckets);
}

struct Workspace {
  Count* histograms;      // [batch, kBuckets]
  Selection* selections;  // [batch]
  uint2* tiles;           // [batch, tiles]

  Workspace(void* start, int64_t batch)
      : histograms(static_cast<Count*>(start)),
        selections(reinterpret_cast<Selection*>(histograms + batch * kBuckets)),
        tiles(reinterpret_cast<uint2*>(selections + batch)) {}
};

// Blocks that share a matrix, so that the batch fills the device about once.
inline int blocks_per_matrix(int64_t batch, int64_t tiles) {
  const int64_t wanted =
      gpu::ceil_div(int64_t(gpu::multiprocessors()) * kBlocksPerMultiprocessor, max(batch, int64_t(1)));
  return int(min(tiles, wanted));
}

inline cudaError_t begin_selection(int64_t batch, int64_t nnz, const Workspace& workspace, cudaStream_t stream) {
  return gpu::launch(begin_selection_kernel, dim3(unsigned(batch)), dim3(kThreads), 0, stream, uint32_t(nnz),
                     workspace.histograms, workspace.selections);
}

// From the first digit's histogram, or without it, to the CSR.
template <class T>
cudaError_t select_and_compact(const T* a, int64_t batch, int64_t m, int64_t n, int64_t nnz, bool first_digit_counted,
                               T* values, int32_t* row_ptr, int32_t* col_idx, const Workspace& workspace,
                               cudaStream_t stream) {
  if (nnz == 0) {
    const int64_t count = batch * (m + 1);
    return gpu::launch(zero_kernel, dim3(unsigned(gpu::ceil_div(count, kThreads))), dim3(kThreads), 0, stream, count,
                       row_ptr);
  }
  const int64_t size = m * n;
  const int tiles = int(gpu::ceil_div(size, kTile)), blocks = blocks_per_matrix(batch, tiles);
  const dim3 per_matrix{unsigned(batch)}, per_tile{unsigned(batch * tiles)}, threads{kThreads};
  cudaError_t error = cudaSuccess;
  for (int high = KeyOf<T>::bits, low; high > 0; high = low) {
    low = max(0, high - kDigitBits);
    if (error == cudaSuccess && !(first_digit_counted && high == KeyOf<T>::bits))
      error = gpu::launch(digit_histogram_kernel<T>, dim3(unsigned(batch * blocks)), threads, 0, stream, a, size, tiles,
                          blocks, low, high, workspace.selections, workspace.histograms);
    if (error == cudaSuccess)
      error = gpu::launch(pick_digit_kernel, per_matrix, threads, 0, stream, high - low, workspace.histograms,
                          workspace.selections);
  }
  if (error == cudaSuccess)
    error = gpu::launch(count_kernel<T>, per_tile, threads, 0, stream, a, size, tiles, workspace.selections,
                        workspace.tiles);
  if (error == cudaSuccess)
    error = gpu::launch(scan_tiles_kernel, per_matrix, dim3(kScanThreads), 0, stream, tiles, workspace.selections,
                        workspace.tiles);
  if (error == cudaSuccess)
    error = gpu::launch(compact_kernel<T>, per_tile, threads, 0, stream, a, m, n, nnz, tiles, workspace.selections,
                        workspace.tiles, values, row_ptr, col_idx);
  return error;
}

}  // namespace threshold

int64_t topk_workspace_bytes(int64_t batch, int64_t m, int64_t n) {
  using namespace threshold;
  return batch * (kBuckets * sizeof(Count) + sizeof(Selection) + gpu::ceil_div(m * n, kTile) * sizeof(uint2));
}

template <class T>
cudaError_t topk_csr(const T* a, int64_t batch, int64_t m, int64_t n, int64_t nnz, T* values, int32_t* row_ptr,
                     int32_t* col_idx, void* workspace, cudaStream_t stream) {
  const threshold::Workspace parts(workspace, batch);
  const cudaError_t error = threshold::begin_selection(batch, nnz, parts, stream);
  if (error != cudaSuccess) return error;
  return threshold::select_and_compact(a, batch, m, n, nnz, false, values, row_ptr, col_idx, parts, stream);
}

template <class T>
cudaError_t residual_topk_csr(const T* w, const T* u, const T* v, int64_t batch, int64_t groups, int64_t m, int64_t n,
                              int64_t r, int64_t nnz, T* residual, T* values, int32_t* row_ptr, int32_t* col_idx,
                              void* workspace, cudaStream_t stream) {
  using namespace threshold;
  const Workspace parts(workspace, batch);
  const int64_t rows = m / groups;
  const ResidualShape shape{groups, rows, n, r, int(gpu::ceil_div(rows, kSide)), int(gpu::ceil_div(n, kSide))};
  const int blocks = blocks_per_matrix(batch, groups * shape.tile_rows * shape.tile_cols);
  cudaError_t error = begin_selection(batch, nnz, parts, stream);
  if (error == cudaSuccess)
    error = gpu::launch(residual_histogram_kernel<T>, dim3(unsigned(batch * blocks)), dim3(kThreads), 0, stream, w, u,
                        v, shape, blocks, residual, parts.histograms);
  if (error != cudaSuccess) return error;
  return select_and_compact<T>(residual, batch, m, n, nnz, true, values, row_ptr, col_idx, parts, stream);
}

}  // namespace cmd_ext::cuda

// Tensor-core products of a layer U V + S on NHWC images (a linear layer is an image of one pixel): bf16, fp16, and
// float as tf32, with fp32 accumulation. mma.sync, ldmatrix and cp.async only, so one source serves sm_80 to sm_120.
//
// gemm: y[p, m] = bias[m] + sum over products of  sum_{tap, c} image[pixel(p, tap), c] * weight[m, tap, c]
//   "Concatenated K": the products [X_S | Z] . [S | U]^T run one after the other into the same registers, so y is
//   written once and Z is added for free; separate addmm + sparse product would read and write y again. The same kernel
//   is the first stage Z = X V^T (one dense product), and the gradient for x: G = dY U, then [dY_S | G] . [S^T | V^T]^T
//   with the pixels of the transposed convolution, a gather without atomics for any stride. S is held sparse and
//   computed dense: the tile of S that a step needs (128 outputs x 64 columns; 32 in tf32) is cleared and filled in
//   shared memory from the columns of the pattern, while the tensor cores work on the step before. Weight bytes are
//   those of the sparse form, operations those of a dense layer: this wins where a dense layer is bound by reading W
//   (few tokens), and ties at best where it is bound by operations; there W is rebuilt instead. Geometry: 128 pixels x
//   128 outputs (64 for thin Z), 8 warps of 32 x 64 (32 x 32), steps of 128 bytes of K, 3 stages of cp.async (96 KB: 2
//   CTAs an SM on sm_90). Rows of 128 bytes are swizzled (chunk ^ row % 8): no bank conflicts in LDSM. Few tiles leave
//   SMs idle, so K is split over blockIdx.z into fp32 partial sums that a second kernel adds in a fixed order. Bytes:
//   image (taps from L2), weights ceil(P / 128) times from L2, y once. Operations 2 P M K.
// gemm_onepass: the whole layer in one launch for r <= 64: a step loads one tile of X and uses it for V and for S; Z
//   stays in registers, goes through shared memory once as an operand, and never reaches memory. 128 x 128 tiles,
//   2 stages (80 KB). Z is recomputed for every 128 outputs: 2 P K r ceil(M / 128) operations, from X that is in L2.
//
// roofline gemm layer3 bf16 d=0.05 r=26: 13.8 MB, 15 GFLOP, 18.8 us, 0.4
// roofline gemm conv4 bf16 d=0.05 r=51: 55.2 MB, 120 GFLOP, 150 us, 0.45
// roofline gemm linear4096 bf16 d=0.05 r=410: 47 MB, 75.6 GFLOP, 94.7 us, 0.45
// roofline gemm linear4096 bf16 d=0.05 r=410 t=64: 45.4 MB, 9.03 GFLOP, 15.1 us, 0.4
// roofline gemm conv4 tf32 d=0.05 r=51: 109 MB, 120 GFLOP, 299 us, 0.45
// roofline gemm_onepass layer3 bf16 d=0.05 r=26: 13.3 MB, 18 GFLOP, 22.5 us, 0.4
// roofline gemm_onepass layer3 bf16 d=0 r=26: 13 MB, 3.17 GFLOP, 4.33 us, 0.5
// roofline gemm_onepass conv4 bf16 d=0 r=51: 51.9 MB, 48.5 GFLOP, 60.7 us, 0.45
// roofline gemm_onepass linear4096 bf16 d=0 r=64: 34.6 MB, 35.4 GFLOP, 44.4 us, 0.3
#pragma once

#include "gpu.h"
#include "kernels.h"

namespace cmd_ext::cuda {

constexpr int kGemmThreads = 256, kGemmPixels = 128, kGemmOuts = 128, kThinOuts = 64, kStepBytes = 128;
constexpr int kGemmRank = 64;  // largest rank of the one-pass kernel

template <class T>
struct GemmStep {
  static constexpr int kChunk = 16 / int(sizeof(T));          // elements of one 16-byte copy
  static constexpr int kDepth = kStepBytes / int(sizeof(T));  // elements of K in one step
};

// Address of 16-byte chunk `chunk` of row `row` in a tile of 128-byte rows: the swizzle spreads the 8 rows of one
// ldmatrix phase over all banks.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * kStepBytes + ((chunk ^ (row & 7)) << 4); }

// What the 128 rows of a tile are: image n and pixel (row, column) of output pixel p0 + i; n = -1 beyond the last.
struct TilePixel {
  int n;
  short row, col;
};

__device__ __forceinline__ void find_pixels(TilePixel* pixels, const GemmShape& shape, int64_t p0) {
  for (int i = threadIdx.x; i < kGemmPixels; i += kGemmThreads) {
    const int64_t p = p0 + i, plane = int64_t(shape.out_h) * shape.out_w;
    const bool in_range = p < shape.batch * plane;
    const int rest = in_range ? int(p % plane) : 0;
    pixels[i] = {in_range ? int(p / plane) : -1, short(rest / shape.out_w), short(rest % shape.out_w)};
  }
}

// Source coordinate of one axis, or -1 outside of the image.
__device__ __forceinline__ int source(int out, int tap, int stride, int pad, int dilation, int size, bool transposed) {
  int at = transposed ? out + pad - tap * dilation : out * stride - pad + tap * dilation;
  if (transposed && stride > 1) {
    if (at % stride != 0) return -1;
    at /= stride;
  }
  return unsigned(at) < unsigned(size) ? at : -1;
}

// Starts the copy of one step of the pixel operand: 128 pixels x 128 bytes of channels [c0, ..) at one tap.
template <class T>
__device__ __forceinline__ void load_pixels(unsigned char* tile, const GemmOperand<T>& operand, const GemmShape& shape,
                                            const TilePixel* pixels, int group, int tap, int c0) {
  const int chunk = threadIdx.x % 8, c = c0 + chunk * GemmStep<T>::kChunk;
  const int tap_h = tap / shape.kernel_w, tap_w = tap % shape.kernel_w;
#pragma unroll 1
  for (int row = threadIdx.x / 8; row < kGemmPixels; row += kGemmThreads / 8) {
    const TilePixel pixel = pixels[row];
    int h = pixel.row, w = pixel.col;
    if (operand.taps) {
      h = source(h, tap_h, shape.stride_h, shape.pad_h, shape.dilation_h, shape.in_h, shape.transposed);
      w = source(w, tap_w, shape.stride_w, shape.pad_w, shape.dilation_w, shape.in_w, shape.transposed);
    }
    const bool in_range = pixel.n >= 0 && h >= 0 && w >= 0 && c < operand.channels;
    const int height = operand.taps ? shape.in_h : shape.out_h, width = operand.taps ? shape.in_w : shape.out_w;
    const int64_t at = ((int64_t(pixel.n) * height + h) * width + w) * operand.pitch + group * operand.channels + c;
    gpu::cp_async16(tile + swizzled(row, chunk), operand.image + (in_range ? at : 0), in_range);
  }
}

// Starts the copy of one step of dense weights [rows of the group, k]: kRows rows from row0, columns [k0, ..).
template <class T, int kRows>
__device__ __forceinline__ void load_weights(unsigned char* tile, const T* weights, int rows, int row0, int64_t k,
                                             int64_t k0, int valid) {
  const int chunk = threadIdx.x % 8, c = chunk * GemmStep<T>::kChunk;
#pragma unroll 1
  for (int row = threadIdx.x / 8; row < kRows; row += kGemmThreads / 8) {
    const bool in_range = row0 + row < rows && c < valid;
    gpu::cp_async16(tile + swizzled(row, chunk), weights + (in_range ? (row0 + row) * k + k0 + c : 0), in_range);
  }
}

template <int kRows>
__device__ __forceinline__ void clear_weights(unsigned char* tile) {
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kStepBytes / 16; i += kGemmThreads)
    reinterpret_cast<uint4*>(tile)[i] = make_uint4(0, 0, 0, 0);
}

// Fills a cleared tile of weights with the nonzeros of S: outputs [out0, out0 + kRows) and channels [c0, ..) at one
// tap. A column of S is (channel, tap) and lists its rows ascending. In the forward direction outputs are rows of S and
// the channels of K are columns; in the transposed one it is the other way round. kRows >= 64 >= channels of a step.
template <class T, int kRows>
__device__ __forceinline__ void scatter_weights(unsigned char* tile, const GemmSparse<T>& s, const GemmShape& shape,
                                                int group, int out0, int tap, int c0) {
  constexpr int kDepth = GemmStep<T>::kDepth, kChunk = GemmStep<T>::kChunk;
  const int taps = shape.kernel_h * shape.kernel_w;
  const int columns = shape.transposed ? kRows : kDepth, per_column = kGemmThreads / columns;
  const int column = threadIdx.x / per_column, column0 = shape.transposed ? out0 : c0;
  if (column0 + column >= s.channels) return;
  const int row0 = group * s.group_rows + (shape.transposed ? c0 : out0);
  const int row_end = min(row0 + (shape.transposed ? kDepth : kRows), (group + 1) * s.group_rows);
  const int64_t j = int64_t(group) * s.channels * taps + int64_t(column0 + column) * taps + tap;
  const int end = s.col_ptr[j + 1];
  int first = s.col_ptr[j];
  for (int last = end; first < last;) {  // the first row of the tile
    const int middle = first + (last - first) / 2;
    if (s.row_idx[middle] < row0)
      first = middle + 1;
    else
      last = middle;
  }
#pragma unroll 1
  for (int i = first + threadIdx.x % per_column; i < end && s.row_idx[i] < row_end; i += per_column) {
    const int row = s.row_idx[i] - row0, m = shape.transposed ? column : row, k = shape.transposed ? row : column;
    *reinterpret_cast<T*>(tile + swizzled(m, k / kChunk) + k % kChunk * int(sizeof(T))) = s.values[s.perm[i]];
  }
}

template <class T>
__device__ __forceinline__ void round_operand(uint32_t (&r)[4]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = gpu::to_tf32(r[i]);
  }
}

// sums[i][j] += 32 pixels x 8 kTiles outputs of one step: pixels from pixel0, outputs from out0 of the tiles.
template <class T, int kTiles>
__device__ __forceinline__ void multiply_step(float (&sums)[2][kTiles][4], const unsigned char* pixels,
                                              const unsigned char* weights, int pixel0, int out0) {
  const int lane = threadIdx.x % 32;
#pragma unroll 2
  for (int k = 0; k < kStepBytes / 32; ++k) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      gpu::ldmatrix_x4(a[i], pixels + swizzled(pixel0 + 16 * i + lane % 16, 2 * k + lane / 16));
      round_operand<T>(a[i]);
    }
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t b[4];
      gpu::ldmatrix_x4(b, weights + swizzled(out0 + 8 * j + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      round_operand<T>(b);
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        gpu::mma(sums[i][j], a[i], low, T());
        gpu::mma(sums[i][j + 1], a[i], high, T());
      }
    }
  }
}

// Position of a step in K: the sparse or the dense product, its tap and first channel.
struct StepAt {
  bool dense;
  int tap, c0;
};
template <class T>
__device__ __forceinline__ int steps_per_tap(const GemmOperand<T>& operand) {
  return (operand.channels + GemmStep<T>::kDepth - 1) / GemmStep<T>::kDepth;
}
template <class T>
__device__ __forceinline__ int steps_of(const GemmOperand<T>& operand, const GemmShape& shape) {
  return steps_per_tap(operand) * (operand.taps ? shape.kernel_h * shape.kernel_w : 1);
}

// Writes a tile of fp32 sums that lie in shared memory as [128][kOuts + 4] to y (rounded, with bias) or to partial
// sums.
template <class T, int kOuts>
__device__ __forceinline__ void store_tile(const float* tile, const GemmShape& shape, int64_t p0, int out0, int group,
                                           const T* bias, T* y, float* partial) {
  constexpr int kPitch = kOuts + 4, kChunk = GemmStep<T>::kChunk;
  const int64_t pixels = shape.batch * shape.out_h * shape.out_w;
  const int64_t pitch = int64_t(shape.outs) * shape.groups;
  const int count = min(kOuts, shape.outs - out0);
  if (partial) {
    for (int i = threadIdx.x; i < kGemmPixels * kOuts; i += kGemmThreads) {
      const int row = i / kOuts, col = i % kOuts;
      if (p0 + row < pixels && col < count)
        partial[(p0 + row) * pitch + group * shape.outs + out0 + col] = tile[row * kPitch + col];
    }
    return;
  }
  for (int i = threadIdx.x; i < kGemmPixels * kOuts / kChunk; i += kGemmThreads) {
    const int row = i / (kOuts / kChunk), col = i % (kOuts / kChunk) * kChunk;
    if (p0 + row >= pixels || col >= count) continue;
    const int channel = group * shape.outs + out0 + col;
    struct alignas(16) Chunk {
      T at[kChunk];
    } chunk;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      float sum = tile[row * kPitch + col + c];
      if (bias && col + c < count) sum += gpu::widen(bias[channel + c]);
      chunk.at[c] = gpu::narrow<T>(sum);
    }
    T* out = y + (p0 + row) * pitch + channel;
    if (shape.vector_store) {
      *reinterpret_cast<Chunk*>(out) = chunk;
    } else {
#pragma unroll
      for (int c = 0; c < kChunk; ++c)
        if (col + c < count) out[c] = chunk.at[c];
    }
  }
}

// Puts a warp's 32 x 8 kTiles sums at (pixel0, out0) of the shared tile [128][kPitch].
template <int kTiles, int kPitch>
__device__ __forceinline__ void spill_sums(float* tile, const float (&sums)[2][kTiles][4], int pixel0, int out0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(tile + (pixel0 + 16 * i + lane / 4 + 8 * half) * kPitch + out0 + 8 * j +
                                   lane % 4 * 2) = make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
}

// gemm ---------------------------------------------------------------------------------------------------------------

template <int kOuts>
struct GemmTile {
  static constexpr int kStages = 3, kPixelBytes = kGemmPixels * kStepBytes, kWeightBytes = kOuts * kStepBytes;
  static constexpr int kStageBytes = kPixelBytes + kWeightBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;  // the tile of sums, [128][kOuts + 4] floats, fits too
  static_assert(kGemmPixels * (kOuts + 4) * 4 <= kSharedBytes, "the tile of sums leaves through the stages");
};

template <class T, int kOuts>
__global__ void __launch_bounds__(kGemmThreads, 2)
    gemm_kernel(GemmShape shape, GemmOperand<T> sparse_operand, GemmSparse<T> s, GemmOperand<T> dense_operand,
                const T* __restrict__ weights, const T* __restrict__ bias, T* __restrict__ y,
                float* __restrict__ partial) {
  using Tile = GemmTile<kOuts>;
  constexpr int kTiles = kOuts / 16, kDepth = GemmStep<T>::kDepth;
  GPU_DYNAMIC_SHARED(shared);
  __shared__ TilePixel pixels[kGemmPixels];
  const int warp = threadIdx.x / 32, pixel0 = warp % 4 * 32, warp_out0 = warp / 4 * (kOuts / 2);
  const int group = blockIdx.z / shape.splits, split = blockIdx.z % shape.splits;
  const int64_t p0 = int64_t(blockIdx.x) * kGemmPixels;
  const int out0 = blockIdx.y * kOuts;

  const int sparse_steps = s.values ? steps_of(sparse_operand, shape) : 0;
  const int steps = sparse_steps + (weights ? steps_of(dense_operand, shape) : 0);
  const int first = int(int64_t(steps) * split / shape.splits), end = int(int64_t(steps) * (split + 1) / shape.splits);
  const int64_t dense_k = int64_t(dense_operand.channels) * (dense_operand.taps ? shape.kernel_h * shape.kernel_w : 1);

  const int sparse_per_tap = steps_per_tap(sparse_operand), dense_per_tap = steps_per_tap(dense_operand);
  const auto at = [&](int step) {
    const bool dense = step >= sparse_steps;
    const int per_tap = dense ? dense_per_tap : sparse_per_tap, i = dense ? step - sparse_steps : step;
    return StepAt{dense, i / per_tap, i % per_tap * kDepth};
  };
  const auto stage = [&](int step) { return shared + step % Tile::kStages * Tile::kStageBytes; };
  const auto load = [&](int step) {
    if (step < end) {
      const StepAt now = at(step);
      // Chosen field by field: a choice between the structs would put copies of them in local memory.
      const GemmOperand<T> operand{now.dense ? dense_operand.image : sparse_operand.image,
                                   now.dense ? dense_operand.pitch : sparse_operand.pitch,
                                   now.dense ? dense_operand.channels : sparse_operand.channels,
                                   now.dense ? dense_operand.taps : sparse_operand.taps};
      load_pixels<T>(stage(step), operand, shape, pixels, group, now.tap, now.c0);
      if (now.dense)
        load_weights<T, kOuts>(stage(step) + Tile::kPixelBytes, weights + int64_t(group) * shape.outs * dense_k,
                               shape.outs, out0, dense_k, int64_t(now.tap) * dense_operand.channels + now.c0,
                               dense_operand.channels - now.c0);
    }
    gpu::cp_async_commit();
  };
  const auto fill = [&](int step) {  // the sparse weights of a step; the caller has a barrier before their use
    if (step >= end || step >= sparse_steps) return;
    clear_weights<kOuts>(stage(step) + Tile::kPixelBytes);
    __syncthreads();
    const StepAt now = at(step);
    scatter_weights<T, kOuts>(stage(step) + Tile::kPixelBytes, s, shape, group, out0, now.tap, now.c0);
  };

  find_pixels(pixels, shape, p0);
  __syncthreads();
  float sums[2][kTiles][4] = {};
#pragma unroll
  for (int i = 0; i < Tile::kStages - 1; ++i) load(first + i);
  fill(first);
  for (int step = first; step < end; ++step) {
    gpu::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    load(step + Tile::kStages - 1);
    fill(step + 1);
    multiply_step<T, kTiles>(sums, stage(step), stage(step) + Tile::kPixelBytes, pixel0, warp_out0);
  }
  gpu::cp_async_wait<0>();
  __syncthreads();

  float* tile = reinterpret_cast<float*>(shared);
  spill_sums<kTiles, kOuts + 4>(tile, sums, pixel0, warp_out0);
  __syncthreads();
  const int64_t size = shape.batch * shape.out_h * shape.out_w * shape.outs * shape.groups;
  store_tile<T, kOuts>(tile, shape, p0, out0, group, bias, y, partial ? partial + split * size : nullptr);
}

constexpr int kSumThreads = 256;

// y = bias + sum of the partial sums [splits, pixels, channels], in order.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    gemm_sum_kernel(const float* __restrict__ partial, int64_t size, int channels, int splits,
                    const T* __restrict__ bias, T* __restrict__ y) {
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= size) return;
  float sum = bias ? gpu::widen(bias[i % channels]) : 0;
  for (int split = 0; split < splits; ++split) sum += partial[split * size + i];
  y[i] = gpu::narrow<T>(sum);
}

inline int gemm_outs(int64_t outs) { return outs <= kThinOuts ? kThinOuts : kGemmOuts; }

// As many splits of K as give every SM two tiles, each with at least 4 steps.
template <class T>
int64_t gemm_splits(const GemmShape& shape, int64_t sparse_channels, int64_t dense_channels) {
  const int64_t pixels = shape.batch * shape.out_h * shape.out_w, taps = int64_t(shape.kernel_h) * shape.kernel_w;
  const int64_t tiles =
      gpu::ceil_div(pixels, kGemmPixels) * gpu::ceil_div(shape.outs, gemm_outs(shape.outs)) * shape.groups;
  const int64_t steps =
      gpu::ceil_div(sparse_channels, GemmStep<T>::kDepth) * taps + gpu::ceil_div(dense_channels, GemmStep<T>::kDepth);
  const int64_t wanted = tiles > 0 ? 2 * gpu::multiprocessors() / tiles : 1, useful = steps / 4;
  const int64_t splits = wanted < useful ? wanted : useful;
  return splits < 1 ? 1 : splits > 64 ? 64 : splits;
}

template <class T>
cudaError_t gemm(GemmShape shape, const GemmOperand<T>& sparse_operand, const GemmSparse<T>& s,
                 const GemmOperand<T>& dense_operand, const T* weights, const T* bias, T* y, float* partial,
                 cudaStream_t stream) {
  const int64_t pixels = shape.batch * shape.out_h * shape.out_w;
  if (pixels == 0 || shape.outs == 0) return cudaSuccess;
  if (!partial) shape.splits = 1;
  shape.vector_store = shape.outs % GemmStep<T>::kChunk == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
  const int outs = gemm_outs(shape.outs);
  const dim3 grid(unsigned(gpu::ceil_div(pixels, kGemmPixels)), unsigned(gpu::ceil_div(shape.outs, outs)),
                  unsigned(shape.groups * shape.splits));
  const auto kernel = outs == kThinOuts ? gemm_kernel<T, kThinOuts> : gemm_kernel<T, kGemmOuts>;
  const int bytes = outs == kThinOuts ? GemmTile<kThinOuts>::kSharedBytes : GemmTile<kGemmOuts>::kSharedBytes;
  float* sums = shape.splits > 1 ? partial : nullptr;
  const cudaError_t error = gpu::launch(kernel, grid, dim3(kGemmThreads), size_t(bytes), stream, shape, sparse_operand,
                                        s, dense_operand, weights, bias, y, sums);
  if (error != cudaSuccess || !sums) return error;
  const int64_t channels = int64_t(shape.outs) * shape.groups;
  return gpu::launch(gemm_sum_kernel<T>, dim3(unsigned(gpu::ceil_div(pixels * channels, kSumThreads))),
                     dim3(kSumThreads), 0, stream, sums, pixels * channels, int(channels), shape.splits, bias, y);
}

// gemm_onepass -------------------------------------------------------------------------------------------------------

template <class T>
struct OnePassTile {
  static constexpr int kStages = 2, kPixelBytes = kGemmPixels * kStepBytes;
  static constexpr int kRankBytes = kGemmRank * kStepBytes, kWeightBytes = kGemmOuts * kStepBytes;
  static constexpr int kStageBytes = kPixelBytes + kRankBytes + kWeightBytes;
  static constexpr int kRankSteps = kGemmRank / GemmStep<T>::kDepth;  // steps of the second product
  static constexpr int kOperandBytes = kRankSteps * (kPixelBytes + kWeightBytes);
  static constexpr int kSumBytes = kGemmPixels * (kGemmOuts + 4) * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kOperandBytes <= kSharedBytes && kSumBytes <= kSharedBytes, "Z, U and the sums reuse the stages");
};

// Writes a warp's 32 x 32 sums of Z as the pixel operand of the second product.
template <class T>
__device__ __forceinline__ void store_z(unsigned char* tiles, const float (&sums)[2][4][4], int pixel0, int rank0) {
  constexpr int kDepth = GemmStep<T>::kDepth, kChunk = GemmStep<T>::kChunk;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = pixel0 + 16 * i + lane / 4 + 8 * (e / 2), rank = rank0 + 8 * j + lane % 4 * 2 + e % 2;
        unsigned char* tile = tiles + rank / kDepth * (kGemmPixels * kStepBytes);
        *reinterpret_cast<T*>(tile + swizzled(row, rank % kDepth / kChunk) + rank % kChunk * int(sizeof(T))) =
            gpu::narrow<T>(sums[i][j][e]);
      }
}

template <class T>
__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm_onepass_kernel(GemmShape shape, GemmOperand<T> x, const T* __restrict__ v, const T* __restrict__ u, int rank,
                        GemmSparse<T> s, const T* __restrict__ bias, T* __restrict__ y) {
  using Tile = OnePassTile<T>;
  constexpr int kTiles = kGemmOuts / 16, kDepth = GemmStep<T>::kDepth;
  GPU_DYNAMIC_SHARED(shared);
  __shared__ TilePixel pixels[kGemmPixels];
  const int warp = threadIdx.x / 32, pixel0 = warp % 4 * 32;
  const int out_half = warp / 4 * (kGemmOuts / 2), rank_half = warp / 4 * (kGemmRank / 2);
  const int group = blockIdx.z, out0 = blockIdx.y * kGemmOuts;
  const int64_t p0 = int64_t(blockIdx.x) * kGemmPixels;
  const int steps = steps_of(x, shape), per_tap = steps_per_tap(x);
  const int64_t k = int64_t(x.channels) * shape.kernel_h * shape.kernel_w;
  v += group * rank * k;
  u += int64_t(group) * shape.outs * rank;

  const auto stage = [&](int step) { return shared + step % Tile::kStages * Tile::kStageBytes; };
  const auto load = [&](int step) {
    if (step < steps) {
      const int tap = step / per_tap, c0 = step % per_tap * kDepth;
      load_pixels<T>(stage(step), x, shape, pixels, group, tap, c0);
      load_weights<T, kGemmRank>(stage(step) + Tile::kPixelBytes, v, rank, 0, k, int64_t(tap) * x.channels + c0,
                                 x.channels - c0);
    }
    gpu::cp_async_commit();
  };
  const auto sparse_tile = [&](int step) { return stage(step) + Tile::kPixelBytes + Tile::kRankBytes; };
  const auto fill = [&](int step) {
    if (step >= steps || !s.values) return;
    clear_weights<kGemmOuts>(sparse_tile(step));
    __syncthreads();
    scatter_weights<T, kGemmOuts>(sparse_tile(step), s, shape, group, out0, step / per_tap, step % per_tap * kDepth);
  };

  find_pixels(pixels, shape, p0);
  __syncthreads();
  float sums[2][kTiles][4] = {}, z[2][4][4] = {};
  load(0);
  fill(0);
  for (int step = 0; step < steps; ++step) {
    gpu::cp_async_wait<0>();
    __syncthreads();
    load(step + 1);
    fill(step + 1);
    multiply_step<T, 4>(z, stage(step), stage(step) + Tile::kPixelBytes, pixel0, rank_half);
    if (s.values) multiply_step<T, kTiles>(sums, stage(step), sparse_tile(step), pixel0, out_half);
  }
  gpu::cp_async_wait<0>();
  __syncthreads();

  unsigned char* factor = shared + Tile::kRankSteps * Tile::kPixelBytes;
#pragma unroll
  for (int i = 0; i < Tile::kRankSteps; ++i)
    load_weights<T, kGemmOuts>(factor + i * Tile::kWeightBytes, u, shape.outs, out0, rank, i * kDepth,
                               rank - i * kDepth);
  gpu::cp_async_commit();
  store_z<T>(shared, z, pixel0, rank_half);
  gpu::cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Tile::kRankSteps; ++i)
    multiply_step<T, kTiles>(sums, shared + i * Tile::kPixelBytes, factor + i * Tile::kWeightBytes, pixel0, out_half);
  __syncthreads();

  float* tile = reinterpret_cast<float*>(shared);
  spill_sums<kTiles, kGemmOuts + 4>(tile, sums, pixel0, out_half);
  __syncthreads();
  store_tile<T, kGemmOuts>(tile, shape, p0, out0, group, bias, y, nullptr);
}

template <class T>
cudaError_t gemm_onepass(GemmShape shape, const GemmOperand<T>& x, const T* v, const T* u, int64_t rank,
                         const GemmSparse<T>& s, const T* bias, T* y, cudaStream_t stream) {
  const int64_t pixels = shape.batch * shape.out_h * shape.out_w;
  if (pixels == 0 || shape.outs == 0) return cudaSuccess;
  shape.splits = 1;
  shape.vector_store = shape.outs % GemmStep<T>::kChunk == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
  const dim3 grid(unsigned(gpu::ceil_div(pixels, kGemmPixels)), unsigned(gpu::ceil_div(shape.outs, kGemmOuts)),
                  unsigned(shape.groups));
  return gpu::launch(gemm_onepass_kernel<T>, grid, dim3(kGemmThreads), size_t(OnePassTile<T>::kSharedBytes), stream,
                     shape, x, v, u, int(rank), s, bias, y);
}

}  // namespace cmd_ext::cuda

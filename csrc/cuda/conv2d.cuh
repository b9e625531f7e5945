// Sparse convolution y = beta y + S * x + bias and its two gradients, on CUDA cores in fp32 (fp64 for double), all
// NCHW.
//
// Tiled kernels. A CTA stages blocks of channels of a pack of tiles (conv2d_tile.cuh) in shared memory, zeros for
// padding, and up to 8 warps x 8 rows of S (4 in double) walk their nonzeros through each block. 32 nonzeros at a time,
// a lane each, turn into entries (value, offset) in shared memory; then a nonzero costs a warp one broadcast of its
// entry (half of an LDS.128), and per cell of 4 floats, 8 halves or 2 doubles one LDS.128 and as many FFMA, for 256
// output pixels: 14.5 instructions in fp32, 22 in bf16 and half. No bounds checks, no index arithmetic, whatever the
// stride, dilation and padding. Uniform loads of (column, value) would cost two requests and a decoding by every lane;
// shuffles cost two requests.
//   conv: 8 sums a lane and row stay in registers over all channels.
//   gradient for x: the same kernel on S^T, each phase (pixel modulo stride) its own lattice of outputs, so nothing is
//     scattered. S^T must list a channel's nonzeros by output channel, while its pattern lists them by tap; a small
//     kernel merges the taps' lists by bisection and gathers the values (8 nnz bytes in and out).
//   gradient for the values: 8 pixels of dy a lane and row stay in registers, x is staged; the sums of 8 nonzeros are
//     reduced together by 9 shuffles and kept in a workspace [splits, nnz], one split of the packs per CTA.
// Direct kernels (a warp per row, bounds checks, straight from global memory) where a channel doesn't fit in shared
// memory or so few nonzeros read a channel that staging it would not pay.
//
// Roofline, H100, with beta = 1 (operations 2 nnz N OH OW; bytes x once, y twice, 8 nnz for each pack from L2):
//   ResNet-18 layer3, 5 %: .74 GFLOP 11 us at 67 TFLOP/s, 39 MB 13 us.   VGG conv4, 5 %: 5.9 GFLOP 88 us, 154 MB 51 us.
// Shared memory gives 32 floats a clock and multiprocessor, a quarter of what FFMA can use, so fp32 stays below 25 %;
// the wavefronts counted from the machine code (8.5 a nonzero and 256 places of a tile; 12.5 for staging 32 cells of a
// channel for 64 rows; 7/8 of the places are pixels of a 28 x 28 map, 3/4 of a 14 x 14 one) at 1.7 GHz predict 82 us
// and 577 us, 16 % and 15 % of the roofline (at 1 %: 25 us and 177 us). bf16 issues 22 / 4 clocks a nonzero instead
// of 8.5 wavefronts: 53 us and 426 us. A dense convolution at the fp32 peak takes 221 us and 1767 us. A gather from L2
// (4 bytes a nonzero and pixel at 5.5 TB/s) would take 270 us and 2.1 ms, which is why x is staged; a gather of 16-byte
// vectors cannot follow taps that shift by one pixel, which is why images, not pixels, lie side by side in a cell.
//
// roofline sparse_conv2d layer3 fp32 d=0.05 beta=1: 38.8 MB, 0.74 GFLOP, 12.9 us, 0.16
// roofline sparse_conv2d conv4 fp32 d=0.05 beta=1: 155 MB, 5.92 GFLOP, 88.3 us, 0.15
// roofline sparse_conv2d layer3 bf16 d=0.05 beta=1: 19.4 MB, 0.74 GFLOP, 11 us, 0.21
// roofline sparse_conv2d conv4 bf16 d=0.05 beta=1: 77.8 MB, 5.92 GFLOP, 88.3 us, 0.21
// roofline sparse_conv2d_grad_input layer3 fp32 d=0.05: 26.5 MB, 0.74 GFLOP, 11 us, 0.15
// roofline sparse_conv2d_grad_input conv4 fp32 d=0.05: 106 MB, 5.92 GFLOP, 88.3 us, 0.15
// roofline sparse_conv2d_grad_values layer3 fp32 d=0.05 splits=64: 41 MB, 0.74 GFLOP, 13.7 us, 0.13
// roofline sparse_conv2d_grad_values conv4 fp32 d=0.05 splits=66: 166 MB, 5.92 GFLOP, 88.3 us, 0.13
//
// Zeros of padding are multiplied, so an infinite value of S or of dy gives NaN there, as a dense product does.
#pragma once

#include "conv2d_tile.cuh"

namespace cmd_ext::cuda {
namespace conv {

constexpr int kDirectThreads = 128, kDirectWarps = kDirectThreads / 32;

// y = beta * y + S * x + bias ----------------------------------------------------------------------------------------

template <class T, int kRows>
__global__ void __launch_bounds__(32 * kMaxWarps, kRows == 1 ? 3 : 2)
    conv_tile_kernel(const T* __restrict__ source, Rows<T> s, const T* __restrict__ bias, int beta, T* __restrict__ out,
                     Plan p) {
  using A = gpu::Acc<T>;
  GPU_DYNAMIC_SHARED(memory);
  const Shared<T> shared(memory, p);
  unsigned block = blockIdx.x;
  const int row_block = block % p.row_blocks;
  block /= p.row_blocks;
  const int phase = block % p.phases();
  block /= p.phases();
  const int group = block % p.groups, pack = block / p.groups;
  place_taps(shared, p, phase);
  locate(shared, p, pack);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned char* cells[kCells<T>];
#pragma unroll
  for (int k = 0; k < kCells<T>; ++k) cells[k] = cell_of(shared, p, lane + 32 * k);
  const Entry<A>* entries = shared.entries + warp * 32;
  A sums[kRows][kCells<T> * kPack<T>] = {};
  const WarpRows rows = warp_rows<kRows>(p, group, row_block);
  const bool reads =
      shared.h->residue >= 0 && shared.w->residue >= 0;  // else no tap reads for this phase, and nothing is staged
  walk<kRows, true>(first_plane(source, shared, p, group), s, WarpRows{rows.first, reads ? rows.count : 0}, shared, p,
                    [&](int r, int count, int) {
#pragma unroll 2
                      for (int j = 0; j < count; ++j) {
                        const Entry<A> entry = entries[j];
#pragma unroll
                        for (int k = 0; k < kCells<T>; ++k) {
                          A x[kPack<T>];
                          widen(*reinterpret_cast<const Cell<T>*>(cells[k] + entry.offset), x);
#pragma unroll
                          for (int i = 0; i < kPack<T>; ++i) sums[r][k * kPack<T> + i] += entry.value * x[i];
                        }
                      }
                    });

  const int64_t plane = int64_t(p.h.out) * p.w.out;
#pragma unroll
  for (int k = 0; k < kCells<T>; ++k)
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      const int64_t at = output_of(shared, p, i, lane + 32 * k, rows.first);
      if (at < 0) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows.count) continue;
        T& y = out[at + r * plane];
        A sum = sums[r][k * kPack<T> + i];
        if (beta) sum += gpu::widen(y);
        if (bias) sum += gpu::widen(bias[rows.first + r]);
        y = gpu::narrow<T>(sum);
      }
    }
}

// direct: a warp per row of S, 4 positions a lane, straight from global memory.

template <class A>
struct alignas(16) DirectEntry {
  A value;
  int channel, h, w;  // the source channel; pixels from a position's own
};

constexpr int kDirectPixels = 4;

template <class T>
__global__ void __launch_bounds__(kDirectThreads, 4)
    conv_direct_kernel(const T* __restrict__ source, Rows<T> s, const T* __restrict__ bias, int beta,
                       T* __restrict__ out, Plan p) {
  using A = gpu::Acc<T>;
  __shared__ DirectEntry<A> all_entries[kDirectWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rows = p.groups * p.out_channels;
  const unsigned row_blocks = unsigned(gpu::ceil_div(rows, kDirectWarps));
  const int row = int(blockIdx.x % row_blocks) * kDirectWarps + warp;
  if (row >= rows) return;
  const unsigned block = blockIdx.x / row_blocks, phase = block % p.phases();
  const Phase h = phase_of(p.h, phase / p.w.phases), w = phase_of(p.w, phase % p.w.phases);
  const int64_t first = int64_t(block / p.phases()) * 32 * kDirectPixels + lane;

  DirectEntry<A>* entries = all_entries[warp];
  const int first_channel = row / p.out_channels * p.source_channels;
  const int64_t source_plane = int64_t(p.h.source) * p.w.source, plane = int64_t(p.h.out) * p.w.out;
  int64_t image[kDirectPixels];
  int y[kDirectPixels], x[kDirectPixels];
#pragma unroll
  for (int k = 0; k < kDirectPixels; ++k) {
    const int64_t line = (first + 32 * k) / w.positions;
    image[k] = line / h.positions;
    y[k] = int(line - image[k] * h.positions);
    x[k] = int(first + 32 * k - line * w.positions);
  }
  A sums[kDirectPixels] = {};
  const int end = s.row_ptr[int64_t(row + 1) * s.row_step];
  for (int begin = s.row_ptr[int64_t(row) * s.row_step]; begin < end; begin += 32) {
    const int col = begin + lane < end ? s.col_idx[begin + lane] : 0;
    const int channel = col / p.taps, tap = col - channel * p.taps, tap_h = tap / p.w.kernel;
    const Place at_h = place_of(p.h, h, tap_h), at_w = place_of(p.w, w, tap - tap_h * p.w.kernel);
    const bool reads = begin + lane < end && at_h.slot >= 0 && at_w.slot >= 0;
    const unsigned read = __ballot_sync(~0u, reads);
    if (reads)
      entries[__popc(read & ((1u << lane) - 1))] = {gpu::widen(s.values[begin + lane]), first_channel + channel,
                                                    source_pixel(p.h, h, at_h.slot, at_h.row),
                                                    source_pixel(p.w, w, at_w.slot, at_w.row)};
    __syncwarp();
    for (int j = 0; j < __popc(read); ++j) {
      const DirectEntry<A> entry = entries[j];
      const T* channel_source = source + entry.channel * source_plane;
#pragma unroll
      for (int k = 0; k < kDirectPixels; ++k) {
        const int row_at = y[k] * p.h.source_step + entry.h, col_at = x[k] * p.w.source_step + entry.w;
        if (image[k] < p.batch && unsigned(row_at) < unsigned(p.h.source) && unsigned(col_at) < unsigned(p.w.source))
          sums[k] += entry.value * gpu::widen(channel_source[image[k] * p.groups * p.source_channels * source_plane +
                                                             row_at * p.w.source + col_at]);
      }
    }
    __syncwarp();
  }
#pragma unroll
  for (int k = 0; k < kDirectPixels; ++k) {
    if (image[k] >= p.batch) continue;
    T& pixel = out[(image[k] * rows + row) * plane + int64_t(y[k] * p.h.out_step + h.out_first) * p.w.out +
                   x[k] * p.w.out_step + w.out_first];
    if (beta) sums[k] += gpu::widen(pixel);
    if (bias) sums[k] += gpu::widen(bias[row]);
    pixel = gpu::narrow<T>(sums[k]);
  }
}

template <class T>
cudaError_t convolve(const T* source, const Rows<T>& s, const T* bias, int beta, T* out, const Plan& p,
                     cudaStream_t stream) {
  if (!p.tiled) {
    const int64_t rows = gpu::ceil_div(int64_t(p.groups) * p.out_channels, kDirectWarps);
    const int64_t positions = gpu::ceil_div(int64_t(p.batch) * p.h.positions * p.w.positions, 32 * kDirectPixels);
    return gpu::launch(conv_direct_kernel<T>, dim3(unsigned(rows * p.phases() * positions)), dim3(kDirectThreads), 0,
                       stream, source, s, bias, beta, out, p);
  }
  const auto run = [&](auto kernel) {
    return gpu::launch(kernel, dim3(unsigned(p.blocks())), dim3(32 * p.warps), p.shared_bytes, stream, source, s, bias,
                       beta, out, p);
  };
  switch (p.warp_rows) {
    case 1:
      return run(conv_tile_kernel<T, 1>);
    case 2:
      return run(conv_tile_kernel<T, 2>);
    case 4:
      return run(conv_tile_kernel<T, 4>);
    default:
      return run(conv_tile_kernel<T, kMaxRows<T>>);
  }
}

// gradient for x -----------------------------------------------------------------------------------------------------

constexpr int kReorderThreads = 256;

// The rows of S^T with a row per channel of x and column (output channel of the group) * taps + tap, from the pattern
// with a row per (channel, tap). The place of a nonzero is the number of those before it in its channel, which is found
// by bisection in the channel's other taps: `lanes` (a power of two) per nonzero. A warp per (channel, tap).
template <class T>
__global__ void __launch_bounds__(kReorderThreads)
    channel_rows_kernel(const T* __restrict__ values, const int32_t* __restrict__ col_ptr,
                        const int32_t* __restrict__ row_idx, const int32_t* __restrict__ perm, int64_t columns,
                        int taps, int64_t group_columns, int group_rows, int lanes, int32_t* __restrict__ out_cols,
                        T* __restrict__ out_values) {
  const int lane = threadIdx.x % 32;
  const int64_t column = int64_t(blockIdx.x) * (kReorderThreads / 32) + threadIdx.x / 32;
  if (column >= columns) return;
  const int32_t* channel_ptr = col_ptr + column / taps * taps;
  const int tap = int(column % taps), first_row = int(column / group_columns) * group_rows;
  const int end = channel_ptr[tap + 1];
  for (int begin = channel_ptr[tap]; begin < end; begin += 32 / lanes) {
    const int at = begin + lane / lanes;
    const int row = at < end ? row_idx[at] : 0;
    int before = 0;
    if (at < end)
      for (int t = lane % lanes; t < taps; t += lanes) {
        int low = channel_ptr[t], high = channel_ptr[t + 1];
        const int start = low, bound = row + (t < tap);  // the first that isn't before (row, tap)
        while (low < high) {
          const int middle = low + (high - low) / 2;
          if (row_idx[middle] < bound)
            low = middle + 1;
          else
            high = middle;
        }
        before += low - start;
      }
    for (int offset = lanes / 2; offset > 0; offset /= 2) before += __shfl_xor_sync(~0u, before, offset);
    if (at < end && lane % lanes == 0) {
      const int to = channel_ptr[0] + before;
      out_cols[to] = (row - first_row) * taps + tap;
      out_values[to] = values[perm[at]];
    }
  }
}

// gradient for the values --------------------------------------------------------------------------------------------

constexpr int kGradMany = 8;    // nonzeros whose sums are reduced together
constexpr int kReduceRows = 8;  // warps that share the splits of a nonzero

// Sums 8 values over the warp with 9 shuffles: lane 4 * u returns the sum of values[u].
template <class A>
__device__ __forceinline__ A reduce_many(A (&values)[kGradMany]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = kGradMany / 2, offset = 16; half > 0; half /= 2, offset /= 2)
#pragma unroll
    for (int u = 0; u < half; ++u) {
      const bool upper = lane & offset;
      const A give = upper ? values[u] : values[u + half], keep = upper ? values[u + half] : values[u];
      values[u] = keep + __shfl_xor_sync(~0u, give, offset);
    }
  A sum = values[0];
  sum += __shfl_xor_sync(~0u, sum, 2);
  return sum + __shfl_xor_sync(~0u, sum, 1);
}

template <class T, int kRows>
__global__ void __launch_bounds__(32 * kMaxWarps, kRows == 1 ? 3 : 2)
    grad_values_tile_kernel(const T* __restrict__ dy, const T* __restrict__ x, Rows<T> s, int64_t nnz, int splits,
                            gpu::Acc<T>* __restrict__ partial, Plan p) {
  using A = gpu::Acc<T>;
  GPU_DYNAMIC_SHARED(memory);
  const Shared<T> shared(memory, p);
  const int row_block = blockIdx.x % p.row_blocks, group = blockIdx.x / p.row_blocks % p.groups;
  const int split = blockIdx.x / p.row_blocks / p.groups;
  const int first_pack = int(int64_t(p.packs) * split / splits),
            last_pack = int(int64_t(p.packs) * (split + 1) / splits);
  place_taps(shared, p, 0);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned char* cells[kCells<T>];
#pragma unroll
  for (int k = 0; k < kCells<T>; ++k) cells[k] = cell_of(shared, p, lane + 32 * k);
  const Entry<A>* entries = shared.entries + warp * 32;
  const WarpRows rows = warp_rows<kRows>(p, group, row_block);
  partial += split * nnz;

  for (int pack = first_pack; pack < last_pack; ++pack) {
    locate(shared, p, pack);  // what it overwrites was last read before a barrier of walk
    A grad[kRows][kCells<T> * kPack<T>];
#pragma unroll
    for (int k = 0; k < kCells<T>; ++k)
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        const int64_t at = output_of(shared, p, i, lane + 32 * k, rows.first);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          grad[r][k * kPack<T> + i] =
              at >= 0 && r < rows.count ? gpu::widen(dy[at + r * (int64_t(p.h.out) * p.w.out)]) : A(0);
      }
    walk<kRows, false>(first_plane(x, shared, p, group), s, rows, shared, p, [&](int r, int count, int first) {
#pragma unroll 1
      for (int j = 0; j < count; j += kGradMany) {
        A sums[kGradMany];
#pragma unroll
        for (int u = 0; u < kGradMany; ++u) {
          sums[u] = 0;
          if (j + u >= count) continue;
#pragma unroll
          for (int k = 0; k < kCells<T>; ++k) {
            A cell[kPack<T>];
            widen(*reinterpret_cast<const Cell<T>*>(cells[k] + entries[j + u].offset), cell);
#pragma unroll
            for (int i = 0; i < kPack<T>; ++i) sums[u] += grad[r][k * kPack<T> + i] * cell[i];
          }
        }
        const A sum = reduce_many(sums);
        if (lane % 4 != 0 || j + lane / 4 >= count) continue;
        A& to = partial[first + j + lane / 4];
        to = pack == first_pack ? sum : to + sum;
      }
    });
  }
}

template <class T>
__global__ void __launch_bounds__(kDirectThreads, 4)
    grad_values_direct_kernel(const T* __restrict__ dy, const T* __restrict__ x, Rows<T> s, int64_t nnz, int splits,
                              gpu::Acc<T>* __restrict__ partial, Plan p) {
  using A = gpu::Acc<T>;
  const int lane = threadIdx.x % 32, rows = p.groups * p.out_channels;
  const int row = blockIdx.x % rows, split = blockIdx.x / rows;
  const Phase phase_h = phase_of(p.h, 0), phase_w = phase_of(p.w, 0);
  const int64_t positions = int64_t(p.batch) * p.h.out * p.w.out;
  const int64_t first = positions * split / splits, last = positions * (split + 1) / splits;
  const int64_t first_channel = int64_t(row / p.out_channels) * p.source_channels;
  const int64_t source_plane = int64_t(p.h.source) * p.w.source, plane = int64_t(p.h.out) * p.w.out;
  const int end = s.row_ptr[row + 1];
  for (int begin = s.row_ptr[row] + threadIdx.x / 32 * kDirectPixels; begin < end;
       begin += kDirectWarps * kDirectPixels) {
    const T* channel[kDirectPixels];
    int shift_h[kDirectPixels], shift_w[kDirectPixels];
    A sums[kDirectPixels] = {};
#pragma unroll
    for (int u = 0; u < kDirectPixels; ++u) {
      const int col = s.col_idx[min(begin + u, end - 1)], c = col / p.taps, tap = col - c * p.taps;
      const Place at_h = place_of(p.h, phase_h, tap / p.w.kernel), at_w = place_of(p.w, phase_w, tap % p.w.kernel);
      channel[u] = x + (first_channel + c) * source_plane;
      shift_h[u] = source_pixel(p.h, phase_h, at_h.slot, at_h.row);
      shift_w[u] = source_pixel(p.w, phase_w, at_w.slot, at_w.row);
    }
    for (int64_t at = first + lane; at < last; at += 32) {
      const int64_t image = at / plane;
      const int pixel = int(at - image * plane), out_h = pixel / p.w.out, out_w = pixel - out_h * p.w.out;
      const A grad = gpu::widen(dy[(image * rows + row) * plane + pixel]);
#pragma unroll
      for (int u = 0; u < kDirectPixels; ++u) {
        const int in_h = out_h * p.h.source_step + shift_h[u], in_w = out_w * p.w.source_step + shift_w[u];
        if (unsigned(in_h) < unsigned(p.h.source) && unsigned(in_w) < unsigned(p.w.source))
          sums[u] +=
              grad *
              gpu::widen(channel[u][image * p.groups * p.source_channels * source_plane + in_h * p.w.source + in_w]);
      }
    }
#pragma unroll
    for (int u = 0; u < kDirectPixels; ++u) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sums[u] += __shfl_xor_sync(~0u, sums[u], offset);
      if (lane == 0 && begin + u < end) partial[split * nnz + begin + u] = sums[u];
    }
  }
}

// dvalues = the sum of partial [splits, nnz] over the splits, in a fixed order.
template <class T>
__global__ void __launch_bounds__(32 * kReduceRows)
    reduce_splits_kernel(const gpu::Acc<T>* __restrict__ partial, int64_t nnz, int splits, T* __restrict__ dvalues) {
  using A = gpu::Acc<T>;
  __shared__ A sums[kReduceRows][32];
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int64_t at = int64_t(blockIdx.x) * 32 + lane;
  A sum = 0;
  if (at < nnz)
#pragma unroll 4
    for (int split = part; split < splits; split += kReduceRows) sum += partial[split * nnz + at];
  sums[part][lane] = sum;
  __syncthreads();
  if (part != 0 || at >= nnz) return;
#pragma unroll
  for (int other = 1; other < kReduceRows; ++other) sum += sums[other][lane];
  dvalues[at] = gpu::narrow<T>(sum);
}

// Splits of the images and pixels that give each multiprocessor 4 CTAs of 64 rows.
inline int64_t most_splits(const ConvShape& s) {
  const int64_t row_blocks = s.groups * gpu::ceil_div(s.out_channels, s.groups * 64);
  return std::min(std::max<int64_t>(1, 4 * gpu::multiprocessors() / std::max<int64_t>(1, row_blocks)),
                  s.batch * s.out_h * s.out_w);
}

}  // namespace conv

template <class T>
cudaError_t sparse_conv2d(const T* x, const Csr<T>& s, const T* bias, int beta, T* y, const ConvShape& shape,
                          cudaStream_t stream) {
  const conv::Plan plan = conv::make_plan<T>(shape, false, s.nnz);
  return conv::convolve(x, conv::Rows<T>{s.values, s.row_ptr, s.col_idx, 1}, bias, beta, y, plan, stream);
}

template <class T>
int64_t sparse_conv2d_grad_input_workspace_bytes(int64_t nnz) {
  return gpu::ceil_div(nnz * int64_t(sizeof(T)), 16) * 16 + nnz * int64_t(sizeof(int32_t));
}

template <class T>
cudaError_t sparse_conv2d_grad_input(const T* dy, const Csr<T>& s, const int32_t* col_ptr, const int32_t* row_idx,
                                     const int32_t* perm, int beta, T* dx, const ConvShape& shape, void* workspace,
                                     cudaStream_t stream) {
  T* values = static_cast<T*>(workspace);
  int32_t* cols =
      reinterpret_cast<int32_t*>(static_cast<char*>(workspace) + gpu::ceil_div(s.nnz * int64_t(sizeof(T)), 16) * 16);
  const conv::Plan plan = conv::make_plan<T>(shape, true, s.nnz);
  if (s.nnz > 0) {
    int lanes = 1;
    while (lanes < 32 && lanes < plan.taps) lanes *= 2;
    const int64_t group_columns = int64_t(plan.out_channels) * plan.taps, columns = plan.groups * group_columns;
    const cudaError_t error =
        gpu::launch(conv::channel_rows_kernel<T>, dim3(unsigned(gpu::ceil_div(columns, conv::kReorderThreads / 32))),
                    dim3(conv::kReorderThreads), 0, stream, s.values, col_ptr, row_idx, perm, columns, plan.taps,
                    group_columns, plan.source_channels, lanes, cols, values);
    if (error != cudaSuccess) return error;
  }
  return conv::convolve<T>(dy, conv::Rows<T>{values, col_ptr, cols, plan.taps}, nullptr, beta, dx, plan, stream);
}

template <class T>
int64_t sparse_conv2d_grad_values_workspace_bytes(int64_t nnz, const ConvShape& shape) {
  return conv::most_splits(shape) * nnz * int64_t(sizeof(gpu::Acc<T>));
}

template <class T>
cudaError_t sparse_conv2d_grad_values(const T* dy, const T* x, const Csr<T>& pattern, T* dvalues,
                                      const ConvShape& shape, void* workspace, cudaStream_t stream) {
  if (pattern.nnz == 0) return cudaSuccess;
  const conv::Plan p = conv::make_plan<T>(shape, false, pattern.nnz);
  const conv::Rows<T> rows{nullptr, pattern.row_ptr, pattern.col_idx, 1};
  gpu::Acc<T>* partial = static_cast<gpu::Acc<T>*>(workspace);
  const int64_t most = conv::most_splits(shape);
  const int64_t positions = shape.batch * shape.out_h * shape.out_w;
  const int splits = int(std::min<int64_t>(most, p.tiled ? p.packs : gpu::ceil_div(positions, 1024)));
  const auto run = [&](auto kernel, int64_t blocks, int threads, int shared) {
    return gpu::launch(kernel, dim3(unsigned(blocks)), dim3(threads), shared, stream, dy, x, rows, pattern.nnz, splits,
                       partial, p);
  };
  const auto run_tiled = [&](auto kernel) {
    return run(kernel, int64_t(p.row_blocks) * p.groups * splits, 32 * p.warps, p.shared_bytes);
  };
  cudaError_t error;
  if (!p.tiled)
    error = run(conv::grad_values_direct_kernel<T>, shape.out_channels * splits, conv::kDirectThreads, 0);
  else if (p.warp_rows == 1)
    error = run_tiled(conv::grad_values_tile_kernel<T, 1>);
  else if (p.warp_rows == 2)
    error = run_tiled(conv::grad_values_tile_kernel<T, 2>);
  else if (p.warp_rows == 4)
    error = run_tiled(conv::grad_values_tile_kernel<T, 4>);
  else
    error = run_tiled(conv::grad_values_tile_kernel<T, conv::kMaxRows<T>>);
  if (error != cudaSuccess) return error;
  return gpu::launch(conv::reduce_splits_kernel<T>, dim3(unsigned(gpu::ceil_div(pattern.nnz, 32))),
                     dim3(32 * conv::kReduceRows), 0, stream, partial, pattern.nnz, splits, dvalues);
}

}  // namespace cmd_ext::cuda

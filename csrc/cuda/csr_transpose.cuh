// transpose_csr: the support of a CSR matrix by columns, stable, in four launches and without sorting.
//
// The rows of a group are cut into tiles of at least 32. A block counts the columns of its tile in shared memory, in
// chunks of 8192 columns, and writes them to a table [tile, column]; one thread per column sums its tiles, a block sums
// the columns, and together they turn the counts into places; then each tile hands out its places row by row, from
// shared memory again. The columns within a row are distinct, so a row needs no order among the threads of its block,
// and rows follow one another with a barrier between them, which makes the result stable. Atomics count only.
//
// Bytes: 8 read and 8 written a nonzero, and a table of n / 8 bytes a row passed four times. At 5 % density on H100
// (3.0 TB/s): 22 MB = 7 us for 4096 x 4096, 3 MB = 1 us for 512 x 4608 (VGG conv4), under 1 us for 256 x 2304
// (ResNet-18 layer3). Latency outlasts that: a strip of 16 rows waits for memory twice and passes 16 barriers, about
// 1 us, and a tile has two, so expect some 4 us a launch, 15 to 20 us in all, once per change of the support. A radix
// sort of (column, place) pairs would move 16 bytes a nonzero two or three times in as many launches, and a segment of
// rows per thread block keeps the scattered writes of a column next to each other.
//
// roofline transpose_csr layer3 fp32 d=0.05: 0.778 MB, 0 GFLOP, 0.259 us, 0.02
// roofline transpose_csr conv4 fp32 d=0.05: 3.09 MB, 0 GFLOP, 1.03 us, 0.05
// roofline transpose_csr linear4096 fp32 d=0.05: 21.9 MB, 0 GFLOP, 7.29 us, 0.35
#pragma once

#include "kernels.h"
#include "scan.cuh"

namespace cmd_ext::cuda {
namespace csr_transpose {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kScanThreads = 1024;
constexpr int kChunk = 8192, kStrip = 16;  // columns and rows that a block holds at once

struct Shape {                                    // groups * n fits in int32
  int n, groups, rows, tile_rows, tiles, chunks;  // rows and tiles a group

  Shape(int64_t m, int64_t n, int64_t groups)
      : n(int(n)),
        groups(int(groups)),
        rows(int(m / groups)),
        tile_rows(kStrip * int(max(gpu::ceil_div(rows, kStrip * 1024), int64_t(2)))),
        tiles(int(gpu::ceil_div(rows, tile_rows))),
        chunks(int(gpu::ceil_div(n, kChunk))) {}
  int64_t table_size() const { return int64_t(groups) * tiles * n; }
};

// What a block works on: a tile of rows, a chunk of columns.
struct Part {
  int first_row, end_row, first_col, cols;
  int64_t table, column;  // where the chunk begins in the table and among the columns of all groups

  __device__ explicit Part(const Shape& shape) {
    const int chunk = blockIdx.x % shape.chunks, tile = blockIdx.x / shape.chunks, group = tile / shape.tiles;
    first_row = group * shape.rows + tile % shape.tiles * shape.tile_rows;
    end_row = min(first_row + shape.tile_rows, (group + 1) * shape.rows);
    first_col = chunk * kChunk;
    cols = min(kChunk, shape.n - first_col);
    table = int64_t(tile) * shape.n + first_col;
    column = int64_t(group) * shape.n + first_col;
  }

  // ends[2 * i], ends[2 * i + 1] = the nonzeros of row + i in the chunk, for the kStrip rows from `row` on.
  __device__ void find(const int32_t* __restrict__ row_ptr, const int32_t* __restrict__ col_idx, int row, int n,
                       int* ends) const {
    if (threadIdx.x < 2 * kStrip) {
      row += threadIdx.x / 2;
      int begin = 0, end = 0;
      if (row < end_row) begin = row_ptr[row], end = row_ptr[row + 1];
      const int bound = threadIdx.x % 2 == 0 ? first_col : first_col + cols;
      if (bound == 0) end = begin;
      if (bound == n) begin = end;
      while (begin < end) {
        const int middle = begin + (end - begin) / 2;
        if (col_idx[middle] < bound)
          begin = middle + 1;
        else
          end = middle;
      }
      ends[threadIdx.x] = begin;
    }
    __syncthreads();
  }
};

// table[group, tile, column] = nonzeros.
__global__ void __launch_bounds__(kThreads)
    count_columns_kernel(const int32_t* __restrict__ row_ptr, const int32_t* __restrict__ col_idx, Shape shape,
                         int32_t* __restrict__ table) {
  __shared__ int32_t counts[kChunk];
  __shared__ int ends[2 * kStrip];
  const Part part(shape);
  for (int c = threadIdx.x; c < part.cols; c += kThreads) counts[c] = 0;
  for (int row = part.first_row; row < part.end_row; row += kStrip) {
    part.find(row_ptr, col_idx, row, shape.n, ends);
    for (int i = threadIdx.x / 32; i < kStrip; i += kWarps)
      for (int k = ends[2 * i] + threadIdx.x % 32; k < ends[2 * i + 1]; k += 32)
        atomicAdd(&counts[col_idx[k] - part.first_col], 1);
    __syncthreads();
  }
  for (int c = threadIdx.x; c < part.cols; c += kThreads) table[part.table + c] = counts[c];
}

// Sums of the table over the tiles before, and the count of each column in col_ptr[1 + ..]. A thread per column.
__global__ void __launch_bounds__(kThreads)
    scan_table_kernel(Shape shape, int32_t* __restrict__ table, int32_t* __restrict__ col_ptr) {
  constexpr int kAhead = 16;
  const uint32_t n = shape.n, column = blockIdx.x * kThreads + threadIdx.x;
  if (column >= shape.groups * n) return;
  table += int64_t(column / n) * shape.tiles * n + column % n;
  int32_t sum = 0;
  for (int tile = 0; tile < shape.tiles; tile += kAhead) {
    int32_t counts[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) counts[i] = tile + i < shape.tiles ? table[int64_t(tile + i) * shape.n] : 0;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (tile + i < shape.tiles) table[int64_t(tile + i) * shape.n] = sum;
      sum += counts[i];
    }
  }
  col_ptr[column + 1] = sum;
}

// col_ptr[1 ..] = sums up to each; one block.
__global__ void __launch_bounds__(kScanThreads) scan_columns_kernel(int64_t columns, int32_t* __restrict__ col_ptr) {
  __shared__ int32_t sums[kScanThreads / 32];
  int32_t before = 0;
  for (int64_t first = 0; first < columns; first += kScanThreads) {
    const int64_t column = first + threadIdx.x;
    const int32_t own = column < columns ? col_ptr[column + 1] : 0;
    int32_t total;
    const int32_t within = scan::block_exclusive_sum<kScanThreads>(own, sums, total);
    if (column < columns) col_ptr[column + 1] = before + within + own;
    before += total;
  }
  if (threadIdx.x == 0) col_ptr[0] = 0;
}

__global__ void __launch_bounds__(kThreads)
    scatter_transpose_kernel(const int32_t* __restrict__ row_ptr, const int32_t* __restrict__ col_idx, Shape shape,
                             const int32_t* __restrict__ table, const int32_t* __restrict__ col_ptr,
                             int32_t* __restrict__ row_idx, int32_t* __restrict__ perm) {
  __shared__ int32_t places[kChunk];
  __shared__ int ends[2 * kStrip];
  const Part part(shape);
  for (int c = threadIdx.x; c < part.cols; c += kThreads) places[c] = col_ptr[part.column + c] + table[part.table + c];
  for (int row = part.first_row; row < part.end_row; row += kStrip) {
    part.find(row_ptr, col_idx, row, shape.n, ends);
    int cols[kStrip];  // loaded ahead: otherwise every row would wait for memory
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      const int k = ends[2 * i] + threadIdx.x;
      cols[i] = k < ends[2 * i + 1] ? col_idx[k] : 0;
    }
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      int k = ends[2 * i] + threadIdx.x, col = cols[i];
      while (k < ends[2 * i + 1]) {
        const int place = places[col - part.first_col]++;
        row_idx[place] = row + i;
        perm[place] = k;
        k += kThreads;
        if (k < ends[2 * i + 1]) col = col_idx[k];
      }
      __syncthreads();
    }
  }
}

}  // namespace csr_transpose

int64_t transpose_csr_workspace_bytes(int64_t m, int64_t n, int64_t groups) {
  return csr_transpose::Shape(m, n, groups).table_size() * int64_t(sizeof(int32_t));
}

cudaError_t transpose_csr(const int32_t* row_ptr, const int32_t* col_idx, int64_t m, int64_t n, int64_t groups,
                          int32_t* col_ptr, int32_t* row_idx, int32_t* perm, void* workspace, cudaStream_t stream) {
  using namespace csr_transpose;
  const Shape shape(m, n, groups);
  const int64_t columns = groups * n;
  const dim3 parts(unsigned(groups * shape.tiles * shape.chunks)), threads(kThreads);
  int32_t* table = static_cast<int32_t*>(workspace);
  cudaError_t error = gpu::launch(count_columns_kernel, parts, threads, 0, stream, row_ptr, col_idx, shape, table);
  if (error == cudaSuccess)
    error = gpu::launch(scan_table_kernel, dim3(unsigned(gpu::ceil_div(columns, kThreads))), threads, 0, stream, shape,
                        table, col_ptr);
  if (error == cudaSuccess)
    error = gpu::launch(scan_columns_kernel, dim3(1), dim3(kScanThreads), 0, stream, columns, col_ptr);
  if (error == cudaSuccess)
    error = gpu::launch(scatter_transpose_kernel, parts, threads, 0, stream, row_ptr, col_idx, shape, table, col_ptr,
                        row_idx, perm);
  return error;
}

}  // namespace cmd_ext::cuda

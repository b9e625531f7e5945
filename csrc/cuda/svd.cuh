// The batched pieces of truncated_svd that are not matrix products; csrc/svd.cpp composes them with torch's bmm.
//
//   orthonormal basis of Y [m, l]:  Y <- normalize_columns(Y),  Y <- Y inverse(chol(Y^T Y)), twice (Cholesky QR)
//   SVD of the small factor X [s, s]:  H X = Sigma Z with orthonormal rows of H and Z (one-sided Jacobi)
//   fix_signs: the entry of each column of u largest in magnitude is positive
//
// normalize_columns: a block owns 8 columns (whole sectors of a row, four rows a warp) and reads them three times, from
//   the cache after the first. It scales by a power of two first, so that no square overflows, and adds noise at the
//   level of rounding, without which a rank-deficient Y would stay so: this is what makes the basis orthonormal for
//   every finite input, at a backward error of the size of one rounding.
//
// cholesky_inverse: a block a matrix of up to 128 rows, its packed lower triangle of doubles (66 KB) in shared memory.
//   Gauss-Jordan elimination leaves inverse(L) in place of the triangle in one pass of s steps (two barriers each,
//   s^3 / 3 multiply-adds), so that factor and inverse cost the same as either. Larger matrices are split by the
//   caller, whose bmm then does most of the work. A pivot at the level of rounding restarts with a shifted diagonal, on
//   the device: the next pass of QR removes what the shift has left.
//
// jacobi_rotate: a warp a pair of rows, disjoint pairs at a time in the rounds of a tournament. Up to 112 rows, one
//   block runs to convergence in shared memory. Beyond, a block takes two bands of up to 16 rows, all pairs across
//   them, and the bands meet in an outer tournament of a launch a round; once a sweep has changed nothing the remaining
//   launches return at once. A band is narrow because the shared memory of one SM is what limits a block, and there are
//   s / 32 of them. Rotations are x -= sin (y + tan(angle / 2) x): h stays orthonormal to 2e-6 over ten sweeps of 200
//   rows in fp32, where x = cos x - sin y reaches 4e-5. Norms are summed anew for every pair, not updated, so that
//   small singular values keep orthogonal vectors.
//
// H100, with l = rank + 8: everything here is bound by latency, and the launches of the fp32 path with four iterations
// (about 77) take 0.3 ms. A round of Jacobi with a pair a warp takes some 0.4 us (shuffles, square roots, a barrier):
// 60 rows, 8 sweeps: 0.2 ms; 418 rows, 12 sweeps of 27 launches of 16 rounds: 7 ms. A batch of layers of one shape
// takes hardly longer than one. Beside it stand, at l = 418 and A [4096, 4096], products of 214 us and QR passes whose
// 2.9 GFLOP of fp64 products take 45 us (1.5 ms where fp64 runs at 1/64 of fp32: sm_120).
//
// roofline normalize_columns layer3 fp32 l=34: 0.104 MB, 0 GFLOP, 0.0348 us, 0.01
// roofline normalize_columns conv4 fp32 l=59: 0.362 MB, 0 GFLOP, 0.121 us, 0.02
// roofline normalize_columns linear4096 fp32 l=418: 20.5 MB, 0 GFLOP, 6.85 us, 0.2
// roofline cholesky_inverse conv4 fp64 s=59: 0.0557 MB, 0.000137 GFLOP, 0.0186 us, 0.001
// roofline jacobi_svd layer3 fp32 s=34 r=26 sweeps=7: 0.0164 MB, 0.00294 GFLOP, 0.0438 us, 0.0005
// roofline jacobi_svd conv4 fp32 s=59 r=51 sweeps=8: 0.0521 MB, 0.0178 GFLOP, 0.265 us, 0.001
// roofline jacobi_svd linear4096 fp32 s=418 r=410 sweeps=12: 2.77 MB, 9.62 GFLOP, 144 us, 0.02
// roofline fix_signs conv4 fp32 r=51: 2.09 MB, 0 GFLOP, 0.696 us, 0.1
// roofline fix_signs linear4096 fp32 r=410: 26.9 MB, 0 GFLOP, 8.96 us, 0.5
#pragma once

#include <math.h>

#include "gpu.h"
#include "kernels.h"

namespace cmd_ext::cuda {

constexpr int kStrip = 8;  // columns of a block in the kernels that walk down columns
constexpr int kCholeskyThreads = 256;
constexpr int kBand = 16;       // rows of a band of jacobi_rotate
constexpr int kOneBlock = 112;  // rows up to which one block takes a matrix; what shared memory holds on every target
constexpr int kMaxSweeps = 30;

// Fixed pseudo-random numbers in [-1, 1).
__device__ __forceinline__ uint32_t mix_bits(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
__device__ __forceinline__ double noise_at(int row, int column) {
  return int32_t(mix_bits(mix_bits(uint32_t(row) + 1) + uint32_t(column))) * (1.0 / 2147483648.0);
}

// Multiplies by 2^-exponent in two steps, each of which is finite for every exponent of a double.
struct PowerOfTwo {
  double first = 1, second = 1;
  __device__ __forceinline__ explicit PowerOfTwo(double largest) {
    int exponent = 0;
    if (largest > 0) frexp(largest, &exponent);
    first = ldexp(1.0, -(exponent / 2));
    second = ldexp(1.0, -(exponent - exponent / 2));
  }
  __device__ __forceinline__ double operator()(double x) const { return x * first * second; }
};

// Sum or maximum over the threads of the block that share threadIdx.x % kStrip, in a fixed order; `shared` holds a
// double per thread of a strip and warp.
template <bool kSum>
__device__ __forceinline__ double reduce_strip(double x, double* shared) {
  const int warps = blockDim.x / 32, column = threadIdx.x % kStrip;
#pragma unroll
  for (int offset = kStrip; offset < 32; offset *= 2) {
    const double other = __shfl_xor_sync(~0u, x, offset);
    x = kSum ? x + other : (other > x ? other : x);
  }
  __syncthreads();
  if (threadIdx.x % 32 < kStrip) shared[threadIdx.x / 32 * kStrip + column] = x;
  __syncthreads();
  x = shared[column];
  for (int warp = 1; warp < warps; ++warp) {
    const double other = shared[warp * kStrip + column];
    x = kSum ? x + other : (other > x ? other : x);
  }
  return x;
}

template <class T>
__global__ void __launch_bounds__(1024, 1) normalize_columns_kernel(const T* __restrict__ y, int m, int l, int strips,
                                                                    double noise, double* __restrict__ out) {
  __shared__ double shared[32 * kStrip];
  const int column = blockIdx.x % strips * kStrip + threadIdx.x % kStrip;
  const int first = threadIdx.x / kStrip, step = blockDim.x / kStrip;
  const int rows = column < l ? m : 0;
  const int64_t base = int64_t(blockIdx.x / strips) * m * l + column;
  double largest = 0;
  for (int row = first; row < rows; row += step) {
    const double x = fabs(double(y[base + int64_t(row) * l]));
    if (x > largest) largest = x;
  }
  const PowerOfTwo down(reduce_strip<false>(largest, shared));
  double sum = 0;
  for (int row = first; row < rows; row += step) {
    const double x = down(y[base + int64_t(row) * l]);
    sum += x * x;
  }
  sum = reduce_strip<true>(sum, shared);
  const double scale = sum == 0 ? 0 : 1 / sqrt(sum);
  const double amount = (sum == 0 ? 1 : noise) * sqrt(3.0 / m);
  for (int row = first; row < rows; row += step) {
    const int64_t i = base + int64_t(row) * l;
    out[i] = down(y[i]) * scale + amount * noise_at(row, column);
  }
}

// Blocks of four rows a warp and pass, as tall as m asks for.
inline dim3 strip_block(int64_t m) {
  const int64_t warps = gpu::ceil_div(m, 8 * 32 / kStrip);
  return dim3(unsigned(32 * (warps < 1 ? 1 : warps > 32 ? 32 : warps)));
}

template <class T>
cudaError_t normalize_columns(const T* y, int64_t batch, int64_t m, int64_t l, double noise, double* out,
                              cudaStream_t stream) {
  if (m == 0) return cudaSuccess;
  const int64_t strips = gpu::ceil_div(l, kStrip);
  return gpu::launch(normalize_columns_kernel<T>, dim3(unsigned(batch * strips)), strip_block(m), 0, stream, y, int(m),
                     int(l), int(strips), noise, out);
}

// One elimination of the packed lower triangle a, of which v is a row of scratch. With stop_below it gives up at the
// first pivot that is not above `smallest` and returns false; else such a pivot becomes `smallest`.
__device__ __forceinline__ bool eliminate(double* a, double* v, int s, double smallest, bool stop_below) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int j = 0; j < s; ++j) {
    const int row_j = j * (j + 1) / 2;
    double pivot = a[row_j + j];
    if (!(pivot > smallest)) {
      if (stop_below) return false;
      pivot = smallest;
    }
    const double scale = 1 / sqrt(pivot);
    for (int k = threadIdx.x; k < s; k += blockDim.x)
      if (k != j) v[k] = scale * a[k < j ? row_j + k : k * (k + 1) / 2 + j];
    __syncthreads();
    for (int i = j + warp; i < s; i += blockDim.x / 32) {
      double* row = a + i * (i + 1) / 2;
      if (i == j) {
        for (int k = lane; k <= j; k += 32) row[k] = k == j ? scale : v[k];
        continue;
      }
      const double factor = v[i];
      for (int k = lane; k <= i; k += 32) row[k] = k == j ? -factor * scale : row[k] - factor * v[k];
    }
    __syncthreads();
  }
  return true;
}

__global__ void __launch_bounds__(kCholeskyThreads)
    cholesky_inverse_kernel(const double* __restrict__ gram, int s, double shift, double* __restrict__ r_inverse) {
  GPU_DYNAMIC_SHARED(bytes);
  double* v = reinterpret_cast<double*>(bytes);
  double* a = v + s;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  gram += int64_t(blockIdx.x) * s * s;
  r_inverse += int64_t(blockIdx.x) * s * s;
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (int i = warp; i < s; i += blockDim.x / 32)
      for (int k = lane; k <= i; k += 32)
        a[i * (i + 1) / 2 + k] = gram[i * s + k] + (attempt == 1 && i == k ? shift : 0);
    __syncthreads();
    if (eliminate(a, v, s, shift, attempt == 0)) break;
    __syncthreads();
  }
  for (int i = warp; i < s; i += blockDim.x / 32)
    for (int k = lane; k < s; k += 32) r_inverse[i * s + k] = k < i ? 0 : a[k * (k + 1) / 2 + i];
}

cudaError_t cholesky_inverse(const double* gram, int64_t batch, int64_t s, double shift, double* r_inverse,
                             cudaStream_t stream) {
  if (s == 0) return cudaSuccess;
  const size_t shared = size_t(s + s * (s + 1) / 2) * sizeof(double);
  const int64_t warps = gpu::ceil_div(s, 4), most = kCholeskyThreads / 32;
  const dim3 block(unsigned(32 * (warps < most ? warps : most)));
  return gpu::launch(cholesky_inverse_kernel, dim3(unsigned(batch)), block, shared, stream, gram, int(s), shift,
                     r_inverse);
}

template <class T>
__global__ void __launch_bounds__(1024, 1)
    jacobi_load(const double* __restrict__ x, int s, T* __restrict__ w, T* __restrict__ h, double* __restrict__ largest,
                int* __restrict__ rotated) {
  __shared__ double shared[32 * kStrip];
  const int64_t base = int64_t(blockIdx.x) * s * s;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  double most = 0;
  for (int i = warp; i < s; i += warps)
    for (int k = lane; k < s; k += 32) {
      const double entry = fabs(x[base + i * s + k]);
      if (entry > most) most = entry;
    }
#pragma unroll
  for (int offset = 1; offset < kStrip; offset *= 2) {
    const double other = __shfl_xor_sync(~0u, most, offset);
    if (other > most) most = other;
  }
  most = reduce_strip<false>(most, shared);
  const PowerOfTwo down(most);
  const double noise = (sizeof(T) == 4 ? 1.2e-7 : 2.2e-16) / 16;
  for (int i = warp; i < s; i += warps)
    for (int k = lane; k < s; k += 32) {
      w[base + i * s + k] = T(down(x[base + i * s + k]) + noise * noise_at(i, k));
      h[base + i * s + k] = T(i == k);
    }
  if (threadIdx.x == 0) largest[blockIdx.x] = most;
  for (int i = threadIdx.x; i < kMaxSweeps; i += blockDim.x) rotated[int64_t(blockIdx.x) * kMaxSweeps + i] = 0;
}

// The pair of players (an even number of them) that meet in a round, so that players - 1 rounds see every pair once.
__device__ __forceinline__ int2 opponents(int players, int round, int pair) {
  const int ring = players - 1;
  if (pair == 0) return make_int2(ring, round % ring);
  return make_int2((round + pair) % ring, (round + ring - pair) % ring);
}

// Sums of three values over the warp in nine shuffles instead of fifteen (a shuffle takes the SM a cycle): from the
// second step on, a quarter of the warp sums one value.
template <class T>
__device__ __forceinline__ void sum_over_warp(T& a, T& b, T& c) {
  const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
  const T first = (upper ? c : a) + __shfl_xor_sync(~0u, upper ? a : c, 16);
  const T second = b + __shfl_xor_sync(~0u, b, 16);
  T sum = (odd ? second : first) + __shfl_xor_sync(~0u, odd ? first : second, 8);
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  a = __shfl_sync(~0u, sum, 0);
  b = __shfl_sync(~0u, sum, 8);
  c = __shfl_sync(~0u, sum, 16);
}

// Makes the rows x and y orthogonal and turns the rows p and q alike; false if they were orthogonal to rounding.
template <class T>
__device__ __forceinline__ bool rotate_rows(T* x, T* y, T* p, T* q, int s) {
  const int lane = threadIdx.x % 32;
  T xx = 0, yy = 0, xy = 0;
  for (int k = lane; k < s; k += 32) {
    const T a = x[k], b = y[k];
    xx += a * a;
    yy += b * b;
    xy += a * b;
  }
  sum_over_warp(xx, yy, xy);
  const T tolerance = sizeof(T) == 4 ? T(4.8e-7) : T(8.9e-16);  // 4 eps
  if (!(fabs(xy) > tolerance * sqrt(xx) * sqrt(yy))) return false;
  const T zeta = (yy - xx) / (2 * xy);
  const T root = fabs(zeta) < T(1e9) ? sqrt(1 + zeta * zeta) : fabs(zeta);  // the square may be infinite
  const T tangent = copysign(T(1), zeta) / (fabs(zeta) + root);
  const T cosine = 1 / sqrt(1 + tangent * tangent);
  const T sine = cosine * tangent, half_tangent = sine / (1 + cosine);
  for (int k = lane; k < s; k += 32) {
    const T a = x[k], b = y[k], c = p[k], d = q[k];
    x[k] = a - sine * (b + half_tangent * a);
    y[k] = b + sine * (a - half_tangent * b);
    p[k] = c - sine * (d + half_tangent * c);
    q[k] = d + sine * (c - half_tangent * d);
  }
  return true;
}

// Up to `sweeps` times all pairs of the rows of two bands of `width` rows, or, where more than two bands meet and this
// is not the first round of a sweep, the pairs across the bands; with kStaged in shared memory.
template <class T, bool kStaged>
__global__ void __launch_bounds__(1024, 1)
    jacobi_rotate(T* w, T* h, int s, int width, int bands, int round, int sweep, int sweeps, int* rotated) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int matrix = blockIdx.x / (bands / 2);
  const int2 band = opponents(bands, round, blockIdx.x % (bands / 2));
  w += int64_t(matrix) * s * s;
  h += int64_t(matrix) * s * s;
  rotated += int64_t(matrix) * kMaxSweeps;
  if (sweep > 0 && rotated[sweep - 1] == 0) return;
  const auto row_of = [&](int local) { return local < width ? band.x * width + local : (band.y - 1) * width + local; };

  GPU_DYNAMIC_SHARED(bytes);
  T* staged = reinterpret_cast<T*>(bytes);
  if (kStaged) {
    for (int i = warp; i < 2 * width; i += warps)
      for (int k = lane; k < s && row_of(i) < s; k += 32) {
        staged[i * s + k] = w[row_of(i) * s + k];
        staged[(2 * width + i) * s + k] = h[row_of(i) * s + k];
      }
    __syncthreads();
  }
  bool changed = false;
  for (int inner = 0; inner < sweeps; ++inner) {
    bool any = false;
    const bool across = bands > 2 && round > 0;
    for (int step = 0; step < (across ? width : 2 * width - 1); ++step) {
      for (int pair = warp; pair < width; pair += warps) {
        const int2 local = across ? make_int2(pair, width + (pair + step) % width) : opponents(2 * width, step, pair);
        const int i = row_of(local.x), j = row_of(local.y);
        if (i >= s || j >= s) continue;
        if (kStaged)
          any |= rotate_rows(staged + local.x * s, staged + local.y * s, staged + (2 * width + local.x) * s,
                             staged + (2 * width + local.y) * s, s);
        else
          any |= rotate_rows(w + i * s, w + j * s, h + i * s, h + j * s, s);
      }
      __syncthreads();
    }
    if (!__syncthreads_or(any)) break;
    changed = true;
  }
  if (!changed) return;
  if (threadIdx.x == 0) atomicOr(rotated + sweep, 1);
  if (kStaged)
    for (int i = warp; i < 2 * width; i += warps)
      for (int k = lane; k < s && row_of(i) < s; k += 32) {
        w[row_of(i) * s + k] = staged[i * s + k];
        h[row_of(i) * s + k] = staged[(2 * width + i) * s + k];
      }
}

template <class T>
__global__ void __launch_bounds__(256)
    jacobi_norms(const T* __restrict__ w, int64_t rows, int s, T* __restrict__ norms) {
  const int64_t row = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  T sum = 0;
  for (int k = threadIdx.x % 32; k < s; k += 32) sum += w[row * s + k] * w[row * s + k];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0) norms[row] = sqrt(sum);
}

// A warp a row: its place in descending order (NaN first, equal ones as they come), and the row there if it is kept.
template <class T>
__global__ void __launch_bounds__(256)
    jacobi_write(const T* __restrict__ w, const T* __restrict__ h, const T* __restrict__ norms,
                 const double* __restrict__ largest, int64_t rows, int s, int rank, T* __restrict__ h_out,
                 T* __restrict__ sigma, T* __restrict__ z) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t matrix = row / s;
  const int i = int(row - matrix * s);
  const auto key = [](T norm) { return norm == norm ? norm : T(INFINITY); };
  const T norm = norms[row], own = key(norm);
  int place = 0;
  for (int k = lane; k < s; k += 32) {
    const T other = key(norms[matrix * s + k]);
    place += other > own || (other == own && k < i);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) place += __shfl_xor_sync(~0u, place, offset);
  if (place >= rank) return;
  const int64_t out = matrix * rank + place;
  const T scale = norm == 0 ? T(0) : 1 / norm;
  for (int k = lane; k < s; k += 32) {
    h_out[out * s + k] = h[row * s + k];
    z[out * s + k] = w[row * s + k] * scale;
  }
  if (lane > 0) return;
  const PowerOfTwo down(largest[matrix]);
  sigma[out] = largest[matrix] == 0 && norm == norm ? T(0) : T(norm / down.first / down.second);
}

// How a matrix of s rows is cut: two bands (one block) where all of it fits in shared memory, bands of up to kBand rows
// where less does, single rows in global memory where not even two do.
struct JacobiPlan {
  int width, bands;
  bool staged = true;

  JacobiPlan(int64_t s, int64_t row_bytes) {
    const int64_t fit = gpu::max_shared_bytes() / (2 * row_bytes), even = s + s % 2;
    staged = fit >= 2;
    const bool one_block = s <= kOneBlock && fit >= even;
    width = one_block ? int(even / 2) : staged ? int(fit / 2 < kBand ? fit / 2 : kBand) : 1;
    bands = int(2 * gpu::ceil_div(s, 2 * width));
  }
};

template <class T>
struct JacobiWorkspace {
  double* largest;  // [batch]
  T *w, *h;         // [batch, s, s]
  T* norms;         // [batch, s]
  int* rotated;     // [batch, kMaxSweeps]: whether a sweep changed anything
  int64_t bytes;

  JacobiWorkspace(void* base, int64_t batch, int64_t s) {
    largest = static_cast<double*>(base);
    w = reinterpret_cast<T*>(largest + batch);
    h = w + batch * s * s;
    norms = h + batch * s * s;
    rotated = reinterpret_cast<int*>(norms + batch * s);
    bytes = batch * int64_t(sizeof(double) + (2 * s * s + s) * sizeof(T) + kMaxSweeps * sizeof(int));
  }
};

template <class T>
int64_t jacobi_svd_workspace_bytes(int64_t batch, int64_t s) {
  return JacobiWorkspace<T>(nullptr, batch, s).bytes;
}

template <class T>
cudaError_t jacobi_svd(const double* x, int64_t batch, int64_t s, int64_t rank, T* h, T* sigma, T* z, void* workspace,
                       cudaStream_t stream) {
  if (batch == 0 || s == 0 || rank == 0) return cudaSuccess;
  const JacobiWorkspace<T> work(workspace, batch, s);
  const JacobiPlan plan(s, s * int64_t(sizeof(T)));
  const int64_t load_warps = gpu::ceil_div(s, 4);
  cudaError_t error =
      gpu::launch(jacobi_load<T>, dim3(unsigned(batch)), dim3(unsigned(32 * (load_warps < 32 ? load_warps : 32))), 0,
                  stream, x, int(s), work.w, work.h, work.largest, work.rotated);
  const bool one_block = plan.bands == 2;
  const dim3 grid(unsigned(batch * (plan.bands / 2))), block(unsigned(32 * (plan.width < 32 ? plan.width : 32)));
  const size_t shared = plan.staged ? size_t(4 * plan.width * s) * sizeof(T) : 0;
  for (int sweep = 0; sweep < (one_block ? 1 : kMaxSweeps); ++sweep)
    for (int round = 0; round < plan.bands - 1 && error == cudaSuccess; ++round)
      error = gpu::launch(plan.staged ? jacobi_rotate<T, true> : jacobi_rotate<T, false>, grid, block, shared, stream,
                          work.w, work.h, int(s), plan.width, plan.bands, round, sweep, one_block ? kMaxSweeps : 1,
                          work.rotated);
  if (error != cudaSuccess) return error;
  const int64_t rows = batch * s;
  const dim3 row_grid(unsigned(gpu::ceil_div(rows, 8)));
  error = gpu::launch(jacobi_norms<T>, row_grid, dim3(256), 0, stream, work.w, rows, int(s), work.norms);
  if (error != cudaSuccess) return error;
  return gpu::launch(jacobi_write<T>, row_grid, dim3(256), 0, stream, work.w, work.h, work.norms, work.largest, rows,
                     int(s), int(rank), h, sigma, z);
}

template <class T>
__global__ void __launch_bounds__(1024, 1)
    fix_signs_kernel(T* __restrict__ u, T* __restrict__ vh, int m, int r, int n, int strips) {
  __shared__ double shared[32 * kStrip];
  __shared__ int negative[kStrip];
  const int strip = blockIdx.x % strips * kStrip, column = strip + threadIdx.x % kStrip;
  const int first = threadIdx.x / kStrip, step = blockDim.x / kStrip;
  const int rows = column < r ? m : 0;
  const int64_t matrix = blockIdx.x / strips;
  u += matrix * m * r + column;
  vh += matrix * r * n;
  double largest = 0;
  int at = m;
  for (int row = first; row < rows; row += step) {
    const double x = fabs(double(u[int64_t(row) * r]));
    if (x > largest) largest = x, at = row;
  }
  const double most = reduce_strip<false>(largest, shared);
  at = -int(reduce_strip<false>(largest == most ? -at : -m, shared));
  const bool flip = at < rows && u[int64_t(at) * r] < 0;
  if (threadIdx.x < kStrip) negative[threadIdx.x] = flip;
  __syncthreads();
  for (int row = first; flip && row < rows; row += step) u[int64_t(row) * r] = -u[int64_t(row) * r];
  for (int j = 0; j < kStrip && strip + j < r; ++j)
    for (int k = threadIdx.x; negative[j] && k < n; k += blockDim.x) {
      T& entry = vh[int64_t(strip + j) * n + k];
      entry = -entry;
    }
}

template <class T>
cudaError_t fix_signs(T* u, T* vh, int64_t batch, int64_t m, int64_t r, int64_t n, cudaStream_t stream) {
  const int64_t strips = gpu::ceil_div(r, kStrip);
  return gpu::launch(fix_signs_kernel<T>, dim3(unsigned(batch * strips)), strip_block(m), 0, stream, u, vh, int(m),
                     int(r), int(n), int(strips));
}

}  // namespace cmd_ext::cuda

// sparse_linear: y += bias + x S^T;  sddmm: out = (a b^T) at the positions of S.
//
// sparse_linear geometry: a tile of up to 64 samples (8 vectors of float) is transposed once into xt [cols][tile], so
// that each nonzero costs one broadcast and one contiguous FMA per vector, with the accumulators of a row in
// registers. 16 rows are finished together and written back as one transposed block, i.e. whole cache lines of y.
// Per tile: reads cols*tile of x, 8 bytes per nonzero, 2*nnz*tile operations. A single sample needs no transpose and
// runs as a gather (issue-bound either way). sddmm runs one dot product of length k per nonzero, row by row, so the
// row of `a` stays in L1.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace cmd_ext::cpu {
namespace {

using simd::kLanes;
using simd::Vec;

constexpr int kRowBlock = 16;
constexpr int64_t kGrainOps = 1 << 15;

int64_t row_grain(int64_t rows, int64_t operations) {
  return std::max<int64_t>(kRowBlock, rows * kGrainOps / std::max<int64_t>(operations, 1));
}

template <class T>
void linear_one(const T* x, const Csr<T>& s, const T* bias, T* y, const ParallelFor& parallel_for) {
  parallel_for(s.rows, row_grain(s.rows, 2 * s.nnz()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T acc[4] = {};
      int64_t k = s.row_ptr[i];
      const int64_t last = s.row_ptr[i + 1];
      for (; k + 4 <= last; k += 4)
        for (int j = 0; j < 4; ++j) acc[j] += s.values[k + j] * x[s.col_idx[k + j]];
      for (; k < last; ++k) acc[0] += s.values[k] * x[s.col_idx[k]];
      y[i] += (acc[0] + acc[1]) + (acc[2] + acc[3]) + (bias ? bias[i] : T(0));
    }
  });
}

// xt [cols][kVecs * lanes] <- x [samples][cols] transposed, missing samples as zeros.
template <class T>
void pack_tile(const T* x, int64_t samples, int64_t cols, int64_t tile, T* xt, const ParallelFor& parallel_for) {
  parallel_for(cols, std::max<int64_t>(1, kGrainOps / tile), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += 16) {
      const int64_t last = std::min(end, first + 16);
      for (int64_t b = 0; b < tile; ++b)
        for (int64_t c = first; c < last; ++c) xt[c * tile + b] = b < samples ? x[b * cols + c] : T(0);
    }
  });
}

template <class T, int kVecs>
SIMD_INLINE void rows_of_tile(const T* xt, int64_t samples, const Csr<T>& s, const T* bias, T* y, int64_t begin,
                              int64_t end) {
  constexpr int kWidth = kLanes<T>, kTile = kVecs * kWidth;
  T block[kRowBlock * kTile];
  for (int64_t first = begin; first < end; first += kRowBlock) {
    const int64_t count = std::min<int64_t>(kRowBlock, end - first);
    for (int64_t i = 0; i < count; ++i) {
      Vec<T> acc[kVecs] = {};
      for (int64_t k = s.row_ptr[first + i]; k < s.row_ptr[first + i + 1]; ++k) {
        const T* column = xt + int64_t(s.col_idx[k]) * kTile;
        const T value = s.values[k];
        for (int j = 0; j < kVecs; ++j) acc[j] += value * simd::load(column + j * kWidth);
      }
      for (int j = 0; j < kVecs; ++j) simd::store(block + i * kTile + j * kWidth, acc[j]);
    }
    for (int64_t b = 0; b < samples; ++b) {
      T* row = y + b * s.rows + first;
      for (int64_t i = 0; i < count; ++i) row[i] += block[i * kTile + b] + (bias ? bias[first + i] : T(0));
    }
  }
}

template <class T, int kVecs>
void linear_tiled(const T* x, int64_t batch, const Csr<T>& s, const T* bias, T* y, const ParallelFor& parallel_for) {
  constexpr int64_t kTile = kVecs * kLanes<T>;
  std::vector<T> xt(s.cols * kTile);
  for (int64_t b = 0; b < batch; b += kTile) {
    const int64_t samples = std::min(kTile, batch - b);
    pack_tile(x + b * s.cols, samples, s.cols, kTile, xt.data(), parallel_for);
    parallel_for(s.rows, row_grain(s.rows, 2 * s.nnz() * kTile), [&](int64_t begin, int64_t end) {
      simd::run([&] SIMD_LAMBDA() { rows_of_tile<T, kVecs>(xt.data(), samples, s, bias, y + b * s.rows, begin, end); });
    });
  }
}

}  // namespace

template <class T>
void sparse_linear(const T* x, int64_t batch, const Csr<T>& s, const T* bias, T* y, const ParallelFor& parallel_for) {
  constexpr int kWidth = kLanes<T>;
  if (batch == 1) return linear_one(x, s, bias, y, parallel_for);
  if (batch <= kWidth) return linear_tiled<T, 1>(x, batch, s, bias, y, parallel_for);
  if (batch <= 2 * kWidth) return linear_tiled<T, 2>(x, batch, s, bias, y, parallel_for);
  if (batch <= 4 * kWidth) return linear_tiled<T, 4>(x, batch, s, bias, y, parallel_for);
  linear_tiled<T, 8>(x, batch, s, bias, y, parallel_for);
}

template <class T>
void sddmm(const T* a, const T* b, int64_t k, const Csr<T>& pattern, T* out, const ParallelFor& parallel_for) {
  parallel_for(pattern.rows, row_grain(pattern.rows, 2 * pattern.nnz() * k), [&](int64_t begin, int64_t end) {
    simd::run([&] SIMD_LAMBDA() {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t p = pattern.row_ptr[i]; p < pattern.row_ptr[i + 1]; ++p)
          out[p] = simd::dot(a + i * k, b + int64_t(pattern.col_idx[p]) * k, k);
    });
  });
}

template <class T>
void add_sparse(const Csr<T>& s, T* w, const ParallelFor& parallel_for) {
  parallel_for(s.rows, row_grain(s.rows, s.nnz()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t p = s.row_ptr[i]; p < s.row_ptr[i + 1]; ++p) w[i * s.cols + s.col_idx[p]] += s.values[p];
  });
}

#define INSTANTIATE(T)                                                                             \
  template void sparse_linear(const T*, int64_t, const Csr<T>&, const T*, T*, const ParallelFor&); \
  template void add_sparse(const Csr<T>&, T*, const ParallelFor&);                                 \
  template void sddmm(const T*, const T*, int64_t, const Csr<T>&, T*, const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace cmd_ext::cpu

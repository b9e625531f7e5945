// The torch-free CPU kernels: raw pointers in, raw pointers out, no allocation of outputs, no checks (csrc/check.h has
// done them). T is float or double; half types are widened by the entry points. All results are deterministic and do
// not depend on the number of threads.
#pragma once

#include <cstdint>
#include <functional>

namespace cmd_ext::cpu {

// Runs body(begin, end) over [0, count) on the caller's pool of `threads` threads, in pieces of at least `grain`.
using ForBody = std::function<void(int64_t begin, int64_t end)>;
struct ParallelFor : std::function<void(int64_t count, int64_t grain, const ForBody& body)> {
  int threads;
  template <class Run>
  ParallelFor(const Run& run, int threads = 2) : function(run), threads(threads) {}
};

// Compressed sparse rows. Columns ascend within a row.
template <class T>
struct Csr {
  int64_t rows, cols;
  const T* values;
  const int32_t *row_ptr, *col_idx;
  int64_t nnz() const { return row_ptr[rows]; }
};

// An [batch, channels, height, width] tensor with any strides (in elements).
template <class T>
struct Image {
  T* data;
  int64_t channels, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

struct ConvShape {
  int64_t batch, groups;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// values/row_ptr/col_idx <- the exactly `nnz` largest |a| of a [m, n]; ties to the lower linear index; NaN counts as
// larger than infinity.
template <class T>
void topk_csr(const T* a, int64_t m, int64_t n, int64_t nnz, T* values, int32_t* row_ptr, int32_t* col_idx,
              const ParallelFor& parallel_for);

// product <- w - product.
template <class T>
void subtract_from(const T* w, int64_t count, T* product, const ParallelFor& parallel_for);

// The support by columns: col_ptr [groups * n + 1], row_idx [nnz], perm [nnz]; column c of row group g is g * n + c,
// rows ascend within a column and perm[k] is the place of its k-th nonzero in the CSR.
void transpose_csr(const int32_t* row_ptr, const int32_t* col_idx, int64_t m, int64_t n, int64_t groups,
                   int32_t* col_ptr, int32_t* row_idx, int32_t* perm);

// y [batch, rows] += bias + x [batch, cols] S^T. bias may be null.
template <class T>
void sparse_linear(const T* x, int64_t batch, const Csr<T>& s, const T* bias, T* y, const ParallelFor& parallel_for);

// What sparse_linear works out from S alone, to be kept between calls: needs `memory` of the returned bytes, 64-byte
// aligned, and fills it unless it is null. A plan is for batches of up to kFewSamples or for larger ones.
constexpr int64_t kFewSamples = 32;
template <class T>
int64_t plan_linear(const Csr<T>& s, bool few, void* memory, const ParallelFor& parallel_for);

// The sizes that a plan is for.
struct PlannedLinear {
  int64_t element, rows, cols;
};
// False if the memory holds no plan.
bool read_linear_plan(const void* memory, int64_t bytes, PlannedLinear& sizes);

// sparse_linear with the S of a plan; false, and nothing done, if the plan is for other batches.
template <class T>
bool run_linear_plan(const void* memory, const T* x, int64_t batch, const T* bias, T* y,
                     const ParallelFor& parallel_for);

// w [rows, cols] += S.
template <class T>
void add_sparse(const Csr<T>& s, T* w, const ParallelFor& parallel_for);

// out [nnz] = sum_k a[row, k] b[col, k] at the positions of the pattern; a [m, k], b [n, k].
template <class T>
void sddmm(const T* a, const T* b, int64_t k, const Csr<T>& pattern, T* out, const ParallelFor& parallel_for);

// The kernel U V + S [m, n] of a convolution: u [m, rank], v [groups * rank, n], n = channels / groups * taps. For the
// gradient for x, `s` is S^T over [groups * n] rows (row g * n + c: column c of group g).
template <class T>
struct ConvWeights {
  Csr<T> s;
  const T *u, *v;
  int64_t rank;
};

// y = bias + (U V + S) * x; bias [m] may be null.
template <class T>
void lrs_conv2d(const Image<const T>& x, const ConvWeights<T>& w, const T* bias, const Image<T>& y,
                const ConvShape& shape, const ParallelFor& parallel_for);

// What lrs_conv2d works out from weights and sizes alone, to be kept between calls: needs `memory` of the returned
// bytes, 64-byte aligned, and fills it unless it is null. The data of x and y are not read.
template <class T>
int64_t plan_conv2d(const Image<const T>& x, const ConvWeights<T>& w, const Image<T>& y, const ConvShape& shape,
                    void* memory, const ParallelFor& parallel_for);

// The sizes that a plan is for.
struct PlannedConv {
  int64_t element, batch, channels, height, width, out_channels, out_height, out_width;
};
// False if the memory holds no plan.
bool read_plan(const void* memory, int64_t bytes, PlannedConv& sizes);

// y = bias + (U V + S) * x with the weights of a plan; with `relu`, max(y, 0).
template <class T>
void run_plan(const void* memory, const Image<const T>& x, const T* bias, bool relu, const Image<T>& y,
              const ParallelFor& parallel_for);

// dx = gradient of lrs_conv2d for x.
template <class T>
void lrs_conv2d_grad_input(const Image<const T>& dy, const ConvWeights<T>& w, const Image<T>& dx,
                           const ConvShape& shape, const ParallelFor& parallel_for);

// Gradients of lrs_conv2d for its weights (overwritten): du [m, rank], dv [groups * rank, n], dvalues [nnz]. The values
// of S are not read and may be null.
template <class T>
void lrs_conv2d_grad_weights(const Image<const T>& x, const Image<const T>& dy, const ConvWeights<T>& w, T* du, T* dv,
                             T* dvalues, const ConvShape& shape, const ParallelFor& parallel_for);

}  // namespace cmd_ext::cpu

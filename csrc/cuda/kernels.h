// The torch-free CUDA launchers: raw device pointers, sizes, a caller's workspace, a stream. None allocates,
// synchronises or reads device memory on the host, so all are safe inside a CUDA graph; none uses float atomics, so
// the same input gives the same bits. The entry points (csrc/*.cpp) have checked the arguments. T is float, double,
// __half or __nv_bfloat16 unless said; 16-bit types accumulate in float. Sizes of zero are allowed everywhere.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>

#include <cstdint>

namespace cmd_ext::cuda {

// S [rows, cols] in compressed sparse rows, columns ascending within a row.
template <class T>
struct Csr {
  int64_t rows, cols, nnz;
  const T* values;
  const int32_t *row_ptr, *col_idx;
};

struct ConvShape {
  int64_t batch, groups;
  int64_t in_channels, in_h, in_w;     // of the layer's input x
  int64_t out_channels, out_h, out_w;  // of its output y
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// threshold ----------------------------------------------------------------------------------------------------------

// Per matrix a [m, n] of the batch: the exactly nnz largest |a|; ties to the lower linear index; every NaN counts as
// larger than infinity. values [batch, nnz], row_ptr [batch, m + 1], col_idx [batch, nnz].
int64_t topk_workspace_bytes(int64_t batch, int64_t m, int64_t n);
template <class T>
cudaError_t topk_csr(const T* a, int64_t batch, int64_t m, int64_t n, int64_t nnz, T* values, int32_t* row_ptr,
                     int32_t* col_idx, void* workspace, cudaStream_t stream);

// The same of the residual w - u v, with u [batch, m, r] and v [batch, groups * r, n], multiplied per row group as in
// rebuild; the residual [batch, m, n] is an output. T is float or double.
template <class T>
cudaError_t residual_topk_csr(const T* w, const T* u, const T* v, int64_t batch, int64_t groups, int64_t m, int64_t n,
                              int64_t r, int64_t nnz, T* residual, T* values, int32_t* row_ptr, int32_t* col_idx,
                              void* workspace, cudaStream_t stream);

// The transposed pattern: col_ptr [groups * n + 1], row_idx [nnz], perm [nnz]; column c of row group g is g * n + c.
int64_t transpose_csr_workspace_bytes(int64_t m, int64_t n, int64_t groups);
cudaError_t transpose_csr(const int32_t* row_ptr, const int32_t* col_idx, int64_t m, int64_t n, int64_t groups,
                          int32_t* col_ptr, int32_t* row_idx, int32_t* perm, void* workspace, cudaStream_t stream);

// svd ----------------------------------------------------------------------------------------------------------------

// What csrc/svd.cpp composes of batched products and these. T is float or double. NaN and infinity give NaN.

// out [batch, m, l] = the columns of y scaled to unit length, plus `noise` times fixed pseudo-random columns of about
// unit length; a zero column becomes such a column.
template <class T>
cudaError_t normalize_columns(const T* y, int64_t batch, int64_t m, int64_t l, double noise, double* out,
                              cudaStream_t stream);

// r_inverse [batch, s, s], upper triangular: the inverse of R in gram = R^T R, or in gram + shift I = R^T R if a pivot
// is not above shift > 0; gram [batch, s, s] has about unit diagonal, s <= cholesky_max_size.
constexpr int64_t cholesky_max_size = 128;
cudaError_t cholesky_inverse(const double* gram, int64_t batch, int64_t s, double shift, double* r_inverse,
                             cudaStream_t stream);

// x [batch, s, s] = h^T diag(sigma) z with orthonormal rows of h and z; the `rank` largest of sigma [batch, rank], in
// descending order, with their rows h and z [batch, rank, s].
template <class T>
int64_t jacobi_svd_workspace_bytes(int64_t batch, int64_t s);
template <class T>
cudaError_t jacobi_svd(const double* x, int64_t batch, int64_t s, int64_t rank, T* h, T* sigma, T* z, void* workspace,
                       cudaStream_t stream);

// Negates column j of u [batch, m, r] and row j of vh [batch, r, n] where the entry of the column that is largest in
// magnitude (the first of equal ones) is negative.
template <class T>
cudaError_t fix_signs(T* u, T* vh, int64_t batch, int64_t m, int64_t r, int64_t n, cudaStream_t stream);

// linear -------------------------------------------------------------------------------------------------------------

// out [cols, pitch] = in [rows, cols]^T with zeros from column `rows` to pitch >= rows.
template <class T>
cudaError_t transpose(const T* in, int64_t rows, int64_t cols, T* out, int64_t pitch, cudaStream_t stream);

// y [tokens, rows] = beta * y + x S^T + bias, from xt [cols, pitch] = x^T; pitch is a multiple of 16 bytes, xt aligned
// to 16. beta is 0 (y is not read) or 1; bias may be null.
template <class T>
cudaError_t spmm(const T* xt, int64_t tokens, int64_t pitch, const Csr<T>& s, const T* bias, int beta, T* y,
                 cudaStream_t stream);

// The same from x [tokens, cols]; faster below spmm_few_tokens.
constexpr int64_t spmm_few_tokens = 64;
template <class T>
cudaError_t spmm_few(const T* x, int64_t tokens, const Csr<T>& s, const T* bias, int beta, T* y, cudaStream_t stream);

// out [nnz] = sum_k a[row, k] b[col, k] on the support of `pattern` (its values are not read); a [m, k], b [n, k].
// Sums of k beyond a chunk are split over blocks and added in a fixed order.
template <class T>
int64_t sddmm_workspace_bytes(int64_t rows, int64_t cols, int64_t nnz, int64_t k);
template <class T>
cudaError_t sddmm(const T* a, const T* b, int64_t k, const Csr<T>& pattern, T* out, void* workspace,
                  cudaStream_t stream);

// w [m, n] = u v + S per row group: u [m, r], v [groups * r, n].
template <class T>
cudaError_t rebuild(const T* u, const T* v, int64_t r, int64_t groups, const Csr<T>& s, T* w, cudaStream_t stream);

// w [m, n] += S, for a low-rank part that a GEMM has written. T is float or double.
template <class T>
cudaError_t add_sparse(const Csr<T>& s, T* w, cudaStream_t stream);

// conv2d -------------------------------------------------------------------------------------------------------------

// y [N, M, OH, OW] = beta * y + S * x (+ bias), x [N, C, H, W], both NCHW-contiguous. beta is 0 or 1; bias may be null.
template <class T>
cudaError_t sparse_conv2d(const T* x, const Csr<T>& s, const T* bias, int beta, T* y, const ConvShape& shape,
                          cudaStream_t stream);

// dx [N, C, H, W] = beta * dx + gradient of S * x for x. col_ptr, row_idx, perm: the transposed pattern of S, of which
// only nnz and values are read here. The workspace, aligned to 16 bytes, may be null only where nnz = 0.
template <class T>
int64_t sparse_conv2d_grad_input_workspace_bytes(int64_t nnz);
template <class T>
cudaError_t sparse_conv2d_grad_input(const T* dy, const Csr<T>& s, const int32_t* col_ptr, const int32_t* row_idx,
                                     const int32_t* perm, int beta, T* dx, const ConvShape& shape, void* workspace,
                                     cudaStream_t stream);

// dvalues [nnz] = gradient of S * x for the values of S. Splits over images and pixels are added in a fixed order.
template <class T>
int64_t sparse_conv2d_grad_values_workspace_bytes(int64_t nnz, const ConvShape& shape);
template <class T>
cudaError_t sparse_conv2d_grad_values(const T* dy, const T* x, const Csr<T>& pattern, T* dvalues,
                                      const ConvShape& shape, void* workspace, cudaStream_t stream);

// gemm: tensor cores (T is __half, __nv_bfloat16, or float computed as tf32) ------------------------------------------

// Pixels of the output and of the image that taps reach into. `transposed` is the geometry of the gradient for x: the
// output is then x's grid, the image dy's. in_h, in_w < 32768.
struct GemmShape {
  int64_t batch;
  int groups, outs;  // outs: output channels per group
  int out_h, out_w, in_h, in_w;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool transposed;
  bool vector_store = false;  // set by the launcher
  int splits = 1;             // of K, see gemm_splits; more than 1 needs partial sums
};

// One operand: NHWC image of `pitch` channels in all, `channels` per group; channels and pitch are multiples of 16
// bytes, image aligned to 16. With taps, K runs over the kernel's taps, else the image has the output's pixels.
template <class T>
struct GemmOperand {
  const T* image;
  int64_t pitch;
  int channels;
  bool taps;
};

// S [groups * group_rows, channels * taps] as the transposed pattern and unpermuted values; null values: no S.
template <class T>
struct GemmSparse {
  const T* values;
  const int32_t *col_ptr, *row_idx, *perm;
  int group_rows, channels;
};

// y [pixels, groups * outs] = bias + sparse_operand . S + dense_operand . weights^T, weights [groups * outs, taps *
// channels] with K in the order (tap, channel); null weights: no dense product. partial: splits * y fp32, or null for
// one split.
template <class T>
cudaError_t gemm(GemmShape shape, const GemmOperand<T>& sparse_operand, const GemmSparse<T>& s,
                 const GemmOperand<T>& dense_operand, const T* weights, const T* bias, T* y, float* partial,
                 cudaStream_t stream);
template <class T>
int64_t gemm_splits(const GemmShape& shape, int64_t sparse_channels, int64_t dense_channels);

// y = bias + x . S + (x . v^T) u^T in one launch, v [groups * rank, taps * channels], u [groups * outs, rank]; rank is
// a multiple of 16 bytes and at most gemm_onepass_rank. Not for the transposed geometry.
constexpr int64_t gemm_onepass_rank = 64;
template <class T>
cudaError_t gemm_onepass(GemmShape shape, const GemmOperand<T>& x, const T* v, const T* u, int64_t rank,
                         const GemmSparse<T>& s, const T* bias, T* y, cudaStream_t stream);

}  // namespace cmd_ext::cuda

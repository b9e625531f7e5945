// The entry points behind the schemas of ops.cpp: checks, dtype switch, allocation, launch. One .cpp per op family.
#pragma once

#include "check.h"

namespace cmd_ext {

// svd.cpp
std::tuple<Tensor, Tensor, Tensor> truncated_svd(const Tensor& a, const Tensor& basis, int64_t rank, int64_t n_iter);

// threshold.cpp
std::tuple<Tensor, Tensor, Tensor> topk_csr(const Tensor& a, int64_t nnz);
std::tuple<Tensor, Tensor, Tensor, Tensor> residual_topk_csr(const Tensor& w, const Tensor& u, const Tensor& v,
                                                             int64_t nnz);
std::tuple<Tensor, Tensor, Tensor> csr_transpose(const Tensor& row_ptr, const Tensor& col_idx, int64_t n,
                                                 int64_t groups);

// linear.cpp
Tensor lrs_linear(const Tensor& x, const Tensor& u, const Tensor& v, const Tensor& values, const Tensor& row_ptr,
                  const Tensor& col_idx, const Tensor& col_ptr, const Tensor& row_idx, const Tensor& perm,
                  const std::optional<Tensor>& bias);
Tensor plan_lrs_linear(const Tensor& values, const Tensor& row_ptr, const Tensor& col_idx, int64_t n, bool few);
Tensor planned_lrs_linear(const Tensor& x, const Tensor& u, const Tensor& v, const Tensor& plan,
                          const std::optional<Tensor>& bias);
Tensor dense_weight(const Tensor& u, const Tensor& v, const Tensor& values, const Tensor& row_ptr,
                    const Tensor& col_idx, int64_t groups);
Tensor sddmm(const Tensor& a, const Tensor& b, const Tensor& row_ptr, const Tensor& col_idx);

// conv2d.cpp
Tensor lrs_conv2d(const Tensor& x, const Tensor& u, const Tensor& v, const Tensor& values, const Tensor& row_ptr,
                  const Tensor& col_idx, const Tensor& col_ptr, const Tensor& row_idx, const Tensor& perm,
                  const std::optional<Tensor>& bias, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation,
                  int64_t groups);
Tensor plan_lrs_conv2d(const Tensor& u, const Tensor& v, const Tensor& values, const Tensor& row_ptr,
                       const Tensor& col_idx, Sizes x_size, bool channels_last, Sizes kernel_size, Sizes stride,
                       Sizes padding, Sizes dilation, int64_t groups);
Tensor planned_lrs_conv2d(const Tensor& x, const Tensor& plan, const std::optional<Tensor>& bias, bool relu);
Tensor lrs_conv2d_grad_input(const Tensor& grad, const Tensor& u, const Tensor& v, const Tensor& values,
                             const Tensor& row_ptr, const Tensor& col_idx, const Tensor& col_ptr, const Tensor& row_idx,
                             const Tensor& perm, Sizes input_size, Sizes kernel_size, Sizes stride, Sizes padding,
                             Sizes dilation, int64_t groups);
Tensor lrs_conv2d_grad_values(const Tensor& grad, const Tensor& x, const Tensor& row_ptr, const Tensor& col_idx,
                              Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation, int64_t groups);
std::tuple<Tensor, Tensor, Tensor> lrs_conv2d_grad_weights(const Tensor& grad, const Tensor& x, const Tensor& u,
                                                           const Tensor& v, const Tensor& row_ptr,
                                                           const Tensor& col_idx, Sizes kernel_size, Sizes stride,
                                                           Sizes padding, Sizes dilation, int64_t groups);

}  // namespace cmd_ext

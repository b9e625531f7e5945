// Entry points of lrs_linear and sddmm. The low-rank branch runs on torch's GEMM, the sparse branch on our kernel,
// which adds into the same output.
#include "ops.h"

namespace cmd_ext {

Tensor lrs_linear(const Tensor& x, const Tensor& u, const Tensor& v, const Tensor& values, const Tensor& row_ptr,
                  const Tensor& col_idx, const Tensor& col_ptr, const Tensor& row_idx, const Tensor& perm,
                  const std::optional<Tensor>& bias) {
  const char* op = "lrs_linear";
  check_float(op, "x", x);
  check(x.dim() >= 1, op, ": x must be [..., n], got a scalar");
  for (auto [name, t] : {std::pair{"u", &u}, {"v", &v}, {"values", &values}}) check_same_dtype(op, name, *t, x);
  check_dim(op, "u", u, 2, "[m, r]");
  check_dim(op, "v", v, 2, "[r, n]");
  check_dim(op, "values", values, 1, "[nnz]");
  const int64_t m = u.size(0), r = u.size(1), n = v.size(1), nnz = values.numel();
  check(v.size(0) == r, op, ": u must be [m, r] with r = v.size(0) = ", v.size(0), ", got ", sizes_of(u));
  check(x.size(-1) == n, op, ": x must be [..., n] with n = v.size(1) = ", n, ", got ", sizes_of(x));
  if (bias) {
    check_same_dtype(op, "bias", *bias, x);
    check_sizes(op, "bias", *bias, {m}, "[m]");
  }
  const Pattern pattern(op, "row_ptr", "col_idx", row_ptr, col_idx, m, n, nnz);

  const ScalarType type = compute_type(x);
  Sizes out_sizes = sizes_of(x);
  out_sizes.back() = m;
  int64_t batch = 1;
  for (size_t i = 0; i + 1 < out_sizes.size(); ++i) batch *= out_sizes[i];
  const Tensor rows = torch::stable::reshape(dense_as(x, type), {batch, n});
  Tensor y = r > 0
                 ? torch::stable::matmul(torch::stable::matmul(rows, torch::stable::transpose(as_type(v, type), 0, 1)),
                                         torch::stable::transpose(as_type(u, type), 0, 1))
                 : torch::stable::new_zeros(rows, {batch, m});
  const Tensor dense_values = dense_as(values, type);
  const std::optional<Tensor> dense_bias = bias ? std::optional(dense_as(*bias, type)) : std::nullopt;
  if (batch > 0 && (nnz > 0 || bias))
    dispatch(type, [&](auto tag) {
      using T = decltype(tag);
      cpu::sparse_linear(rows.const_data_ptr<T>(), batch, pattern.with<T>(dense_values),
                         dense_bias ? dense_bias->const_data_ptr<T>() : nullptr, y.mutable_data_ptr<T>(), parallel_for);
    });
  return torch::stable::reshape(as_type(y, x.scalar_type()), out_sizes);
}

Tensor sddmm(const Tensor& a, const Tensor& b, const Tensor& row_ptr, const Tensor& col_idx) {
  const char* op = "sddmm";
  check_float(op, "a", a);
  check_same_dtype(op, "b", b, a);
  check_dim(op, "a", a, 2, "[m, k]");
  check_dim(op, "b", b, 2, "[n, k]");
  const int64_t k = a.size(1);
  check(b.size(1) == k, op, ": b must be [n, k] with k = a.size(1) = ", k, ", got ", sizes_of(b));
  const Pattern pattern(op, "row_ptr", "col_idx", row_ptr, col_idx, a.size(0), b.size(0), col_idx.numel());

  const ScalarType type = compute_type(a);
  const Tensor left = dense_as(a, type), right = dense_as(b, type);
  Tensor out = torch::stable::new_empty(left, {col_idx.numel()});
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    cpu::sddmm(left.const_data_ptr<T>(), right.const_data_ptr<T>(), k, pattern.with<T>(out), out.mutable_data_ptr<T>(),
               parallel_for);
  });
  return as_type(out, a.scalar_type());
}

}  // namespace cmd_ext

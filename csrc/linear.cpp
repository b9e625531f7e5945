// Entry points of lrs_linear, dense_weight and sddmm. The low-rank branch runs on torch's GEMM, the sparse branch on
// our kernel, which adds into the same output.
#include "gemm.h"
#include "ops.h"

namespace cmd_ext {
namespace {

// Up to this rank one kernel rebuilds W faster than a GEMM and a second pass over W would.
[[maybe_unused]] constexpr int64_t kRebuildRank = 64;

// x [batch, n] V^T U^T, or zeros for rank 0.
Tensor low_rank_product(const Tensor& x, const Tensor& u, const Tensor& v) {
  if (u.size(1) == 0) return torch::stable::new_zeros(x, {x.size(0), u.size(0)});
  const Tensor z = torch::stable::matmul(x, torch::stable::transpose(v, 0, 1));
  return torch::stable::matmul(z, torch::stable::transpose(u, 0, 1));
}

#ifdef CMD_EXT_GPU
// The tensor cores compute S densely: they pay where a dense layer waits for its weights (some tokens, not many). With
// fewer tokens the kernel that only reads S is as fast, with more the dense operations cost too much.
bool wants_tensor_cores(const Tensor& rows, int64_t nnz) {
  const std::string path = forced_path();
  const Tensor image = torch::stable::reshape(rows, {rows.size(0), rows.size(1), 1, 1});
  if (path == "csr" || !fits_tensor_cores(image, rows.size(1))) return false;
  return path == "mma" || (nnz > 0 && rows.size(0) > 16 && rows.size(0) <= 256);
}

// y += x S^T + bias on the device; x [batch, n], y [batch, m], all of one dtype.
void add_sparse_product(const Tensor& x, const Pattern& pattern, const Tensor& values,
                        const std::optional<Tensor>& bias, Tensor& y) {
  const Gpu gpu(x);
  const int64_t batch = x.size(0), n = x.size(1);
  dispatch_gpu(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto s = pattern.on_device<T>(values);
    const T* b = bias ? data<T>(*bias) : nullptr;
    if (batch < cuda::spmm_few_tokens)
      return check_cuda("lrs_linear", cuda::spmm_few(data<T>(x), batch, s, b, 1, mutable_data<T>(y), gpu.stream()));
    const int64_t vec = 16 / int64_t(sizeof(T)), pitch = (batch + vec - 1) / vec * vec;
    Tensor xt = torch::stable::new_empty(x, {n, pitch});
    check_cuda("lrs_linear", cuda::transpose(data<T>(x), batch, n, mutable_data<T>(xt), pitch, gpu.stream()));
    check_cuda("lrs_linear", cuda::spmm(data<T>(xt), batch, pitch, s, b, 1, mutable_data<T>(y), gpu.stream()));
  });
}
#endif

}  // namespace

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
  const Pattern pattern(op, "row_ptr", "col_idx", row_ptr, col_idx, m, n, nnz, x);

  const ScalarType type = on_gpu(x) ? x.scalar_type() : compute_type(x);
  Sizes out_sizes = sizes_of(x);
  out_sizes.back() = m;
  int64_t batch = 1;
  for (size_t i = 0; i + 1 < out_sizes.size(); ++i) batch *= out_sizes[i];
  const Tensor rows = torch::stable::reshape(dense_as(x, type), {batch, n});
#ifdef CMD_EXT_GPU
  if (on_gpu(x) && batch > 0 && m > 0 && wants_tensor_cores(rows, nnz)) {
    check_sizes(op, "perm", perm, {nnz}, "[nnz]");
    const Pattern transposed(op, "col_ptr", "row_idx", col_ptr, row_idx, n, m, nnz, x);
    const Tensor order = torch::stable::contiguous(perm), image = torch::stable::reshape(rows, {batch, n, 1, 1});
    const std::optional<Tensor> b = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
    const cuda::GemmShape shape{batch, 1, int(m), 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, false};
    const Tensor y = gemm_layer(shape, image, {u, v, values, transposed.row_ptr, transposed.col_idx, order, 1}, b);
    return torch::stable::reshape(y, out_sizes);
  }
#endif
  Tensor y = low_rank_product(rows, as_type(u, type), as_type(v, type));
  const Tensor dense_values = dense_as(values, type);
  const std::optional<Tensor> dense_bias = bias ? std::optional(dense_as(*bias, type)) : std::nullopt;
  const bool adds = batch > 0 && m > 0 && (nnz > 0 || bias);
#ifdef CMD_EXT_GPU
  if (adds && on_gpu(x)) add_sparse_product(rows, pattern, dense_values, dense_bias, y);
#endif
  if (adds && !on_gpu(x))
    dispatch(type, [&](auto tag) {
      using T = decltype(tag);
      cpu::sparse_linear(rows.const_data_ptr<T>(), batch, pattern.with<T>(dense_values),
                         dense_bias ? dense_bias->const_data_ptr<T>() : nullptr, y.mutable_data_ptr<T>(), threads());
    });
  return torch::stable::reshape(as_type(y, x.scalar_type()), out_sizes);
}

Tensor plan_lrs_linear(const Tensor& values, const Tensor& row_ptr, const Tensor& col_idx, int64_t n, bool few) {
  const char* op = "_plan_lrs_linear";
  check_float(op, "values", values);
  check(values.is_cpu(), op, ": values must be on the cpu");
  check_dim(op, "values", values, 1, "[nnz]");
  check_dim(op, "row_ptr", row_ptr, 1, "[m + 1]");
  check(n >= 0 && row_ptr.numel() >= 1, op, ": row_ptr must be [m + 1] and n >= 0, got ", sizes_of(row_ptr), " and ",
        n);
  const Pattern pattern(op, "row_ptr", "col_idx", row_ptr, col_idx, row_ptr.numel() - 1, n, values.numel(), values);
  const ScalarType type = compute_type(values);
  const Tensor dense_values = dense_as(values, type);
  Tensor plan;
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    const auto s = pattern.with<T>(dense_values);
    plan = torch::stable::empty({cpu::plan_linear(s, few, nullptr, threads())}, ScalarType::Byte, std::nullopt,
                                values.device());
    cpu::plan_linear(s, few, plan.mutable_data_ptr(), threads());
  });
  return plan;
}

Tensor planned_lrs_linear(const Tensor& x, const Tensor& u, const Tensor& v, const Tensor& plan,
                          const std::optional<Tensor>& bias) {
  const char* op = "_planned_lrs_linear";
  check_float(op, "x", x);
  cpu::PlannedLinear sizes{};
  check(plan.is_cpu() && plan.is_contiguous() && plan.scalar_type() == ScalarType::Byte &&
            cpu::read_linear_plan(plan.const_data_ptr(), plan.numel(), sizes),
        op, ": plan must be what _plan_lrs_linear returns");
  const int64_t m = sizes.rows, n = sizes.cols;
  check_same_dtype(op, "u", u, x);
  check_same_dtype(op, "v", v, x);
  check_dim(op, "u", u, 2, "[m, r]");
  check_sizes(op, "u", u, {m, u.size(1)}, "[m, r]");
  check_sizes(op, "v", v, {u.size(1), n}, "[r, n]");
  check(x.dim() >= 1 && x.size(-1) == n, op, ": x must be [..., n] with n = ", n, ", got ", sizes_of(x));
  if (bias) {
    check_same_dtype(op, "bias", *bias, x);
    check_sizes(op, "bias", *bias, {m}, "[m]");
  }
  const ScalarType type = compute_type(x);
  check(sizes.element == (type == ScalarType::Double ? 8 : 4), op, ": x must have the plan's precision");
  Sizes out_sizes = sizes_of(x);
  out_sizes.back() = m;
  int64_t batch = 1;
  for (size_t i = 0; i + 1 < out_sizes.size(); ++i) batch *= out_sizes[i];
  const Tensor rows = torch::stable::reshape(dense_as(x, type), {batch, n});
  Tensor y = low_rank_product(rows, as_type(u, type), as_type(v, type));
  const std::optional<Tensor> wide_bias = bias ? std::optional(dense_as(*bias, type)) : std::nullopt;
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    check(
        cpu::run_linear_plan(plan.const_data_ptr(), rows.const_data_ptr<T>(), batch,
                             wide_bias ? wide_bias->const_data_ptr<T>() : nullptr, y.mutable_data_ptr<T>(), threads()),
        op, ": the plan is for ", batch <= cpu::kFewSamples ? "larger batches" : "smaller batches", ", got ", batch);
  });
  return torch::stable::reshape(as_type(y, x.scalar_type()), out_sizes);
}

Tensor dense_weight(const Tensor& u, const Tensor& v, const Tensor& values, const Tensor& row_ptr,
                    const Tensor& col_idx, int64_t groups) {
  const char* op = "dense_weight";
  check_float(op, "u", u);
  for (auto [name, t] : {std::pair{"v", &v}, {"values", &values}}) check_same_dtype(op, name, *t, u);
  check_dim(op, "u", u, 2, "[m, r]");
  check_dim(op, "v", v, 2, "[groups * r, n]");
  check_dim(op, "values", values, 1, "[nnz]");
  const int64_t m = u.size(0), r = u.size(1), n = v.size(1);
  check(groups >= 1 && m % groups == 0, op, ": groups must divide m = u.size(0) = ", m, ", got ", groups);
  check(v.size(0) == groups * r, op, ": v must be [groups * r, n] with groups * r = ", groups * r, ", got ",
        sizes_of(v));
  const Pattern pattern(op, "row_ptr", "col_idx", row_ptr, col_idx, m, n, values.numel(), u);

#ifdef CMD_EXT_GPU
  if (on_gpu(u) && r <= kRebuildRank) {
    const Gpu gpu(u);
    Tensor w = torch::stable::new_empty(u, {m, n});
    const Tensor left = torch::stable::contiguous(u), right = torch::stable::contiguous(v);
    const Tensor s = torch::stable::contiguous(values);
    dispatch_gpu(u.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      check_cuda(op, cuda::rebuild(data<T>(left), data<T>(right), r, groups, pattern.on_device<T>(s),
                                   mutable_data<T>(w), gpu.stream()));
    });
    return w;
  }
#endif
  const ScalarType type = compute_type(u);
  Tensor w = torch::stable::contiguous(
      torch::stable::reshape(torch::stable::matmul(torch::stable::reshape(dense_as(u, type), {groups, m / groups, r}),
                                                   torch::stable::reshape(dense_as(v, type), {groups, r, n})),
                             {m, n}));
  const Tensor s = dense_as(values, type);
#ifdef CMD_EXT_GPU
  if (on_gpu(u)) {
    const Gpu gpu(u);
    dispatch(type, [&](auto tag) {
      using T = decltype(tag);
      check_cuda(op, cuda::add_sparse(pattern.on_device<T>(s), mutable_data<T>(w), gpu.stream()));
    });
    return as_type(w, u.scalar_type());
  }
#endif
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    cpu::add_sparse(pattern.with<T>(s), w.mutable_data_ptr<T>(), threads());
  });
  return as_type(w, u.scalar_type());
}

Tensor sddmm(const Tensor& a, const Tensor& b, const Tensor& row_ptr, const Tensor& col_idx) {
  const char* op = "sddmm";
  check_float(op, "a", a);
  check_same_dtype(op, "b", b, a);
  check_dim(op, "a", a, 2, "[m, k]");
  check_dim(op, "b", b, 2, "[n, k]");
  const int64_t k = a.size(1);
  check(b.size(1) == k, op, ": b must be [n, k] with k = a.size(1) = ", k, ", got ", sizes_of(b));
  const Pattern pattern(op, "row_ptr", "col_idx", row_ptr, col_idx, a.size(0), b.size(0), col_idx.numel(), a);

#ifdef CMD_EXT_GPU
  if (on_gpu(a)) {
    const Gpu gpu(a);
    const Tensor left = torch::stable::contiguous(a), right = torch::stable::contiguous(b);
    Tensor out = torch::stable::new_empty(left, {col_idx.numel()});
    dispatch_gpu(a.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      Tensor scratch = workspace(a, cuda::sddmm_workspace_bytes<T>(a.size(0), b.size(0), col_idx.numel(), k));
      check_cuda(op, cuda::sddmm(data<T>(left), data<T>(right), k, pattern.on_device<T>(out), mutable_data<T>(out),
                                 scratch.mutable_data_ptr(), gpu.stream()));
    });
    return out;
  }
#endif
  const ScalarType type = compute_type(a);
  const Tensor left = dense_as(a, type), right = dense_as(b, type);
  Tensor out = torch::stable::new_empty(left, {col_idx.numel()});
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    cpu::sddmm(left.const_data_ptr<T>(), right.const_data_ptr<T>(), k, pattern.with<T>(out), out.mutable_data_ptr<T>(),
               threads());
  });
  return as_type(out, a.scalar_type());
}

}  // namespace cmd_ext

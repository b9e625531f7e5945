// Entry points of topk_csr, residual_topk_csr and csr_transpose.
#include <limits>

#include "ops.h"

namespace cmd_ext {
namespace {

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

// The CSR of every matrix of a batch.
struct Selected {
  Tensor values, row_ptr, col_idx;

  Selected(const Tensor& like, int64_t batch, int64_t m, int64_t nnz)
      : values(torch::stable::new_empty(like, {batch, nnz})),
        row_ptr(torch::stable::new_empty(like, {batch, m + 1}, ScalarType::Int)),
        col_idx(torch::stable::new_empty(like, {batch, nnz}, ScalarType::Int)) {}
};

void check_selection(const char* op, const Tensor& a, int64_t nnz) {
  const int64_t m = a.size(1), n = a.size(2);
  check(nnz >= 0 && nnz <= m * n, op, ": nnz must lie in [0, m * n] = [0, ", m * n, "], got ", nnz);
  check(std::max({nnz, m, n}) <= kMaxIndex, op, ": nnz, m and n must fit in int32, got nnz ", nnz, ", m ", m, " and n ",
        n);
}

void select_on_cpu(const Tensor& a, int64_t nnz, Selected& out) {
  const int64_t m = a.size(1), n = a.size(2);
  dispatch(a.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* matrix = a.const_data_ptr<T>();
    T* values = out.values.mutable_data_ptr<T>();
    auto *row_ptr = out.row_ptr.mutable_data_ptr<int32_t>(), *col_idx = out.col_idx.mutable_data_ptr<int32_t>();
    for (int64_t i = 0; i < a.size(0); ++i, matrix += m * n, values += nnz, row_ptr += m + 1, col_idx += nnz)
      cpu::topk_csr(matrix, m, n, nnz, values, row_ptr, col_idx, threads());
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> topk_csr(const Tensor& a, int64_t nnz) {
  const char* op = "topk_csr";
  check_float(op, "a", a);
  check_dim(op, "a", a, 3, "[b, m, n]");
  check_selection(op, a, nnz);
  const int64_t batch = a.size(0), m = a.size(1);
#ifdef CMD_EXT_GPU
  if (on_gpu(a)) {
    const Gpu gpu(a);
    const int64_t n = a.size(2);
    const Tensor dense = torch::stable::contiguous(a);
    Selected out(dense, batch, m, nnz);
    Tensor scratch = workspace(a, cuda::topk_workspace_bytes(batch, m, n));
    dispatch_gpu(a.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      check_cuda(op, cuda::topk_csr(data<T>(dense), batch, m, n, nnz, mutable_data<T>(out.values),
                                    mutable_data<int32_t>(out.row_ptr), mutable_data<int32_t>(out.col_idx),
                                    scratch.mutable_data_ptr(), gpu.stream()));
    });
    return {out.values, out.row_ptr, out.col_idx};
  }
#endif
  const Tensor dense = dense_as(a, compute_type(a));
  Selected out(dense, batch, m, nnz);
  select_on_cpu(dense, nnz, out);
  return {as_type(out.values, a.scalar_type()), out.row_ptr, out.col_idx};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_topk_csr(const Tensor& w, const Tensor& u, const Tensor& v,
                                                             int64_t nnz) {
  const char* op = "residual_topk_csr";
  check_float(op, "w", w);
  check(!is_half(w.scalar_type()), op, ": w must be float32 or float64, got a 16-bit type");
  check_dim(op, "w", w, 3, "[b, m, n]");
  check_dim(op, "u", u, 3, "[b, m, r]");
  check_dim(op, "v", v, 3, "[b, groups * r, n]");
  for (auto [name, t] : {std::pair{"u", &u}, {"v", &v}}) check_same_dtype(op, name, *t, w);
  check_selection(op, w, nnz);
  const int64_t batch = w.size(0), m = w.size(1), n = w.size(2), r = u.size(2);
  check_sizes(op, "u", u, {batch, m, r}, "[b, m, r]");
  check(r == 0 ? v.size(1) == 0 : v.size(1) > 0 && v.size(1) % r == 0, op,
        ": v must be [b, groups * r, n] with r = u.size(2) = ", r, ", got ", sizes_of(v));
  const int64_t groups = r == 0 ? 1 : v.size(1) / r;
  check_sizes(op, "v", v, {batch, groups * r, n}, "[b, groups * r, n]");
  check(m % groups == 0, op, ": groups = v.size(1) / r = ", groups, " must divide m = ", m);
#ifdef CMD_EXT_GPU
  if (on_gpu(w)) {
    const Gpu gpu(w);
    const Tensor dense = torch::stable::contiguous(w), left = torch::stable::contiguous(u),
                 right = torch::stable::contiguous(v);
    Tensor residual = torch::stable::new_empty(dense, {batch, m, n});
    Selected out(dense, batch, m, nnz);
    Tensor scratch = workspace(w, cuda::topk_workspace_bytes(batch, m, n));
    dispatch(w.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      check_cuda(op, cuda::residual_topk_csr(data<T>(dense), data<T>(left), data<T>(right), batch, groups, m, n, r, nnz,
                                             mutable_data<T>(residual), mutable_data<T>(out.values),
                                             mutable_data<int32_t>(out.row_ptr), mutable_data<int32_t>(out.col_idx),
                                             scratch.mutable_data_ptr(), gpu.stream()));
    });
    return {residual, out.values, out.row_ptr, out.col_idx};
  }
#endif
  const Tensor product = torch::stable::matmul(torch::stable::reshape(u, {batch * groups, m / groups, r}),
                                               torch::stable::reshape(v, {batch * groups, r, n}));
  // In place: the pages of a fresh result would cost more than the subtraction.
  Tensor residual = torch::stable::contiguous(torch::stable::reshape(product, {batch, m, n}));
  const Tensor dense = torch::stable::contiguous(w);
  dispatch(w.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    cpu::subtract_from(dense.const_data_ptr<T>(), batch * m * n, residual.mutable_data_ptr<T>(), threads());
  });
  Selected out(residual, batch, m, nnz);
  select_on_cpu(residual, nnz, out);
  return {residual, out.values, out.row_ptr, out.col_idx};
}

std::tuple<Tensor, Tensor, Tensor> csr_transpose(const Tensor& row_ptr, const Tensor& col_idx, int64_t n,
                                                 int64_t groups) {
  const char* op = "csr_transpose";
  check_dim(op, "row_ptr", row_ptr, 1, "[m + 1]");
  check_dim(op, "col_idx", col_idx, 1, "[nnz]");
  const int64_t m = row_ptr.numel() - 1, nnz = col_idx.numel();
  check(m >= 0, op, ": row_ptr must be [m + 1], got [0]");
  check(n >= 0, op, ": n must be >= 0, got ", n);
  check(groups >= 1 && m % groups == 0, op, ": groups must divide m = row_ptr.size(0) - 1 = ", m, ", got ", groups);
  check(std::max(m, n * groups) < kMaxIndex, op, ": m and groups * n must fit in int32, got m ", m, " and groups * n ",
        n * groups);
  const Pattern pattern(op, "row_ptr", "col_idx", row_ptr, col_idx, m, n, nnz, row_ptr);
  Tensor col_ptr = torch::stable::new_empty(row_ptr, {groups * n + 1});
  Tensor row_idx = torch::stable::new_empty(row_ptr, {nnz}), perm = torch::stable::new_empty(row_ptr, {nnz});
  const int32_t *rows = pattern.row_ptr.const_data_ptr<int32_t>(), *cols = pattern.col_idx.const_data_ptr<int32_t>();
  int32_t* out[] = {col_ptr.mutable_data_ptr<int32_t>(), row_idx.mutable_data_ptr<int32_t>(),
                    perm.mutable_data_ptr<int32_t>()};
#ifdef CMD_EXT_GPU
  if (on_gpu(row_ptr)) {
    const Gpu gpu(row_ptr);
    Tensor scratch = workspace(row_ptr, cuda::transpose_csr_workspace_bytes(m, n, groups));
    check_cuda(op, cuda::transpose_csr(rows, cols, m, n, groups, out[0], out[1], out[2], scratch.mutable_data_ptr(),
                                       gpu.stream()));
    return {col_ptr, row_idx, perm};
  }
#endif
  cpu::transpose_csr(rows, cols, m, n, groups, out[0], out[1], out[2]);
  return {col_ptr, row_idx, perm};
}

}  // namespace cmd_ext

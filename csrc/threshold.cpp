// Entry point of topk_csr.
#include <limits>

#include "ops.h"

namespace cmd_ext {

std::tuple<Tensor, Tensor, Tensor> topk_csr(const Tensor& a, int64_t nnz) {
  check_float("topk_csr", "a", a);
  check_dim("topk_csr", "a", a, 2, "[m, n]");
  const int64_t m = a.size(0), n = a.size(1);
  check(nnz >= 0 && nnz <= m * n, "topk_csr: nnz must lie in [0, m * n] = [0, ", m * n, "], got ", nnz);
  check(std::max(nnz, n) <= std::numeric_limits<int32_t>::max(), "topk_csr: nnz and n must fit in int32, got nnz ", nnz,
        " and n ", n);
  const ScalarType type = compute_type(a);
  const Tensor dense = dense_as(a, type);
  Tensor values = torch::stable::new_empty(dense, {nnz});
  Tensor row_ptr = torch::stable::new_empty(dense, {m + 1}, ScalarType::Int);
  Tensor col_idx = torch::stable::new_empty(dense, {nnz}, ScalarType::Int);
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    cpu::topk_csr(dense.const_data_ptr<T>(), m, n, nnz, values.mutable_data_ptr<T>(),
                  row_ptr.mutable_data_ptr<int32_t>(), col_idx.mutable_data_ptr<int32_t>(), parallel_for);
  });
  return {as_type(values, a.scalar_type()), row_ptr, col_idx};
}

}  // namespace cmd_ext

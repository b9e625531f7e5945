// Entry point of truncated_svd: subspace iteration from a given basis, then an exact SVD of the small factor.
//
//   Q = qr(A basis);  n_iter times: Q = qr(A qr(A^T Q));  A^T Q = P R  =>  A ~ Q R^T P^T,  R^T = X s Y^T
//   =>  u = Q X,  vh = (P Y)^T
//
// The two QR steps keep small singular values to eps * s_max (a Gram matrix would square that). On the CPU all of the
// work is GEMM, QR and a small SVD, which torch's LAPACK and BLAS do best, batched; so there is no kernel of our own.
// Columns are signed so that the entry of u largest in magnitude is positive: the same input gives the same output.
#include <cmath>

#include "ops.h"

namespace cmd_ext {
namespace {

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 1, 2); }

// The two results of linalg_qr.
std::pair<Tensor, Tensor> qr(const Tensor& t) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(t),
                                    torch::stable::detail::from(std::string("reduced"))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_qr", "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor, Tensor> svd(const Tensor& t) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(t), torch::stable::detail::from(false),
                                    torch::stable::detail::from(std::optional<std::string>())};
  check(torch_call_dispatcher("aten::linalg_svd", "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
        "truncated_svd: the SVD did not converge; a must be free of NaN and infinity");
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
          torch::stable::detail::to<Tensor>(stack[2])};
}

// Flips column j of u [b, m, r] and row j of vh [b, r, n] where u's largest entry is negative.
template <class T>
void fix_signs(T* u, T* vh, int64_t b, int64_t m, int64_t r, int64_t n) {
  for (int64_t i = 0; i < b; ++i, u += m * r, vh += r * n)
    for (int64_t j = 0; j < r; ++j) {
      T largest = 0;
      for (int64_t k = 0; k < m; ++k)
        if (std::abs(u[k * r + j]) > std::abs(largest)) largest = u[k * r + j];
      if (largest >= 0) continue;
      for (int64_t k = 0; k < m; ++k) u[k * r + j] = -u[k * r + j];
      for (int64_t k = 0; k < n; ++k) vh[j * n + k] = -vh[j * n + k];
    }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> truncated_svd(const Tensor& a, const Tensor& basis, int64_t rank, int64_t n_iter) {
  const char* op = "truncated_svd";
  check_float(op, "a", a);
  check(!is_half(a.scalar_type()), op, ": a must be float32 or float64, got a 16-bit type; cast it first");
  check_same_dtype(op, "basis", basis, a);
  check_dim(op, "a", a, 3, "[b, m, n]");
  check_dim(op, "basis", basis, 3, "[b, n, l]");
  const int64_t b = a.size(0), m = a.size(1), n = a.size(2), l = basis.size(2);
  check(basis.size(0) == b && basis.size(1) == n, op, ": basis must be [b, n, l] with b = ", b, " and n = ", n,
        ", got ", sizes_of(basis));
  check(l <= std::min(m, n), op, ": basis must have at most min(m, n) = ", std::min(m, n), " columns, got ", l);
  check(rank >= 0 && rank <= l, op, ": rank must lie in [0, columns of basis] = [0, ", l, "], got ", rank);
  check(n_iter >= 0, op, ": n_iter must be >= 0, got ", n_iter);
  if (rank == 0 || b == 0)
    return {torch::stable::new_empty(a, {b, m, rank}), torch::stable::new_empty(a, {b, rank}),
            torch::stable::new_empty(a, {b, rank, n})};

  const Tensor at = transposed(a);
  Tensor q = qr(torch::stable::matmul(a, basis)).first;
  for (int64_t i = 0; i < n_iter; ++i) q = qr(torch::stable::matmul(a, qr(torch::stable::matmul(at, q)).first)).first;
  const auto [p, r] = qr(torch::stable::matmul(at, q));
  const auto [x, s, yh] = svd(transposed(r));

  const auto leading = [&](Tensor t, int64_t dim) {  // narrow takes its tensor by non-const reference
    return torch::stable::narrow(t, dim, 0, rank);
  };
  Tensor u = torch::stable::contiguous(torch::stable::matmul(q, leading(x, 2)));
  Tensor vh = torch::stable::contiguous(torch::stable::matmul(leading(yh, 1), transposed(p)));
  dispatch(a.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    fix_signs(u.mutable_data_ptr<T>(), vh.mutable_data_ptr<T>(), b, m, rank, n);
  });
  return {u, torch::stable::contiguous(leading(s, 1)), vh};
}

}  // namespace cmd_ext

// Entry point of truncated_svd: subspace iteration from a given basis, then an exact SVD of the small factor.
//
//   Q = qr(A basis);  n_iter times: Q = qr(A qr(A^T Q));  A^T Q = P R  =>  A ~ Q R^T P^T,  R^T = X s Y^T
//   =>  u = Q X,  vh = (P Y)^T
//
// The two QR steps keep small singular values to eps * s_max (a Gram matrix would square that). On the CPU all of the
// work is GEMM, QR and a small SVD, which torch's LAPACK and BLAS do best, batched; so there is no kernel of our own.
// Columns are signed so that the entry of u largest in magnitude is positive: the same input gives the same output.
//
// On a GPU the products are torch's (so float32 ones follow torch's setting for TF32), the rest is cuda/svd.cuh, and
// nothing waits for the device: cuSOLVER's QR and SVD do, take the matrices of a batch one by one, or both. QR is
// Cholesky QR in double with a shift where a pivot vanishes. One pass is enough for float inside of the iteration, two
// for an orthonormal result; double, which has no wider type for its Gram matrices, takes twice as many. Where the
// basis spans everything or the short side is at most 64 the result is the exact SVD of A, by the last step with Q = I.
// A matrix with NaN or infinity gives NaN, as an error would have to wait.
#include <algorithm>
#include <cmath>
#include <limits>

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

#ifdef CMD_EXT_GPU

constexpr const char* kOp = "truncated_svd";
constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr int64_t kExactSide = 64;

// The inverse of the upper Cholesky factor of gram [b, s, s] in double. Halves until the kernel takes it:
// [R11 R12; 0 R22]^-1 = [R11^-1, -R11^-1 R12 R22^-1; 0, R22^-1].
Tensor cholesky_inverse(const Gpu& gpu, const Tensor& gram, double shift) {
  const int64_t b = gram.size(0), s = gram.size(1);
  if (s <= cuda::cholesky_max_size) {
    const Tensor dense = torch::stable::contiguous(gram);
    Tensor out = torch::stable::new_empty(gram, {b, s, s});
    check_cuda(kOp, cuda::cholesky_inverse(data<double>(dense), b, s, shift, mutable_data<double>(out), gpu.stream()));
    return out;
  }
  const int64_t half = (s + 1) / 2;
  const auto block = [&](Tensor t, int64_t row, int64_t column) {
    t = torch::stable::narrow(t, 1, row * half, row ? s - half : half);
    return torch::stable::narrow(t, 2, column * half, column ? s - half : half);
  };
  const Tensor first = cholesky_inverse(gpu, block(gram, 0, 0), shift);
  const Tensor r12 = torch::stable::matmul(transposed(first), block(gram, 0, 1));
  const Tensor rest = torch::stable::subtract(block(gram, 1, 1), torch::stable::matmul(transposed(r12), r12));
  const Tensor second = cholesky_inverse(gpu, rest, shift);
  const Tensor corner = torch::stable::matmul(torch::stable::matmul(first, r12), second);
  Tensor out = torch::stable::new_zeros(gram, {b, s, s});
  Tensor out11 = block(out, 0, 0), out12 = block(out, 0, 1), out22 = block(out, 1, 1);
  torch::stable::copy_(out11, first);
  torch::stable::copy_(out12, torch::stable::subtract(out12, corner));
  torch::stable::copy_(out22, second);
  return out;
}

// Orthonormal columns in double that span those of y [b, m, l].
Tensor orthonormal(const Gpu& gpu, const Tensor& y, int passes) {
  const int64_t b = y.size(0), m = y.size(1), l = y.size(2);
  Tensor q = y;
  for (int pass = 0; pass < passes; ++pass) {
    q = torch::stable::contiguous(q);
    Tensor unit = torch::stable::new_empty(y, {b, m, l}, ScalarType::Double);
    const double noise = q.scalar_type() == ScalarType::Double ? 8 * kEpsilon : 1.5e-8;
    dispatch(q.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      check_cuda(kOp, cuda::normalize_columns<T>(data<T>(q), b, m, l, noise, mutable_data<double>(unit), gpu.stream()));
    });
    const Tensor gram = torch::stable::matmul(transposed(unit), unit);
    q = torch::stable::matmul(unit, cholesky_inverse(gpu, gram, (m + l) * kEpsilon));
  }
  return q;
}

// x [b, s, s] in double = h^T diag(sigma) z: the `rank` leading rows of h and z and sigma, in `type`.
std::tuple<Tensor, Tensor, Tensor> jacobi_svd(const Gpu& gpu, const Tensor& x, int64_t rank, ScalarType type) {
  const int64_t b = x.size(0), s = x.size(1);
  const Tensor dense = torch::stable::contiguous(x);
  Tensor h = torch::stable::new_empty(x, {b, rank, s}, type), z = torch::stable::new_empty(x, {b, rank, s}, type);
  Tensor sigma = torch::stable::new_empty(x, {b, rank}, type);
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    Tensor scratch = workspace(x, cuda::jacobi_svd_workspace_bytes<T>(b, s));
    check_cuda(kOp, cuda::jacobi_svd<T>(data<double>(dense), b, s, rank, mutable_data<T>(h), mutable_data<T>(sigma),
                                        mutable_data<T>(z), mutable_data<void>(scratch), gpu.stream()));
  });
  return {h, sigma, z};
}

std::tuple<Tensor, Tensor, Tensor> truncated_svd_on_gpu(const Tensor& a, const Tensor& basis, int64_t rank,
                                                        int64_t n_iter) {
  const Gpu gpu(a);
  const ScalarType type = a.scalar_type();
  const int64_t b = a.size(0), m = a.size(1), n = a.size(2);
  const int rough = type == ScalarType::Double ? 2 : 1, fine = 2 * rough;
  const bool exact = basis.size(2) == std::min(m, n) || std::min(m, n) <= kExactSide, tall = exact && m > n;
  const auto basis_of = [&](const Tensor& y, int passes) { return as_type(orthonormal(gpu, y, passes), type); };

  const Tensor at = transposed(a);
  Tensor q = basis;
  if (!exact) {
    q = basis_of(torch::stable::matmul(a, basis), n_iter == 0 ? fine : rough);
    for (int64_t i = 1; i <= n_iter; ++i) {
      const Tensor back = basis_of(torch::stable::matmul(at, q), rough);
      q = basis_of(torch::stable::matmul(a, back), i == n_iter ? fine : rough);
    }
  }
  const Tensor y = tall ? a : exact ? at : torch::stable::matmul(at, q);  // a = y, y^T or about q y^T; y = p x
  const Tensor p = orthonormal(gpu, y, fine);
  const Tensor x = torch::stable::matmul(transposed(p), as_type(y, ScalarType::Double));
  const auto [h, s, z] = jacobi_svd(gpu, x, rank, type);
  const Tensor y_side = torch::stable::matmul(h, transposed(as_type(p, type)));  // y^T = z^T diag(s) y_side
  Tensor u = torch::stable::contiguous(tall    ? transposed(y_side)
                                       : exact ? transposed(z)
                                               : torch::stable::matmul(q, transposed(z)));
  Tensor vh = torch::stable::contiguous(tall ? z : y_side);
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    check_cuda(kOp, cuda::fix_signs<T>(mutable_data<T>(u), mutable_data<T>(vh), b, m, rank, n, gpu.stream()));
  });
  return {u, s, vh};
}

#endif

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
#ifdef CMD_EXT_GPU
  if (on_gpu(a)) return truncated_svd_on_gpu(a, basis, rank, n_iter);
#endif

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

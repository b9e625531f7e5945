// Entry point of truncated_svd: the leading singular triplets of each matrix, by a Gram matrix or a subspace iteration.
//
//   leading triplets of w [s, n], s <= n:  -w w^T = E lambda E^T,  U = E[:, :rank],  U^T w = diag(sigma) V^T
//   small:  w = a (or a^T), exact at any rank
//   large:  Q = orthonormal(a basis);  n_iter times: Q = orthonormal(a orthonormal(a^T Q));  w = Q^T a;  u = Q U
//
// Cost on the CPU: s^2 n multiply-adds for half of the Gram matrix, eigh of s x s and 2 rank s n more; a full SVD of
// w takes about ten times as long from 256 rows on, and a subspace iteration that is as exact takes longer than eigh.
// Where the basis spans everything, or s is at most 64, nothing is iterated therefore.
// A Gram matrix squares the condition number: sigma_i comes out to eps sigma_1^2 / sigma_i. Where sigma_rank lies below
// 0.03 sigma_1, float goes on in double and double to QR and the SVD of its small factor, so that small singular values
// are good to some 30 eps sigma_1. Orthonormal rows come from Cholesky QR, which is all GEMM, and where they are nearly
// dependent from Householder's. There is no kernel of our own: the work is GEMM, eigh and triangular solves, which
// torch's BLAS and LAPACK do best. Columns are signed so that the entry of u largest in magnitude is positive: the same
// input gives the same output.
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

using Triplets = std::tuple<Tensor, Tensor, Tensor>;

// The two results of linalg_qr.
std::pair<Tensor, Tensor> qr(const Tensor& t) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(t),
                                    torch::stable::detail::from(std::string("reduced"))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_qr", "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Triplets svd(const Tensor& t) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(t), torch::stable::detail::from(false),
                                    torch::stable::detail::from(std::optional<std::string>())};
  check(torch_call_dispatcher("aten::linalg_svd", "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
        "truncated_svd: the SVD did not converge; a must be free of NaN and infinity");
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
          torch::stable::detail::to<Tensor>(stack[2])};
}

// Ascending eigenvalues and the eigenvectors of the symmetric matrices whose lower triangles t holds; false if one did
// not converge.
std::optional<std::pair<Tensor, Tensor>> eigh(const Tensor& t) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(t), torch::stable::detail::from(std::string("L"))};
  if (torch_call_dispatcher("aten::linalg_eigh", "", stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) return {};
  return std::pair{torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// Lower Cholesky factors in double; those of matrices that have none are not to be read: `info` is not 0 there.
std::pair<Tensor, Tensor> cholesky(const Tensor& t) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(t), torch::stable::detail::from(false),
                                    torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_cholesky_ex", "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0])),
          torch::stable::detail::to<Tensor>(stack[1])};
}

// Flips column j of u [b, m, r] and row j of vh [b, r, n] where u's largest entry is negative; evens out s [b, r],
// which descends but for rounding.
template <class T>
void settle(T* u, T* s, T* vh, int64_t b, int64_t m, int64_t r, int64_t n) {
  std::vector<T> largest(r);
  for (int64_t i = 0; i < b; ++i, u += m * r, s += r, vh += r * n) {
    std::fill(largest.begin(), largest.end(), T(0));
    for (int64_t k = 0; k < m; ++k)
      for (int64_t j = 0; j < r; ++j) {
        const T entry = u[k * r + j];
        largest[j] = std::abs(entry) > std::abs(largest[j]) ? entry : largest[j];
      }
    for (int64_t k = 0; k < m; ++k)
      for (int64_t j = 0; j < r; ++j) u[k * r + j] = largest[j] < 0 ? -u[k * r + j] : u[k * r + j];
    for (int64_t j = 0; j < r; ++j) {
      if (j > 0) s[j] = std::min(s[j], s[j - 1]);
      if (largest[j] < 0)
        for (int64_t k = 0; k < n; ++k) vh[j * n + k] = -vh[j * n + k];
    }
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

constexpr int64_t kSmallSide = 64;         // the Gram matrix of a whole matrix costs no more than one pass from a basis
constexpr double kWellConditioned = 1e-3;  // sigma_rank^2 / sigma_1^2 that a Gram matrix leaves exact
constexpr int64_t kGramPanel = 128;        // rows of it in one product

double epsilon(ScalarType type) {
  return type == ScalarType::Double ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
}

Tensor leading(Tensor t, int64_t dim, int64_t count) { return torch::stable::narrow(t, dim, 0, count); }

// The norms of the rows of q [b, l, m] and L^-1 of their Gram matrix L L^T, in double, and the least pivot L_ii /
// |q_i|, the sine of the angle between a row and those before it; 0 where there is no L.
std::tuple<Tensor, Tensor, double> inverse_factor(const Tensor& q) {
  const int64_t b = q.size(0), l = q.size(1);
  const Tensor gram = as_type(torch::stable::matmul(q, transposed(q)), ScalarType::Double);
  const auto [factor, info] = cholesky(gram);
  Tensor norms = torch::stable::new_empty(gram, {b, l}), identity = torch::stable::new_zeros(gram, {b, l, l});
  const double *square = gram.const_data_ptr<double>(), *root = factor.const_data_ptr<double>();
  double *norm = norms.mutable_data_ptr<double>(), *one = identity.mutable_data_ptr<double>(), pivot = 1;
  bool sound = true;
  for (int64_t i = 0; i < b; ++i) {
    sound = sound && info.const_data_ptr<int32_t>()[i] == 0;
    for (int64_t j = 0; j < l; ++j, ++norm) {
      const int64_t diagonal = (i * l + j) * l + j;
      one[diagonal] = 1;
      *norm = std::sqrt(square[diagonal]);
      const double sine = root[diagonal] / *norm;
      sound = sound && sine > 0;  // no NaN either
      pivot = std::min(pivot, sine);
    }
  }
  if (!sound) return {norms, identity, 0};
  return {norms, call("aten::linalg_solve_triangular", "", factor, identity, false, true, false), pivot};
}

// Orthonormal rows that span those of y [b, l, m], row i those of the first i + 1, and the norms of y's rows. Cholesky
// QR in a type of precision eps leaves q orthonormal to eps / pivot^2: it is repeated until that is the precision of y,
// in double where float would leave nothing of it.
std::pair<Tensor, Tensor> orthonormal_rows(const Tensor& y) {
  const ScalarType type = y.scalar_type();
  const double wanted = 4 * epsilon(type), usable = 0.01;
  Tensor q = y, lengths;
  for (int pass = 0; pass < 4; ++pass) {
    const auto [norms, inverse, pivot] = inverse_factor(q);
    if (pass == 0) lengths = norms;
    const double error = epsilon(q.scalar_type()) / (pivot * pivot);
    if (error < usable) {
      q = torch::stable::matmul(as_type(inverse, q.scalar_type()), q);
      if (error <= wanted) return {as_type(q, type), lengths};
    } else if (q.scalar_type() == ScalarType::Float) {
      q = as_type(q, ScalarType::Double);
    } else {
      break;
    }
  }
  const auto [columns, r] = qr(transposed(y));
  Tensor rows = torch::stable::contiguous(transposed(columns));
  const Tensor upper = torch::stable::contiguous(r);
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    const int64_t b = y.size(0), l = y.size(1), m = y.size(2);
    T* row = rows.mutable_data_ptr<T>();
    const T* factor = upper.const_data_ptr<T>();
    for (int64_t i = 0; i < b * l; ++i, row += m)
      if (factor[i * l + i % l] < 0)
        for (int64_t k = 0; k < m; ++k) row[k] = -row[k];
  });
  return {rows, lengths};
}

// The lower triangle of -w w^T, negative so that eigh lists the largest singular value first.
Tensor negated_gram(Tensor w) {
  const int64_t b = w.size(0), s = w.size(1);
  Tensor gram = torch::stable::new_zeros(w, {b, s, s});
  for (int64_t row = 0; row < s; row += kGramPanel) {
    const int64_t end = std::min(row + kGramPanel, s);
    const Tensor product =
        torch::stable::matmul(torch::stable::narrow(w, 1, row, end - row), transposed(leading(w, 1, end)));
    Tensor panel = torch::stable::narrow(gram, 1, row, end - row);
    panel = leading(panel, 2, end);
    torch::stable::copy_(panel, torch::stable::subtract(panel, product));
  }
  return gram;
}

// Whether squares of entries neither overflowed nor vanished in a Gram matrix.
template <class T>
bool in_range(const Tensor& gram) {
  const int64_t s = gram.size(1);
  const T* diagonal = gram.const_data_ptr<T>();
  constexpr T eps = std::numeric_limits<T>::epsilon(), least = std::numeric_limits<T>::min() / (eps * eps);
  for (int64_t i = 0; i < gram.size(0); ++i, diagonal += s * s) {
    T trace = 0;
    for (int64_t j = 0; j < s; ++j) trace -= diagonal[j * s + j];
    if (!(trace >= least && trace <= std::numeric_limits<T>::max())) return false;
  }
  return true;
}

// The leading triplets of each w [b, s, n] with s <= n through its Gram matrix; nothing if one of them has
// sigma_rank^2 < least sigma_1^2, or is out of range.
std::optional<Triplets> by_gram(const Tensor& w, int64_t rank, double least) {
  const Tensor gram = negated_gram(w);
  bool fine = false;
  dispatch(w.scalar_type(), [&](auto tag) { fine = in_range<decltype(tag)>(gram); });
  if (!fine) return {};
  const auto decomposed = eigh(gram);
  if (!decomposed) return {};
  const auto& [values, vectors] = *decomposed;
  dispatch(w.scalar_type(), [&](auto tag) {
    const int64_t s = w.size(1);
    const auto* lambda = values.template const_data_ptr<decltype(tag)>();
    for (int64_t i = 0; i < w.size(0); ++i, lambda += s) fine = fine && -lambda[rank - 1] >= least * -lambda[0];
  });
  if (!fine) return {};
  const Tensor u = leading(vectors, 2, rank);
  const auto [vh, norms] = orthonormal_rows(torch::stable::matmul(transposed(u), w));
  return Triplets{u, as_type(norms, w.scalar_type()), vh};
}

// The leading triplets of each w [b, s, n] with s <= n.
Triplets triplets(Tensor w, int64_t rank) {
  const ScalarType type = w.scalar_type();
  const int64_t b = w.size(0);
  if (const auto found = by_gram(w, rank, kWellConditioned)) return *found;
  if (b > 1) {  // at least one of them is ill-conditioned
    Triplets all{torch::stable::new_empty(w, {b, w.size(1), rank}), torch::stable::new_empty(w, {b, rank}),
                 torch::stable::new_empty(w, {b, rank, w.size(2)})};
    const auto put = [](Tensor& all, int64_t i, const Tensor& one) {
      Tensor slot = torch::stable::narrow(all, 0, i, 1);
      torch::stable::copy_(slot, one);
    };
    for (int64_t i = 0; i < b; ++i) {
      const auto [u, s, vh] = triplets(torch::stable::narrow(w, 0, i, 1), rank);
      put(std::get<0>(all), i, u), put(std::get<1>(all), i, s), put(std::get<2>(all), i, vh);
    }
    return all;
  }
  if (type == ScalarType::Float)
    if (const auto found = by_gram(as_type(w, ScalarType::Double), rank, -1)) {
      const auto& [u, s, vh] = *found;
      return {as_type(u, type), as_type(s, type), as_type(vh, type)};
    }
  const auto [p, r] = qr(transposed(w));
  const auto [x, s, yh] = svd(transposed(r));
  return {leading(x, 2, rank), leading(s, 1, rank), torch::stable::matmul(leading(yh, 1, rank), transposed(p))};
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
#ifdef CMD_EXT_GPU
  if (on_gpu(a)) return truncated_svd_on_gpu(a, basis, rank, n_iter);
#endif

  const int64_t side = std::min(m, n);
  const bool exact = l == side || side <= kSmallSide, tall = exact && m > n;
  const Tensor at = transposed(a);
  Tensor q;
  if (!exact) {
    q = orthonormal_rows(torch::stable::matmul(transposed(basis), at)).first;
    for (int64_t i = 0; i < n_iter; ++i) {
      const Tensor back = orthonormal_rows(torch::stable::matmul(q, a)).first;
      q = orthonormal_rows(torch::stable::matmul(back, at)).first;
    }
  }
  const auto [x, s, y] = triplets(tall ? at : exact ? a : torch::stable::matmul(q, a), rank);
  Tensor u = torch::stable::contiguous(tall ? transposed(y) : exact ? x : torch::stable::matmul(transposed(q), x));
  Tensor sigma = torch::stable::contiguous(s), vh = torch::stable::contiguous(tall ? transposed(x) : y);
  dispatch(a.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    settle(u.mutable_data_ptr<T>(), sigma.mutable_data_ptr<T>(), vh.mutable_data_ptr<T>(), b, m, rank, n);
  });
  return {u, sigma, vh};
}

}  // namespace cmd_ext

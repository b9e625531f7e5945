// The kernels of svd.cuh against long double, alone and composed to a basis and an SVD as csrc/svd.cpp composes them.
#include <functional>

#include "testing_cuda.h"

namespace {

namespace cuda = cmd_ext::cuda;
using testing::Device;
using Real = long double;
using Matrix = std::vector<Real>;  // row-major

template <class T>
Matrix widen(const std::vector<T>& values) {
  return Matrix(values.begin(), values.end());
}
template <class T>
Matrix part(const std::vector<T>& values, int64_t index, int64_t count) {
  return Matrix(values.begin() + index * count, values.begin() + (index + 1) * count);
}

// a [m, k] times b [k, n].
Matrix product(const Matrix& a, const Matrix& b, int64_t m, int64_t k, int64_t n) {
  Matrix out(m * n, 0);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p)
      for (int64_t j = 0; j < n; ++j) out[i * n + j] += a[i * k + p] * b[p * n + j];
  return out;
}
Matrix transposed(const Matrix& a, int64_t m, int64_t n) {
  Matrix out(m * n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) out[j * m + i] = a[i * n + j];
  return out;
}
// NaN where an entry is.
Real largest(const Matrix& a) {
  Real most = 0;
  for (const Real x : a)
    if (!(std::abs(x) <= most)) most = std::abs(x);
  return most;
}
Real difference(Matrix a, const Matrix& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] -= b[i];
  return largest(a);
}
// The largest entry of a a^T - I, of a [rows, n].
Real orthonormality(const Matrix& a, int64_t rows, int64_t n) {
  Matrix gram = product(a, transposed(a, rows, n), rows, n, rows);
  for (int64_t i = 0; i < rows; ++i) gram[i * rows + i] -= 1;
  return largest(gram);
}

// Singular values in descending order by Jacobi rotations of the rows.
Matrix singular_values(Matrix a, int64_t m, int64_t n) {
  for (int sweep = 0; sweep < 60; ++sweep)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = i + 1; j < m; ++j) {
        Real xx = 0, yy = 0, xy = 0;
        for (int64_t k = 0; k < n; ++k) {
          xx += a[i * n + k] * a[i * n + k];
          yy += a[j * n + k] * a[j * n + k];
          xy += a[i * n + k] * a[j * n + k];
        }
        if (xy == 0) continue;
        const Real angle = std::atan2(2 * xy, xx - yy) / 2, c = std::cos(angle), s = std::sin(angle);
        for (int64_t k = 0; k < n; ++k) {
          const Real x = a[i * n + k], y = a[j * n + k];
          a[i * n + k] = c * x + s * y;
          a[j * n + k] = c * y - s * x;
        }
      }
  Matrix out(m, 0);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t k = 0; k < n; ++k) out[i] += a[i * n + k] * a[i * n + k];
    out[i] = std::sqrt(out[i]);
  }
  std::sort(out.rbegin(), out.rend());
  return out;
}

// A random matrix [m, n] with the given singular values, the rest 0: orthonormal columns by Gram-Schmidt.
template <class T>
std::vector<T> with_spectrum(int64_t m, int64_t n, const std::vector<double>& spectrum) {
  const auto basis = [](int64_t rows, int64_t length) {
    Matrix q(rows * length);
    for (Real& x : q) x = testing::uniform();
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < 2 * i; ++j) {
        Real dot = 0;
        for (int64_t k = 0; k < length; ++k) dot += q[i * length + k] * q[j % i * length + k];
        for (int64_t k = 0; k < length; ++k) q[i * length + k] -= dot * q[j % i * length + k];
      }
      Real norm = 0;
      for (int64_t k = 0; k < length; ++k) norm += q[i * length + k] * q[i * length + k];
      for (int64_t k = 0; k < length; ++k) q[i * length + k] /= std::sqrt(norm);
    }
    return q;
  };
  const int64_t rank = int64_t(spectrum.size());
  Matrix u = basis(rank, m);
  const Matrix v = basis(rank, n);
  for (int64_t i = 0; i < rank * m; ++i) u[i] *= spectrum[i / m];
  const Matrix a = product(transposed(u, rank, m), v, m, rank, n);
  return std::vector<T>(a.begin(), a.end());
}

std::vector<double> powers(int64_t count, double base) {
  std::vector<double> out(count);
  for (int64_t i = 0; i < count; ++i) out[i] = std::pow(base, double(i));
  return out;
}

template <class T>
std::vector<T> concatenated(const std::vector<std::vector<T>>& parts) {
  std::vector<T> out;
  for (const auto& part : parts) out.insert(out.end(), part.begin(), part.end());
  out.shrink_to_fit();
  return out;
}

template <class T>
void check_normalize_columns(int64_t m, int64_t l, double factor) {
  const std::string name = "normalize_columns " + std::to_string(m) + " " + std::to_string(l);
  const int64_t batch = 2;
  auto y = testing::random_vector<T>(batch * m * l);
  for (T& value : y) value = T(value * factor);
  const int64_t zero = l / 2;  // this column of the second matrix
  for (int64_t i = 0; i < m; ++i) y[(m + i) * l + zero] = 0;
  const Device<T> y_device(y);
  const auto run = [&](double noise) {
    return testing::for_all_schedules(
        [&] {
          const Device<double> out(batch * m * l);
          CHECK(cuda::normalize_columns<T>(y_device, batch, m, l, noise, out, nullptr) == cudaSuccess, name);
          return out.host();
        },
        name);
  };
  const auto exact = run(0), noisy = run(1e-3);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t j = 0; j < l; ++j) {
      Real norm = 0, noise = 0;
      for (int64_t i = 0; i < m; ++i) norm = std::hypot(norm, Real(y[(b * m + i) * l + j]));
      for (int64_t i = 0; i < m; ++i) {
        const int64_t k = (b * m + i) * l + j;
        if (norm > 0) CHECK(std::abs(exact[k] - y[k] / norm) <= (m + 8) * 2.3e-16, name, "at", b, i, j, exact[k]);
        noise += std::pow(norm > 0 ? (noisy[k] - exact[k]) / 1e-3 : exact[k], 2);
      }
      CHECK(noise > 0 && noise <= 3, name, "noise of column", j, noise);
    }
}

void check_cholesky_inverse(int64_t s, double condition) {
  const std::string name = "cholesky_inverse " + std::to_string(s) + " " + std::to_string(condition);
  const int64_t batch = 2;
  std::vector<double> spectrum(s);
  for (int64_t i = 0; i < s; ++i) spectrum[i] = std::pow(condition, -double(i) / double(s));
  std::vector<std::vector<double>> grams;
  for (int64_t b = 0; b < batch; ++b) {
    const Matrix y = widen(with_spectrum<double>(s, s, spectrum));
    Matrix gram = product(y, transposed(y, s, s), s, s, s);
    Matrix scaled(gram);
    for (int64_t i = 0; i < s * s; ++i) scaled[i] /= std::sqrt(gram[i / s * (s + 1)] * gram[i % s * (s + 1)]);
    grams.emplace_back(scaled.begin(), scaled.end());
  }
  const Device<double> gram(concatenated(grams));
  const auto r_inverse = testing::for_all_schedules(
      [&] {
        const Device<double> out(batch * s * s);
        CHECK(cuda::cholesky_inverse(gram, batch, s, 1e-13, out, nullptr) == cudaSuccess, name);
        return out.host();
      },
      name);
  for (int64_t b = 0; b < batch; ++b) {
    const Matrix inverse = part(r_inverse, b, s * s);
    for (int64_t i = 0; i < s; ++i)
      for (int64_t j = 0; j < i; ++j) CHECK(inverse[i * s + j] == 0, name, "is not upper triangular at", i, j);
    const Matrix rows = transposed(inverse, s, s);
    Matrix unit = product(product(rows, widen(grams[b]), s, s, s), inverse, s, s, s);
    for (int64_t i = 0; i < s; ++i) unit[i * s + i] -= 1;
    CHECK(largest(unit) <= 4 * s * condition * condition * 2.3e-16, name, "matrix", b, largest(unit));
  }
}

// Matrices that have no Cholesky factor: the result is finite and bounded by the shift, and NaN ends too.
void check_cholesky_of_singular(int64_t s) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), shift = 1e-13;
  std::vector<double> gram(4 * s * s, 1);
  for (int64_t i = 0; i < s * s; ++i) {
    gram[s * s + i] = 0;
    gram[2 * s * s + i] = 1 - 1e-14 * testing::uniform();  // indefinite as rounding makes it
    gram[3 * s * s + i] = nan;
  }
  const Device<double> device(gram);
  const auto r_inverse = testing::for_all_schedules(
      [&] {
        const Device<double> out(4 * s * s);
        CHECK(cuda::cholesky_inverse(device, 4, s, shift, out, nullptr) == cudaSuccess, s);
        return out.host();
      },
      "cholesky_inverse of singular matrices");
  for (int64_t b = 0; b < 3; ++b) {
    const Real most = largest(part(r_inverse, b, s * s));
    CHECK(most <= 1.01 / std::sqrt(shift), "cholesky_inverse of singular matrix", b, s, most);
  }
}

// Shared memory for everything, for bands of a few rows, and for no two rows.
struct Memory {
  const char* name;
  int bytes;
};
std::vector<Memory> memories(int64_t s, int64_t element) {
  return {{"one block", 232448}, {"bands", int(2 * (s / 3 + 2) * s * element)}, {"global", int(3 * s * element)}};
}

template <class T>
void check_jacobi(const std::string& name, const std::vector<std::vector<T>>& matrices, int64_t s, int64_t rank) {
  const int64_t batch = int64_t(matrices.size());
  const std::vector<T> values = concatenated(matrices);
  const std::vector<double> x(values.begin(), values.end());
  const Device<double> x_device(x);
  const double eps = 2 * testing::roundoff<T>();
  for (const Memory& memory : memories(s, sizeof(T))) {
    simt::config.max_shared_bytes = memory.bytes;
    const auto got = testing::for_all_schedules(
        [&] {
          const Device<T> h(batch * rank * s), sigma(batch * rank), z(batch * rank * s);
          const Device<char> workspace(cuda::jacobi_svd_workspace_bytes<T>(batch, s));
          CHECK(cuda::jacobi_svd<T>(x_device, batch, s, rank, h, sigma, z, workspace, nullptr) == cudaSuccess, name);
          return concatenated<T>({h.host(), sigma.host(), z.host()});
        },
        name + " in " + memory.name);
    for (int64_t b = 0; b < batch; ++b) {
      const Matrix a = part(x, b, s * s), want = singular_values(a, s, s);
      const Matrix h(got.begin() + b * rank * s, got.begin() + (b + 1) * rank * s);
      const Matrix sigma(got.begin() + batch * rank * s + b * rank, got.begin() + batch * rank * s + (b + 1) * rank);
      const Matrix z(got.end() - (batch - b) * rank * s, got.end() - (batch - b - 1) * rank * s);
      const Real scale = want[0], bound = 10 * std::sqrt(Real(s)) * eps;
      CHECK(orthonormality(h, rank, s) <= bound, name, memory.name, "h", b, orthonormality(h, rank, s));
      CHECK(orthonormality(z, rank, s) <= bound, name, memory.name, "z", b, orthonormality(z, rank, s));
      Matrix scaled(z);
      for (int64_t i = 0; i < rank * s; ++i) scaled[i] *= sigma[i / s];
      CHECK(difference(product(h, a, rank, s, s), scaled) <= bound * scale, name, memory.name, "h x - sigma z", b);
      for (int64_t i = 0; i < rank; ++i) {
        CHECK(std::abs(sigma[i] - want[i]) <= bound * scale, name, memory.name, "sigma", b, i, sigma[i], want[i]);
        CHECK(sigma[i] >= 0 && (i == 0 || sigma[i] <= sigma[i - 1]), name, memory.name, "order of sigma", b, i);
      }
    }
  }
  simt::config.max_shared_bytes = 232448;
}

template <class T>
void check_jacobi_cases() {
  for (const int64_t s : {1, 2, 3, 8, 13}) {
    std::vector<double> repeated(s, 5);
    for (int64_t i = 0; i < s / 2; ++i) repeated[i] = 7;
    check_jacobi<T>(
        "jacobi " + std::to_string(s),
        {testing::random_vector<T>(s * s), with_spectrum<T>(s, s, powers(s, 0.125)), with_spectrum<T>(s, s, repeated)},
        s, (s + 1) / 2);
  }
  std::vector<T> single(36, 0), identity(36, 0), huge = testing::random_vector<T>(36), tiny(huge);
  single[9] = -3;
  for (int i = 0; i < 6; ++i) identity[i * 7] = 1;
  for (T& x : huge) x *= std::numeric_limits<T>::max() / 16;
  for (T& x : tiny) x *= std::numeric_limits<T>::min();
  check_jacobi<T>("jacobi of awkward matrices",
                  {std::vector<T>(36, 0), single, identity, huge, with_spectrum<T>(6, 6, {2, 1})}, 6, 6);
  check_jacobi<T>("jacobi of denormals", {tiny}, 6, 2);
}

template <class T>
void check_jacobi_of_nan() {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const Device<double> x(std::vector<double>{1, nan, 2, 3});
  const Device<T> h(4), sigma(2), z(4);
  const Device<char> workspace(cuda::jacobi_svd_workspace_bytes<T>(1, 2));
  CHECK(cuda::jacobi_svd<T>(x, 1, 2, 2, h, sigma, z, workspace, nullptr) == cudaSuccess, "jacobi of NaN");
  CHECK(std::isnan(sigma.host()[0]), "jacobi of NaN");
}

template <class T>
void check_fix_signs(int64_t m, int64_t r, int64_t n) {
  const std::string name = "fix_signs " + std::to_string(m) + " " + std::to_string(r);
  const int64_t batch = 3;
  auto u = testing::random_vector<T>(batch * m * r), vh = testing::random_vector<T>(batch * r * n);
  for (int64_t i = 0; i < batch * m * r; i += 3) u[i] = i % 2 ? T(1) : T(-1);  // many ties
  for (int64_t i = 0; i < m; ++i) u[i * r] = 0;
  const auto got = testing::for_all_schedules(
      [&] {
        const Device<T> u_device(u), vh_device(vh);
        CHECK(cuda::fix_signs<T>(u_device, vh_device, batch, m, r, n, nullptr) == cudaSuccess, name);
        return concatenated<T>({u_device.host(), vh_device.host()});
      },
      name);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t j = 0; j < r; ++j) {
      T largest = 0;
      for (int64_t i = 0; i < m; ++i)
        if (std::abs(u[(b * m + i) * r + j]) > std::abs(largest)) largest = u[(b * m + i) * r + j];
      const T sign = largest < 0 ? T(-1) : T(1);
      for (int64_t i = 0; i < m; ++i) u[(b * m + i) * r + j] *= sign;
      for (int64_t k = 0; k < n; ++k) vh[(b * r + j) * n + k] *= sign;
    }
  CHECK(testing::same_bits(got, concatenated<T>({u, vh})), name, "differs");
}

// Orthonormal columns [m, l] whose span holds the columns of y, in as many passes as csrc/svd.cpp takes.
template <class T>
void check_basis(const std::string& name, const std::vector<T>& y, int64_t m, int64_t l) {
  const double eps = std::numeric_limits<double>::epsilon();
  const bool narrow = sizeof(T) == 4;
  const Device<T> y_device(y);
  std::vector<double> q;
  for (int pass = 0; pass < (narrow ? 2 : 4); ++pass) {
    const Device<double> normalized(m * l), inverse(l * l);
    if (pass == 0)
      cuda::normalize_columns<T>(y_device, 1, m, l, narrow ? 1.5e-8 : 8 * eps, normalized, nullptr);
    else
      cuda::normalize_columns<double>(Device<double>(q), 1, m, l, 8 * eps, normalized, nullptr);
    const auto rounded = [](const Matrix& a) { return std::vector<double>(a.begin(), a.end()); };
    const Matrix wide = widen(normalized.host());
    const Device<double> gram(rounded(product(transposed(wide, m, l), wide, l, m, l)));
    cuda::cholesky_inverse(gram, 1, l, (m + l) * eps, inverse, nullptr);
    q = rounded(product(wide, widen(inverse.host()), m, l, l));
  }
  const Matrix basis = widen(q), rows = transposed(basis, m, l);
  CHECK(orthonormality(rows, l, m) <= (narrow ? 1e-9 : 1e-14), name, "basis", orthonormality(rows, l, m));
  const Matrix wide = widen(y), inside = product(basis, product(rows, wide, l, m, l), m, l, l);
  const Real bound = std::sqrt(Real(m)) * 16 * testing::roundoff<T>() * largest(wide);
  CHECK(difference(inside, wide) <= bound, name, "span", difference(inside, wide), bound);
}

template <class T>
void check_basis_cases() {
  const int64_t m = 40, l = 12;
  check_basis<T>("random", testing::random_vector<T>(m * l), m, l);
  check_basis<T>("square", testing::random_vector<T>(l * l), l, l);
  check_basis<T>("graded", with_spectrum<T>(m, l, powers(l, 1e-3)), m, l);
  check_basis<T>("rank 3", with_spectrum<T>(m, l, {3, 2, 1}), m, l);
  check_basis<T>("square of rank 3", with_spectrum<T>(l, l, {3, 2, 1}), l, l);
  check_basis<T>("ones", std::vector<T>(m * l, 1), m, l);
  check_basis<T>("square ones", std::vector<T>(l * l, 1), l, l);
  check_basis<T>("zero", std::vector<T>(m * l, 0), m, l);
  check_basis<T>("one by one", std::vector<T>(1, -2), 1, 1);
  std::vector<T> columns(m * l, 0);
  for (int64_t j = 0; j < l; ++j) columns[3 * l + j] = 1;
  check_basis<T>("equal unit columns", columns, m, l);
}

template <class T>
void check_sizes_of_zero() {
  const Device<T> none(0);
  const Device<double> wide(0);
  for (const int64_t batch : {0, 2}) {
    CHECK(cuda::normalize_columns<T>(none, batch, 3, 0, 0, wide, nullptr) == cudaSuccess, batch);
    CHECK(cuda::normalize_columns<T>(none, batch, 0, 3, 0, wide, nullptr) == cudaSuccess, batch);
    CHECK(cuda::cholesky_inverse(wide, batch, 0, 1e-13, wide, nullptr) == cudaSuccess, batch);
    const Device<char> workspace(cuda::jacobi_svd_workspace_bytes<T>(batch, 0));
    CHECK(cuda::jacobi_svd<T>(wide, batch, 0, 0, none, none, none, workspace, nullptr) == cudaSuccess, batch);
    CHECK(cuda::fix_signs<T>(none, none, batch, 3, 0, 2, nullptr) == cudaSuccess, batch);
  }
  CHECK(cuda::jacobi_svd<T>(wide, 0, 3, 2, none, none, none, nullptr, nullptr) == cudaSuccess, "no matrices");
  CHECK(cuda::fix_signs<T>(none, none, 0, 3, 2, 2, nullptr) == cudaSuccess, "no matrices");
}

template <class T>
void check_type() {
  for (const auto& [m, l] : {std::pair<int64_t, int64_t>{1, 1}, {5, 3}, {37, 9}, {9, 17}})
    check_normalize_columns<T>(m, l, 1);
  check_normalize_columns<T>(130, 2, std::numeric_limits<T>::max() / 2);
  check_normalize_columns<T>(6, 2, std::numeric_limits<T>::min());
  check_jacobi_cases<T>();
  check_jacobi_of_nan<T>();
  check_basis_cases<T>();
  for (const auto& [m, r] : {std::pair<int64_t, int64_t>{1, 1}, {5, 3}, {70, 9}, {4, 16}}) check_fix_signs<T>(m, r, 11);
  check_sizes_of_zero<T>();
}

}  // namespace

int main() {
  for (const int64_t s : {1, 2, 3, 16, 33}) check_cholesky_inverse(s, s == 1 ? 1 : 100);
  check_cholesky_inverse(20, 1e5);
  check_cholesky_inverse(cuda::cholesky_max_size, 10);
  check_cholesky_of_singular(1);
  check_cholesky_of_singular(11);
  check_jacobi<float>("jacobi 35", {testing::random_vector<float>(35 * 35)}, 35, 35);
  check_type<float>();
  check_type<double>();
  return testing::finish();
}

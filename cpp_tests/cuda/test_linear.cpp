// The kernels of linear.cuh against sums in long double, on awkward sizes, supports and every type.
#include "testing_cuda.h"

namespace {

namespace cuda = cmd_ext::cuda;
using testing::as_double;
using testing::Device;
using testing::RandomCsr;
using testing::Sum;

// A sparse matrix on the host and on the device.
template <class T>
struct Sparse {
  RandomCsr<float> support;
  std::vector<T> values;
  Device<T> values_device;
  Device<int32_t> row_ptr, col_idx;

  Sparse(int64_t rows, int64_t cols, double density)
      : support(rows, cols, density),
        values(testing::random_values<T>(support.nnz())),
        values_device(values),
        row_ptr(support.row_ptr),
        col_idx(support.col_idx) {}
  cuda::Csr<T> csr() const { return {support.rows, support.cols, support.nnz(), values_device, row_ptr, col_idx}; }
  template <class Visit>
  void visit(int64_t row, const Visit& visit) const {
    for (int at = support.row_ptr[row]; at < support.row_ptr[row + 1]; ++at) visit(at, support.col_idx[at]);
  }
};

template <class T>
void expect_near(const std::vector<T>& got, const std::vector<Sum>& want, const std::string& name) {
  CHECK(got.size() == want.size(), name, "has the wrong size");
  for (size_t i = 0; i < got.size(); ++i)
    if (!testing::near(got[i], want[i])) {
      CHECK(false, name, "at", i, "got", as_double(got[i]), "want", double(want[i].value));
      return;
    }
  CHECK(true, name);
}

template <class T>
void check_transpose(int64_t rows, int64_t cols, int64_t pitch) {
  const auto in = testing::random_values<T>(rows * cols);
  const Device<T> in_device(in);
  const auto out = testing::for_all_schedules(
      [&] {
        const Device<T> result(cols * pitch);
        CHECK(cuda::transpose<T>(in_device, rows, cols, result, pitch, nullptr) == cudaSuccess, rows, cols);
        return result.host();
      },
      "transpose");
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t i = 0; i < pitch; ++i)
      CHECK(as_double(out[j * pitch + i]) == (i < rows ? as_double(in[i * cols + j]) : 0), "transpose", rows, cols, i,
            j);
}

template <class T>
void check_spmm(int64_t rows, int64_t cols, int64_t tokens, double density, bool few, bool with_bias, int beta) {
  const std::string name = std::string(few ? "spmm_few " : "spmm ") + std::to_string(sizeof(T)) + " bytes, " +
                           std::to_string(rows) + "x" + std::to_string(cols) + ", tokens " + std::to_string(tokens);
  const Sparse<T> s(rows, cols, density);
  const auto x = testing::random_values<T>(tokens * cols), bias = testing::random_values<T>(rows);
  const auto y0 = testing::random_values<T>(tokens * rows);
  const int64_t vec = 16 / int64_t(sizeof(T)), pitch = (tokens + vec - 1) / vec * vec;
  std::vector<T> xt(cols * pitch, testing::from_double<T>(0));
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < cols; ++k) xt[k * pitch + t] = x[t * cols + k];
  const Device<T> input(few ? x : xt), bias_device(bias);
  const T* b = with_bias ? bias_device.get() : nullptr;
  const auto y = testing::for_all_schedules(
      [&] {
        const Device<T> poison(tokens * rows), initial(y0);
        const Device<T>& out = beta ? initial : poison;
        CHECK((few ? cuda::spmm_few<T>(input, tokens, s.csr(), b, beta, out, nullptr)
                   : cuda::spmm<T>(input, tokens, pitch, s.csr(), b, beta, out, nullptr)) == cudaSuccess,
              name);
        return out.host();
      },
      name);
  std::vector<Sum> want(tokens * rows);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < rows; ++i) {
      Sum& sum = want[t * rows + i];
      s.visit(i, [&](int at, int k) { sum.add((long double)(as_double(s.values[at])) * as_double(x[t * cols + k])); });
      if (with_bias) sum.add(as_double(bias[i]));
      if (beta) sum.add(as_double(y0[t * rows + i]));
    }
  expect_near(y, want, name);
}

template <class T>
void check_sddmm(int64_t rows, int64_t cols, int64_t k, double density) {
  const std::string name = "sddmm " + std::to_string(rows) + "x" + std::to_string(cols) + ", k " + std::to_string(k);
  const Sparse<T> s(rows, cols, density);
  const auto a = testing::random_values<T>(rows * k), b = testing::random_values<T>(cols * k);
  const Device<T> a_device(a), b_device(b);
  const int64_t nnz = s.support.nnz(), bytes = cuda::sddmm_workspace_bytes<T>(rows, cols, nnz, k);
  const auto out = testing::for_all_schedules(
      [&] {
        const Device<T> result(nnz);
        const Device<unsigned char> workspace(bytes);
        CHECK(cuda::sddmm<T>(a_device, b_device, k, s.csr(), result, workspace, nullptr) == cudaSuccess, name);
        return result.host();
      },
      name);
  std::vector<Sum> want(nnz);
  for (int64_t i = 0; i < rows; ++i)
    s.visit(i, [&](int at, int j) {
      for (int64_t t = 0; t < k; ++t) want[at].add((long double)(as_double(a[i * k + t])) * as_double(b[j * k + t]));
    });
  expect_near(out, want, name);
}

template <class T>
void check_rebuild(int64_t rows, int64_t cols, int64_t r, int64_t groups, double density) {
  const std::string name = "rebuild " + std::to_string(rows) + "x" + std::to_string(cols) + ", rank " +
                           std::to_string(r) + ", groups " + std::to_string(groups);
  const Sparse<T> s(rows, cols, density);
  const auto u = testing::random_values<T>(rows * r), v = testing::random_values<T>(groups * r * cols);
  const Device<T> u_device(u), v_device(v);
  const auto w = testing::for_all_schedules(
      [&] {
        const Device<T> out(rows * cols);
        CHECK(cuda::rebuild<T>(u_device, v_device, r, groups, s.csr(), out, nullptr) == cudaSuccess, name);
        return out.host();
      },
      name);
  std::vector<Sum> want(rows * cols);
  for (int64_t i = 0; i < rows; ++i) {
    const T* factor = v.data() + i / (rows / groups) * r * cols;
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t q = 0; q < r; ++q)
        want[i * cols + j].add((long double)(as_double(u[i * r + q])) * as_double(factor[q * cols + j]));
    s.visit(i, [&](int at, int j) { want[i * cols + j].add(as_double(s.values[at])); });
  }
  expect_near(w, want, name);
}

template <class T>
void check_all() {
  check_transpose<T>(33, 37, 40);
  check_transpose<T>(1, 5, 16);
  check_transpose<T>(64, 1, 64);
  for (const auto& [rows, cols, tokens, density] :
       {std::tuple{37, 53, 3, 0.2}, {1, 1, 1, 1.0}, {5, 300, 17, 1.0}, {9, 7, 4, 0.0}, {7, 0, 3, 0.0}}) {
    check_spmm<T>(rows, cols, tokens, density, true, true, 0);
    check_spmm<T>(rows, cols, tokens, density, true, false, 1);
    check_spmm<T>(rows, cols, tokens, density, false, true, 1);
    check_spmm<T>(rows, cols, tokens, density, false, false, 0);
  }
  // Several tiles in every direction, more than 32 nonzeros of a row in one tile, the last tile of one feature.
  check_spmm<T>(140, 129, 290, 0.3, false, true, 1);
  check_spmm<T>(3, 129, 40, 1.0, false, false, 0);
  check_spmm<T>(0, 5, 3, 0.0, false, false, 0);
  check_spmm<T>(5, 5, 0, 0.4, true, false, 0);
  check_sddmm<T>(7, 40, 96, 0.3);
  check_sddmm<T>(9, 21, 33, 0.5);
  check_sddmm<T>(5, 6, 0, 0.4);
  check_sddmm<T>(5, 6, 8, 0.0);
  // The tiled kernel: a last tile of one column, more than 8 nonzeros of a row in a tile, two chunks and a rest.
  const int64_t chunk = 2048 / int64_t(sizeof(T)), vec = 16 / int64_t(sizeof(T));
  check_sddmm<T>(16, 65, chunk / 4, 0.3);
  check_sddmm<T>(70, 20, chunk / 2 + vec, 1.0);
  check_sddmm<T>(17, 9, 2 * chunk + vec, 0.4);
  check_rebuild<T>(70, 67, 5, 1, 0.2);
  check_rebuild<T>(12, 9, 3, 3, 0.4);
  check_rebuild<T>(5, 130, 33, 1, 0.0);
  check_rebuild<T>(5, 130, 0, 1, 1.0);
  check_rebuild<T>(1, 1, 1, 1, 1.0);
  check_rebuild<T>(0, 4, 2, 1, 0.0);
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  check_all<testing::half>();
  check_all<testing::bf16>();
  return testing::finish();
}

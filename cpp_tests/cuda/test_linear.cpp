// The kernels of linear.cuh against sums in long double.
#include "testing_cuda.h"

namespace {

namespace cuda = cmd_ext::cuda;
using testing::Device;
using testing::RandomCsr;
using testing::Sum;

template <class T>
void check_spmm_few(int64_t rows, int64_t cols, int64_t tokens, double density) {
  const RandomCsr<float> s(rows, cols, density);
  const auto values = testing::random_values<T>(s.nnz()), x = testing::random_values<T>(tokens * cols);
  const Device<T> x_device(x), values_device(values);
  const Device<int32_t> row_ptr(s.row_ptr), col_idx(s.col_idx);
  const cuda::Csr<T> csr{rows, cols, s.nnz(), values_device, row_ptr, col_idx};
  const auto y = testing::for_all_schedules(
      [&] {
        const Device<T> out(tokens * rows);
        CHECK(cuda::spmm_few<T>(x_device, tokens, csr, nullptr, 0, out, nullptr) == cudaSuccess, rows, cols);
        return out.host();
      },
      "spmm_few");
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < rows; ++i) {
      Sum want;
      for (int k = s.row_ptr[i]; k < s.row_ptr[i + 1]; ++k)
        want.add((long double)(testing::as_double(values[k])) * testing::as_double(x[t * cols + s.col_idx[k]]));
      CHECK(testing::near(y[t * rows + i], want), "spmm_few", rows, cols, tokens, "at", t, i);
    }
}

}  // namespace

int main() {
  check_spmm_few<float>(37, 53, 3, 0.2);
  check_spmm_few<double>(37, 53, 16, 0.2);
  check_spmm_few<testing::half>(37, 53, 3, 0.2);
  check_spmm_few<testing::bf16>(37, 53, 3, 0.2);
  return testing::finish();
}

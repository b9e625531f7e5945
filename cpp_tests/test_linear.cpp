// sparse_linear and sddmm against double loops.
#include "testing_cpu.h"

namespace {

using testing::RandomCsr;
using testing::Sum;

template <class T>
void check_linear(int64_t batch, int64_t rows, int64_t cols, double density, bool with_bias) {
  const RandomCsr<T> s(rows, cols, density);
  const auto x = testing::random_vector<T>(batch * cols), before = testing::random_vector<T>(batch * rows);
  const auto bias = testing::random_vector<T>(with_bias ? rows : 0);

  std::vector<Sum> want(batch * rows);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < rows; ++i) {
      Sum& sum = want[b * rows + i];
      sum.add(before[b * rows + i]);
      if (with_bias) sum.add(bias[i]);
      for (int64_t k = s.row_ptr[i]; k < s.row_ptr[i + 1]; ++k)
        sum.add((long double)(s.values[k]) * x[b * cols + s.col_idx[k]]);
    }

  std::vector<T> first;
  for (const auto& [split, parallel_for] : testing::splits()) {
    std::vector<T> y = before;
    cmd_ext::cpu::sparse_linear(x.data(), batch, testing::csr_of(s), with_bias ? bias.data() : nullptr, y.data(),
                                parallel_for);
    if (first.empty()) first = y;
    CHECK(testing::close(y, want) && testing::same_bits(y, first), "sparse_linear float", 8 * sizeof(T), "batch", batch,
          rows, 'x', cols, "density", density, "bias", with_bias, split);
  }
}

template <class T>
void check_sddmm(int64_t m, int64_t n, int64_t k, double density) {
  const RandomCsr<T> pattern(m, n, density);
  const auto a = testing::random_vector<T>(m * k), b = testing::random_vector<T>(n * k);

  std::vector<Sum> want(pattern.nnz());
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = pattern.row_ptr[i]; p < pattern.row_ptr[i + 1]; ++p)
      for (int64_t j = 0; j < k; ++j) want[p].add((long double)(a[i * k + j]) * b[pattern.col_idx[p] * k + j]);

  std::vector<T> first;
  for (const auto& [split, parallel_for] : testing::splits()) {
    auto out = testing::poison<T>(pattern.nnz());
    cmd_ext::cpu::sddmm(a.data(), b.data(), k, testing::csr_of(pattern), out.data(), parallel_for);
    if (first.empty()) first = out;
    CHECK(testing::close(out, want) && testing::same_bits(out, first), "sddmm float", 8 * sizeof(T), m, 'x', n, "k", k,
          "density", density, split);
  }
}

template <class T>
void check_all() {
  // The batch selects the tile: 1, then up to 1, 2, 4 and 8 vectors, then several tiles with a remainder.
  for (int64_t batch : {0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 130})
    for (auto [rows, cols] : {std::pair{7, 96}, {40, 53}, {16, 1}, {1, 33}})
      for (double density : {0.0, 0.2, 1.0})
        for (bool with_bias : {false, true}) check_linear<T>(batch, rows, cols, density, with_bias);
  check_linear<T>(5, 0, 6, 0, false);
  check_linear<T>(5, 6, 0, 0, true);
  check_linear<T>(100, 517, 301, 0.1, true);

  for (int64_t k : {0, 1, 3, 4, 7, 8, 9, 31, 32, 33, 64, 100, 1001})
    for (auto [m, n] : {std::pair{7, 96}, {40, 53}, {1, 1}})
      for (double density : {0.0, 0.2, 1.0}) check_sddmm<T>(m, n, k, density);
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  return testing::finish_cpu();
}

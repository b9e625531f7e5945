// sparse_linear and sddmm against double loops.
#include "testing_cpu.h"

namespace {

using testing::RandomCsr;
using testing::Sum;

// A plan gives the bits of sparse_linear, for batches like those that it was made for alone.
template <class T>
void check_plan(const RandomCsr<T>& s, const std::vector<T>& x, int64_t batch, const std::vector<T>& bias,
                const std::vector<T>& before, const std::vector<T>& want,
                const cmd_ext::cpu::ParallelFor& parallel_for) {
  const bool few = batch <= cmd_ext::cpu::kFewSamples;
  for (bool is_for : {few, !few}) {
    const int64_t bytes = cmd_ext::cpu::plan_linear(testing::csr_of(s), is_for, nullptr, parallel_for);
    std::vector<char> storage(bytes + 63);
    char* memory = storage.data() + (64 - reinterpret_cast<uintptr_t>(storage.data()) % 64) % 64;
    cmd_ext::cpu::plan_linear(testing::csr_of(s), is_for, memory, parallel_for);
    cmd_ext::cpu::PlannedLinear sizes{};
    CHECK(cmd_ext::cpu::read_linear_plan(memory, bytes, sizes) && sizes.element == sizeof(T) && sizes.rows == s.rows &&
              sizes.cols == s.cols && !cmd_ext::cpu::read_linear_plan(memory, bytes - 1, sizes),
          "read_linear_plan", s.rows, 'x', s.cols);
    std::vector<T> y = before;
    const bool ran = cmd_ext::cpu::run_linear_plan(memory, x.data(), batch, bias.empty() ? nullptr : bias.data(),
                                                   y.data(), parallel_for);
    CHECK(ran == (is_for == few) && testing::same_bits(y, ran ? want : before), "run_linear_plan float", 8 * sizeof(T),
          "batch", batch, s.rows, 'x', s.cols, "few", is_for);
  }
}

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
    check_plan(s, x, batch, bias, before, y, parallel_for);
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
  // Several blocks of columns and of waiting rows, with a row that is all of a block.
  check_linear<T>(100, 1200, 301, 0.1, true);
  check_linear<T>(70, 40, 1301, 0.3, true);
  check_linear<T>(1, 40, 1301, 0.3, true);

  for (int64_t k : {0, 1, 3, 4, 7, 8, 9, 31, 32, 33, 64, 100, 1001})
    for (auto [m, n] : {std::pair{7, 96}, {40, 53}, {1, 1}})
      for (double density : {0.0, 0.2, 1.0}) check_sddmm<T>(m, n, k, density);
  check_sddmm<T>(1100, 601, 70, 0.05);
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  return testing::finish_cpu();
}

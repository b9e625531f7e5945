// topk_csr against a stable sort: exactly the same entries, bit for bit, also among ties, NaN, infinities and zeros;
// transpose_csr against a stable sort by column.
#include <numeric>

#include "testing_cpu.h"

namespace {

using cmd_ext::cpu::topk_csr;

template <class T>
using Limits = std::numeric_limits<T>;

template <class T>
struct Input {
  const char* name;
  T (*entry)(int64_t index);
};

template <class T>
std::vector<Input<T>> inputs() {
  return {
      {"random", [](int64_t) { return T(testing::uniform()); }},
      {"few distinct values", [](int64_t) { return T(std::round(testing::uniform() * 3)); }},
      {"all equal", [](int64_t) { return T(-2.5); }},
      {"zeros of both signs", [](int64_t i) { return i % 3 ? T(0) : T(-0.0); }},
      {"one last bit apart", [](int64_t i) { return T(1) + T(i * 37 % 64) * Limits<T>::epsilon(); }},
      {"subnormal", [](int64_t i) { return T(i * 29 % 101) * Limits<T>::denorm_min() * (i % 2 ? 1 : -1); }},
      {"whole range of exponents",
       [](int64_t i) { return std::ldexp(T(i % 2 ? 1 : -1), int(i * 7 % 200) - 100) * T(1 + i % 3); }},
      {"infinities and NaN",
       [](int64_t i) {
         if (i % 5 == 3) return i % 2 ? Limits<T>::infinity() : -Limits<T>::infinity();
         if (i % 7 == 6) return i % 2 ? Limits<T>::signaling_NaN() : -Limits<T>::quiet_NaN();
         return i % 11 ? T(testing::uniform()) : Limits<T>::max();
       }},
  };
}

// Inputs that a sample may misjudge: in a matrix of 2 x 10^5 entries, what is small for it is met by few of its draws.
template <class T>
std::vector<Input<T>> deceptive_inputs() {
  return {
      {"sorted", [](int64_t i) { return T(i); }},
      {"sorted backwards", [](int64_t i) { return T(-1) / T(i + 1); }},
      {"period of the sample", [](int64_t i) { return i % 185 ? T(testing::uniform()) : T(2 + testing::uniform()); }},
      {"constant blocks", [](int64_t i) { return T(i / 5000 * 7 % 13); }},
      {"one huge cluster", [](int64_t i) { return i % 50 ? T(1) : T(testing::uniform() * 3); }},
      {"two clusters, their border at a fifth", [](int64_t i) { return i % 5 ? T(1) : T(2); }},
      {"two clusters, narrow ones", [](int64_t i) { return T(1 + i % 2) + T(testing::uniform()) * T(1e-4); }},
      {"large entries in one stretch", [](int64_t i) { return T(testing::uniform()) * (i < 9000 ? T(100) : T(1)); }},
      {"large entries at the end", [](int64_t i) { return T(testing::uniform()) * (i < 165000 ? T(1) : T(100)); }},
      {"mostly zeros", [](int64_t i) { return i % 17 ? T(i % 2 ? 0.0 : -0.0) : T(testing::uniform()); }},
      {"mostly NaN", [](int64_t i) { return i % 9 ? Limits<T>::quiet_NaN() : T(testing::uniform()); }},
      {"heavy tail", [](int64_t) { return T(std::pow(testing::uniform(), -3)); }},
  };
}

template <class T>
void check_case(const Input<T>& input, int64_t m, int64_t n, int64_t nnz) {
  std::vector<T> a(m * n);
  for (int64_t i = 0; i < m * n; ++i) a[i] = input.entry(i);

  std::vector<int64_t> order(m * n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    const bool nan_i = std::isnan(a[i]), nan_j = std::isnan(a[j]);
    return nan_i != nan_j ? nan_i : std::abs(a[i]) > std::abs(a[j]);
  });
  std::sort(order.begin(), order.begin() + nnz);
  std::vector<T> want_values(nnz);
  std::vector<int32_t> want_row_ptr(m + 1), want_col_idx(nnz);
  for (int64_t k = 0; k < nnz; ++k) {
    want_values[k] = a[order[k]];
    want_col_idx[k] = int32_t(order[k] % n);
    ++want_row_ptr[order[k] / n + 1];
  }
  std::partial_sum(want_row_ptr.begin(), want_row_ptr.end(), want_row_ptr.begin());

  for (const auto& [split, parallel_for] : testing::splits())
    for (int threads : {1, 2, 5}) {
      cmd_ext::cpu::ParallelFor pool = parallel_for;
      pool.threads = threads;
      auto values = testing::poison<T>(nnz);
      std::vector<int32_t> row_ptr(m + 1, -1), col_idx(nnz, -1);
      topk_csr(a.data(), m, n, nnz, values.data(), row_ptr.data(), col_idx.data(), pool);
      CHECK(testing::same_bits(values, want_values) && row_ptr == want_row_ptr && col_idx == want_col_idx, input.name,
            "float", 8 * sizeof(T), m, 'x', n, "nnz", nnz, split, "threads", threads);
    }
}

template <class T>
void check_all() {
  for (const Input<T>& input : inputs<T>())
    for (auto [m, n] : {std::pair{1, 1}, {1, 50}, {50, 1}, {7, 96}, {33, 31}})
      for (int64_t nnz : {0, 1, m * n / 3, m * n - 1, m * n}) check_case(input, m, n, nnz);
  const Input<T> random = inputs<T>()[0], ties = inputs<T>()[1];
  check_case(random, 0, 5, 0);
  check_case(random, 5, 0, 0);
  for (const Input<T>& input : deceptive_inputs<T>())
    for (int64_t nnz : {1, 20, 5000, 20000, 50000, 99000}) check_case(input, 431, 407, nnz);
  // With and without a sample, with and without threads; rows that are short, and longer than a block.
  for (auto [m, n] : {std::pair{64, 64}, {113, 9}, {15000, 9}, {3, 50001}, {1, 140001}})
    for (const Input<T>& input : {random, ties})
      for (int64_t nnz : {1, m * n / 40, m * n / 20, m * n / 5, m * n / 2, m * n - 1, m * n})
        check_case(input, m, n, nnz);
}

// What the operator does before the selection.
template <class T>
void check_subtract() {
  for (int64_t count : {0, 1, 7, 140000}) {
    const auto w = testing::random_vector<T>(count), product = testing::random_vector<T>(count);
    std::vector<T> want(count);
    for (int64_t i = 0; i < count; ++i) want[i] = w[i] - product[i];
    for (const auto& [split, parallel_for] : testing::splits()) {
      auto got = product;
      cmd_ext::cpu::subtract_from(w.data(), count, got.data(), parallel_for);
      CHECK(testing::same_bits(got, want), "subtract_from", count, split);
    }
  }
}

void check_transpose(int64_t m, int64_t n, int64_t groups, double density) {
  const testing::RandomCsr<float> s(m, n, density);
  std::vector<int32_t> rows(s.nnz()), columns(s.nnz()), want_col_ptr(groups * n + 1), perm(s.nnz());
  for (int64_t i = 0; i < m; ++i)
    for (int32_t k = s.row_ptr[i]; k < s.row_ptr[i + 1]; ++k) {
      rows[k] = int32_t(i);
      columns[k] = int32_t(i / (m / groups) * n + s.col_idx[k]);
      ++want_col_ptr[columns[k] + 1];
    }
  std::partial_sum(want_col_ptr.begin(), want_col_ptr.end(), want_col_ptr.begin());
  std::vector<int32_t> want_perm(s.nnz());
  std::iota(want_perm.begin(), want_perm.end(), 0);
  std::stable_sort(want_perm.begin(), want_perm.end(), [&](int32_t a, int32_t b) { return columns[a] < columns[b]; });

  std::vector<int32_t> col_ptr(groups * n + 1, -1), row_idx(s.nnz(), -1);
  cmd_ext::cpu::transpose_csr(s.row_ptr.data(), s.col_idx.data(), m, n, groups, col_ptr.data(), row_idx.data(),
                              perm.data());
  CHECK(col_ptr == want_col_ptr && perm == want_perm, "transpose_csr", m, n, groups, density);
  bool same = true;
  for (int64_t k = 0; k < s.nnz(); ++k) same &= row_idx[k] == rows[want_perm[k]];
  CHECK(same, "transpose_csr, rows", m, n, groups, density);
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  check_subtract<float>();
  check_subtract<double>();
  for (double density : {0.0, 0.2, 1.0}) {
    check_transpose(30, 17, 1, density);
    check_transpose(30, 17, 5, density);
    check_transpose(1, 9, 1, density);
    check_transpose(9, 1, 9, density);
    check_transpose(0, 4, 1, density);
    check_transpose(4, 0, 1, density);
  }
  return testing::finish_cpu();
}

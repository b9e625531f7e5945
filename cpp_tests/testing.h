// What the kernel tests share: CHECK and the closing line, random data, error bounds.
// Buffers are vectors of exactly the size that the kernel may touch, so AddressSanitizer sees any access beyond.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace testing {

inline int passed = 0, failed = 0;

// CHECK(condition, part, part, ...): the parts say which case failed.
template <class... Parts>
void check(bool ok, const char* condition, const char* file, int line, const Parts&... parts) {
  ++(ok ? passed : failed);
  if (ok) return;
  std::cerr << file << ':' << line << ": " << condition << " is false for";
  ((std::cerr << ' ' << parts), ...);
  std::cerr << '\n';
}
#define CHECK(condition, ...) testing::check(condition, #condition, __FILE__, __LINE__, __VA_ARGS__)

// Prints the closing line and returns the exit status of main.
inline int finish() {
  std::cout << passed << " passed, " << failed << " failed\n";
  return failed == 0 ? 0 : 1;
}

inline std::mt19937& engine() {
  static std::mt19937 generator(0);
  return generator;
}

// Uniform in [-1, 1).
inline double uniform() { return double(engine()()) / 2147483648.0 - 1; }

template <class T>
std::vector<T> random_vector(int64_t count) {
  std::vector<T> out(count);
  for (T& value : out) value = T(uniform());
  return out;
}

template <class T>
std::vector<T> poison(int64_t count) {
  return std::vector<T>(count, std::numeric_limits<T>::quiet_NaN());
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// An oracle's entry: the exact sum, the sum of magnitudes and the number of terms, which bound any order of summation.
struct Sum {
  long double value = 0, magnitude = 0;
  int64_t terms = 0;
  void add(long double term) { value += term, magnitude += std::abs(term), ++terms; }
};

template <class T>
bool close(const std::vector<T>& got, const std::vector<Sum>& want) {
  if (got.size() != want.size()) return false;
  for (size_t i = 0; i < got.size(); ++i) {
    const long double bound = (want[i].terms + 1) * want[i].magnitude * std::numeric_limits<T>::epsilon();
    if (!(std::abs(got[i] - want[i].value) <= bound)) return false;
  }
  return true;
}

// A random support with about `density` of the entries; the arrays are exactly sized. Rows 3, 7, 11 .. are empty.
template <class T>
struct RandomCsr {
  int64_t rows, cols;
  std::vector<int32_t> row_ptr{0}, col_idx;
  std::vector<T> values;

  RandomCsr(int64_t rows, int64_t cols, double density) : rows(rows), cols(cols) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j)
        if (density == 1 || (i % 4 != 3 && (uniform() + 1) / 2 < density)) col_idx.push_back(int32_t(j));
      row_ptr.push_back(int32_t(col_idx.size()));
    }
    row_ptr.shrink_to_fit();
    col_idx.shrink_to_fit();
    values = random_vector<T>(nnz());
  }
  int64_t nnz() const { return int64_t(col_idx.size()); }
};

}  // namespace testing

// topk_csr: the exactly nnz largest |a| of a matrix, straight into CSR; transpose_csr: its support by columns.
//
// Magnitudes of IEEE numbers order like their bit patterns without the sign, so the nnz-th largest is found by radix
// select: one histogram of the top 11 bits, then of the next 11 bits of the elements that share the winning prefix,
// and so on (3 passes for float, 6 for double). Each pass reads the matrix once and writes nothing; torch.topk, the
// alternative, materialises indices and sorts. Two more reads count and write the rows. Bytes: 5 reads of a (float).
// Every thread fills its own histogram, so the result does not depend on the number of threads.
//
// The transpose is a counting sort by column: two passes over the nonzeros in their order, which makes it stable.
#include <algorithm>
#include <array>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace cmd_ext::cpu {
namespace {

constexpr int kDigitBits = 11, kBuckets = 1 << kDigitBits;
constexpr int64_t kChunk = 1 << 16;
using Histogram = std::array<int64_t, kBuckets>;

template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
  static constexpr type nan = 0x7f800001;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
  static constexpr type nan = 0x7ff0000000000001;
};
template <class T>
using Key = typename KeyOf<T>::type;

template <class T>
SIMD_INLINE Key<T> magnitude_key(T value) {
  Key<T> bits;
  std::memcpy(&bits, &value, sizeof bits);
  return std::min(bits & (~Key<T>(0) >> 1), KeyOf<T>::nan);  // all NaN tie, whatever their payload
}

// Counts the digit in bits [low, high) of all keys whose bits from `high` on are `prefix`.
template <class T>
Histogram count_digits(const T* a, int64_t count, int low, int high, Key<T> prefix, const ParallelFor& parallel_for) {
  const Key<T> mask = (Key<T>(1) << (high - low)) - 1;
  const bool all = high == int(8 * sizeof(T));
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  const int64_t parts = std::min<int64_t>(chunks, 16);
  std::vector<Histogram> partial(parts, Histogram{});
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Histogram& histogram = partial[part];
      const int64_t first = chunks * part / parts * kChunk;
      const int64_t last = std::min(count, chunks * (part + 1) / parts * kChunk);
      for (int64_t i = first; i < last; ++i) {
        const Key<T> key = magnitude_key(a[i]);
        if (all || (key >> high) == prefix) ++histogram[(key >> low) & mask];
      }
    }
  });
  Histogram total{};
  for (const Histogram& histogram : partial)
    for (int b = 0; b < kBuckets; ++b) total[b] += histogram[b];
  return total;
}

// The key of the nnz-th largest magnitude (1 <= nnz <= count).
template <class T>
Key<T> select_key(const T* a, int64_t count, int64_t nnz, const ParallelFor& parallel_for) {
  constexpr int kKeyBits = 8 * sizeof(T);
  Key<T> prefix = 0;
  int64_t wanted = nnz;
  for (int high = kKeyBits; high > 0;) {
    const int low = std::max(0, high - kDigitBits);
    const Histogram histogram = count_digits(a, count, low, high, prefix, parallel_for);
    int bucket = (1 << (high - low)) - 1;
    while (histogram[bucket] < wanted) wanted -= histogram[bucket--];
    prefix = (prefix << (high - low)) | Key<T>(bucket);
    high = low;
  }
  return prefix;
}

}  // namespace

template <class T>
void topk_csr(const T* a, int64_t m, int64_t n, int64_t nnz, T* values, int32_t* row_ptr, int32_t* col_idx,
              const ParallelFor& parallel_for) {
  std::fill(row_ptr, row_ptr + m + 1, 0);
  if (nnz == 0) return;
  const Key<T> threshold = select_key(a, m * n, nnz, parallel_for);

  std::vector<int64_t> above(m), equal(m);
  const int64_t row_grain = std::max<int64_t>(1, (1 << 15) / n);
  parallel_for(m, row_grain, [&](int64_t begin, int64_t end) {
    simd::run([&] SIMD_LAMBDA() {
      for (int64_t i = begin; i < end; ++i) {
        int64_t more = 0, same = 0;
        for (int64_t j = 0; j < n; ++j) {
          const Key<T> key = magnitude_key(a[i * n + j]);
          more += key > threshold;
          same += key == threshold;
        }
        above[i] = more;
        equal[i] = same;
      }
    });
  });

  int64_t ties = nnz;
  for (int64_t i = 0; i < m; ++i) ties -= above[i];
  for (int64_t i = 0; i < m; ++i) {
    equal[i] = std::min(equal[i], ties);  // ties go to the lower linear index
    ties -= equal[i];
    row_ptr[i + 1] = int32_t(row_ptr[i] + above[i] + equal[i]);
  }

  parallel_for(m, row_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t out = row_ptr[i], quota = equal[i];
      for (int64_t j = 0; out < row_ptr[i + 1]; ++j) {
        const T value = a[i * n + j];
        const Key<T> key = magnitude_key(value);
        if (key < threshold || (key == threshold && quota-- <= 0)) continue;
        values[out] = value;
        col_idx[out++] = int32_t(j);
      }
    }
  });
}

template void topk_csr(const float*, int64_t, int64_t, int64_t, float*, int32_t*, int32_t*, const ParallelFor&);
template void topk_csr(const double*, int64_t, int64_t, int64_t, double*, int32_t*, int32_t*, const ParallelFor&);

void transpose_csr(const int32_t* row_ptr, const int32_t* col_idx, int64_t m, int64_t n, int64_t groups,
                   int32_t* col_ptr, int32_t* row_idx, int32_t* perm) {
  std::fill(col_ptr, col_ptr + groups * n + 1, 0);
  const int64_t rows = m / groups;
  for (int64_t i = 0; i < m; ++i)
    for (int32_t k = row_ptr[i]; k < row_ptr[i + 1]; ++k) ++col_ptr[i / rows * n + col_idx[k] + 1];
  for (int64_t c = 0; c < groups * n; ++c) col_ptr[c + 1] += col_ptr[c];
  std::vector<int32_t> next(col_ptr, col_ptr + groups * n);
  for (int64_t i = 0; i < m; ++i)
    for (int32_t k = row_ptr[i]; k < row_ptr[i + 1]; ++k) {
      const int32_t place = next[i / rows * n + col_idx[k]]++;
      row_idx[place] = int32_t(i);
      perm[place] = k;
    }
}

}  // namespace cmd_ext::cpu

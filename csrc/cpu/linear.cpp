// sparse_linear: y += bias + x S^T;  sddmm: out = (a b^T) at the positions of S.
//
// sparse_linear geometry: samples are the lanes. A tile of samples is transposed once into xt [cols][tile], so that
// each nonzero costs one broadcast and one contiguous FMA per vector, with the sums of a row in registers; rows are
// dealt to the threads by nonzeros. Per tile: reads cols * tile of x, 8 bytes per nonzero, 2 * nnz * tile operations.
//   - 1 sample: no transpose; 8 values at a time meet 8 x, gathered by scalar loads (gather instructions and 16-bit
//     columns are no faster). Bound by L3 or memory.
//   - up to kFewSamples: 1 to 4 vectors, whole rows of S; several nonzeros at a time, as the latency of the FMA asks
//     for 8 sums under way. The tile is in L2; blocks of it would break rows into runs of a few nonzeros.
//   - more: tiles of 8 vectors, which an FMA uses once, so they are walked in blocks of columns that stay near, each by
//     all rows, whose sums meanwhile wait. S is laid out in that order first (8 bytes per nonzero): walking the CSR in
//     blocks is not sequential, which costs more than the copy. A plan keeps it.
// sddmm is the same walk with xt for b: 8 vectors of a row of `a` stay in registers, a nonzero is 8 FMAs, and 8 of them
// are summed over the lanes together.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "lanes.h"
#include "simd.h"

namespace cmd_ext::cpu {
namespace {

using simd::kLanes;
using simd::Vec;
namespace lanes = SIMD_NAMESPACE::lanes;

constexpr int64_t kGrainOps = 1 << 15;
constexpr int64_t kRowBlock = 512;         // rows whose sums wait together
constexpr int64_t kBlockBytes = 64 << 10;  // of xt

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <class T>
std::unique_ptr<T[], Free> aligned(int64_t count) {
  return std::unique_ptr<T[], Free>(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))));
}

int64_t row_grain(int64_t rows, int64_t operations) {
  return std::max<int64_t>(16, rows * kGrainOps / std::max<int64_t>(operations, 1));
}

// body(begin, end) over the rows of S in pieces of like work: a row counts as its nonzeros and one more.
template <class T, class Body>
void for_rows(const Csr<T>& s, int64_t operations_each, const ParallelFor& parallel_for, const Body& body) {
  const auto first_from = [&](int64_t work) {
    int64_t low = 0, high = s.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      s.row_ptr[middle] + middle < work ? low = middle + 1 : high = middle;
    }
    return low;
  };
  parallel_for(s.nnz() + s.rows, std::max<int64_t>(16, kGrainOps / operations_each), [&](int64_t begin, int64_t end) {
    const int64_t first = first_from(begin), last = first_from(end);
    if (first < last) body(first, last);
  });
}

// sum of values[k] * x[col_idx[k]] over `count` nonzeros
template <class T>
SIMD_INLINE T sparse_dot(const T* values, const int32_t* col_idx, int64_t count, const T* x) {
  constexpr int kWidth = kLanes<T>;
  constexpr int64_t kAhead = 256;
  Vec<T> acc[2] = {};
  int64_t k = 0;
  for (; k + 2 * kWidth <= count; k += 2 * kWidth) {
    __builtin_prefetch(values + k + kAhead);
    __builtin_prefetch(col_idx + k + kAhead);
    for (int j = 0; j < 2; ++j) {
      const int32_t* c = col_idx + k + j * kWidth;
      if constexpr (kWidth == 8)
        acc[j] += Vec<T>{x[c[0]], x[c[1]], x[c[2]], x[c[3]], x[c[4]], x[c[5]], x[c[6]], x[c[7]]} *
                  simd::load(values + k + j * kWidth);
      else
        acc[j] += Vec<T>{x[c[0]], x[c[1]], x[c[2]], x[c[3]]} * simd::load(values + k + j * kWidth);
    }
  }
  T total = simd::sum<T>(acc[0] + acc[1]);
  for (; k < count; ++k) total += values[k] * x[col_idx[k]];
  return total;
}

template <class T>
void linear_one(const T* x, const Csr<T>& s, const T* bias, T* y, const ParallelFor& parallel_for) {
  for_rows(s, 2, parallel_for, [&](int64_t begin, int64_t end) {
    simd::run([&] SIMD_LAMBDA() {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = s.row_ptr[i];
        y[i] += sparse_dot(s.values + k, s.col_idx + k, s.row_ptr[i + 1] - k, x) + (bias ? bias[i] : T(0));
      }
    });
  });
}

// Columns [begin, end) of xt [cols][tile] <- x [samples][cols] transposed, missing samples as zeros.
template <class T>
SIMD_INLINE void pack_columns(const T* x, int64_t samples, int64_t cols, int64_t tile, int64_t begin, int64_t end,
                              T* xt) {
  constexpr int64_t kWidth = kLanes<T>;
  int64_t c = begin;
  for (; c + kWidth <= end; c += kWidth)
    for (int64_t b = 0; b < tile; b += kWidth) {
      Vec<T> r[kWidth];
      for (int64_t l = 0; l < kWidth; ++l) r[l] = b + l < samples ? simd::load(x + (b + l) * cols + c) : Vec<T>{};
      lanes::transpose<T>(r);
      for (int64_t l = 0; l < kWidth; ++l) simd::store(xt + (c + l) * tile + b, r[l]);
    }
  for (; c < end; ++c)
    for (int64_t b = 0; b < tile; ++b) xt[c * tile + b] = b < samples ? x[b * cols + c] : T(0);
}

// y [samples][stride] += bias + sums [rows][tile] transposed, for `rows` rows.
template <class T>
SIMD_INLINE void unpack_rows(const T* sums, int64_t rows, int64_t tile, int64_t samples, const T* bias, T* y,
                             int64_t stride) {
  constexpr int64_t kWidth = kLanes<T>;
  int64_t i = 0;
  for (; i + kWidth <= rows; i += kWidth) {
    const Vec<T> shift = bias ? simd::load(bias + i) : Vec<T>{};
    for (int64_t b = 0; b < samples; b += kWidth) {
      Vec<T> r[kWidth];
      for (int64_t l = 0; l < kWidth; ++l) r[l] = simd::load(sums + (i + l) * tile + b);
      lanes::transpose<T>(r);
      for (int64_t l = 0; l < std::min(kWidth, samples - b); ++l) {
        T* out = y + (b + l) * stride + i;
        simd::store(out, simd::load(out) + (r[l] + shift));
      }
    }
  }
  for (; i < rows; ++i)
    for (int64_t b = 0; b < samples; ++b) y[b * stride + i] += sums[i * tile + b] + (bias ? bias[i] : T(0));
}

// Rows of y by whole rows of S, for tiles narrower than 8 vectors.
template <class T, int kVecs>
SIMD_INLINE void rows_of_tile(const T* xt, int64_t samples, const Csr<T>& s, const T* bias, T* y, int64_t begin,
                              int64_t end) {
  constexpr int kWidth = kLanes<T>, kTile = kVecs * kWidth, kChains = kVecs >= 8 ? 1 : kVecs == 4 ? 2 : 4;
  constexpr int64_t kRows = 32;
  alignas(64) T sums[kRows * kTile];
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t count = std::min(kRows, end - first);
    for (int64_t i = 0; i < count; ++i) {
      Vec<T> acc[kChains][kVecs] = {};
      const auto add = [&](int64_t at, Vec<T>* to) __attribute__((always_inline)) {
        const T* column = xt + int64_t(s.col_idx[at]) * kTile;
        const T value = s.values[at];
        for (int j = 0; j < kVecs; ++j) to[j] += value * simd::load(column + j * kWidth);
      };
      const int64_t stop = s.row_ptr[first + i + 1];
      int64_t k = s.row_ptr[first + i];
      for (; k + kChains <= stop; k += kChains)
        for (int c = 0; c < kChains; ++c) add(k + c, acc[c]);
      for (; k < stop; ++k) add(k, acc[0]);
      for (int c = 1; c < kChains; ++c)
        for (int j = 0; j < kVecs; ++j) acc[0][j] += acc[c][j];
      for (int j = 0; j < kVecs; ++j) simd::store(sums + i * kTile + j * kWidth, acc[0][j]);
    }
    unpack_rows(sums, count, kTile, samples, bias ? bias + first : nullptr, y + first, s.rows);
  }
}

template <class T, int kVecs>
void linear_narrow(const T* x, int64_t batch, const Csr<T>& s, const T* bias, T* y, const ParallelFor& parallel_for) {
  constexpr int64_t kTile = kVecs * kLanes<T>;
  const auto xt = aligned<T>(s.cols * kTile);
  parallel_for(s.cols, kGrainOps / kTile, [&](int64_t begin, int64_t end) {
    simd::run([&] SIMD_LAMBDA() { pack_columns(x, batch, s.cols, kTile, begin, end, xt.get()); });
  });
  for_rows(s, 2 * kTile, parallel_for, [&](int64_t begin, int64_t end) {
    simd::run([&] SIMD_LAMBDA() { rows_of_tile<T, kVecs>(xt.get(), batch, s, bias, y, begin, end); });
  });
}

template <class T>
struct Entry {
  T value;
  uint32_t offset;  // of its column in a block of xt
};

// S by blocks of kCols columns, in each by rows: entries of row i in block b are [ptr[b * rows + i], ptr[.. + 1]).
template <class T>
struct Blocks {
  static constexpr int64_t kTile = 8 * kLanes<T>, kCols = kBlockBytes / int64_t(sizeof(T)) / kTile;
  static int64_t count(int64_t cols) { return (cols + kCols - 1) / kCols; }
  Entry<T>* entries;
  uint32_t* ptr;
};

template <class T>
void fill_blocks(const Csr<T>& s, const Blocks<T>& blocks, const ParallelFor& parallel_for) {
  constexpr int64_t kCols = Blocks<T>::kCols;
  const int64_t count = Blocks<T>::count(s.cols);
  uint32_t* const ptr = blocks.ptr;
  std::fill_n(ptr, count * s.rows + 1, 0u);
  for_rows(s, 2, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t k = s.row_ptr[i]; k < s.row_ptr[i + 1]; ++k) ++ptr[s.col_idx[k] / kCols * s.rows + i + 1];
  });
  for (int64_t i = 0; i < count * s.rows; ++i) ptr[i + 1] += ptr[i];
  for_rows(s, 2, parallel_for, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> next(count);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t b = 0; b < count; ++b) next[b] = ptr[b * s.rows + i];
      for (int64_t k = s.row_ptr[i]; k < s.row_ptr[i + 1]; ++k) {
        const uint32_t column = uint32_t(s.col_idx[k]);
        blocks.entries[next[column / kCols]++] = {s.values[k], column % uint32_t(kCols) * uint32_t(Blocks<T>::kTile)};
      }
    }
  });
}

// sums [kRowBlock][tile] of rows [begin, end), one block of columns after another.
template <class T>
SIMD_INLINE void rows_by_blocks(const T* xt, const Blocks<T>& blocks, int64_t rows, int64_t cols, int64_t begin,
                                int64_t end, T* sums) {
  constexpr int kVecs = 8, kWidth = kLanes<T>;
  for (int64_t b = 0; b * Blocks<T>::kCols < cols; ++b) {
    const T* block = xt + b * Blocks<T>::kCols * Blocks<T>::kTile;
    const uint32_t* ptr = blocks.ptr + b * rows;
    for (int64_t i = begin; i < end; ++i) {
      T* sum = sums + (i - begin) * Blocks<T>::kTile;
      const Entry<T>*entry = blocks.entries + ptr[i], *stop = blocks.entries + ptr[i + 1];
      Vec<T> acc[kVecs];
      for (int j = 0; j < kVecs; ++j) acc[j] = b == 0 ? Vec<T>{} : simd::load(sum + j * kWidth);
      for (; entry < stop; ++entry) {
        const T* column = block + entry->offset;
        for (int j = 0; j < kVecs; ++j) acc[j] += entry->value * simd::load(column + j * kWidth);
      }
      for (int j = 0; j < kVecs; ++j) simd::store(sum + j * kWidth, acc[j]);
    }
  }
}

template <class T>
void linear_wide(const T* x, int64_t batch, const Csr<T>& s, const Blocks<T>& blocks, const T* bias, T* y,
                 const ParallelFor& parallel_for) {
  constexpr int64_t kTile = Blocks<T>::kTile;
  const auto xt = aligned<T>(s.cols * kTile);
  for (int64_t b = 0; b < batch; b += kTile) {
    const int64_t samples = std::min(kTile, batch - b);
    parallel_for(s.cols, kGrainOps / kTile, [&](int64_t begin, int64_t end) {
      simd::run([&] SIMD_LAMBDA() { pack_columns(x + b * s.cols, samples, s.cols, kTile, begin, end, xt.get()); });
    });
    for_rows(s, 2 * kTile, parallel_for, [&](int64_t begin, int64_t end) {
      const auto sums = aligned<T>(std::min(kRowBlock, end - begin) * kTile);
      simd::run([&] SIMD_LAMBDA() {
        for (int64_t first = begin; first < end; first += kRowBlock) {
          const int64_t last = std::min(end, first + kRowBlock);
          rows_by_blocks(xt.get(), blocks, s.rows, s.cols, first, last, sums.get());
          unpack_rows(sums.get(), last - first, kTile, samples, bias ? bias + first : nullptr, y + b * s.rows + first,
                      s.rows);
        }
      });
    });
  }
}

// out[p] (+)= a_i . b_c over one tile of k, for `count` nonzeros p of row i. The sums over lanes of kWidth nonzeros are
// taken together, by a transpose.
template <class T, int kVecs>
SIMD_INLINE void add_products(const Vec<T>* row, const T* bt, const int32_t* col_idx, int64_t count, bool first,
                              T* out) {
  constexpr int64_t kWidth = kLanes<T>, kTile = kVecs * kWidth;
  for (int64_t p = 0; p < count; p += kWidth) {
    const int64_t some = std::min(kWidth, count - p);
    alignas(64) T parts[kWidth * kWidth];
    for (int64_t l = 0; l < some; ++l) {
      const T* column = bt + int64_t(col_idx[p + l]) * kTile;
      Vec<T> sum[2] = {row[0] * simd::load(column)};
      for (int j = 1; j < kVecs; ++j) sum[j % 2] += row[j] * simd::load(column + j * kWidth);
      simd::store(parts + l * kWidth, sum[0] + sum[1]);
    }
    Vec<T> r[kWidth];
    for (int64_t l = 0; l < kWidth; ++l) r[l] = l < some ? simd::load(parts + l * kWidth) : Vec<T>{};
    lanes::transpose<T>(r);
    for (int64_t step = kWidth / 2; step > 0; step /= 2)
      for (int64_t l = 0; l < step; ++l) r[l] += r[l + step];
    if (some == kWidth) {
      simd::store(out + p, first ? r[0] : simd::load(out + p) + r[0]);
    } else {
      simd::store(parts, r[0]);
      for (int64_t l = 0; l < some; ++l) out[p + l] = first ? parts[l] : out[p + l] + parts[l];
    }
  }
}

// One tile of k: at `a` and bt [cols][tile], the first `length` of its columns are there, the rest of bt is zero.
template <class T, int kVecs>
SIMD_INLINE void sddmm_tile(const T* a, int64_t k, int64_t length, const T* bt, const Csr<T>& s, bool first_tile,
                            int64_t begin, int64_t end, T* out) {
  constexpr int64_t kWidth = kLanes<T>, kTile = kVecs * kWidth, kCols = kBlockBytes / int64_t(sizeof(T)) / kTile;
  int64_t next[kRowBlock];
  for (int64_t first = begin; first < end; first += kRowBlock) {
    const int64_t count = std::min(kRowBlock, end - first);
    std::copy_n(s.row_ptr + first, count, next);
    for (int64_t block = 0; block < s.cols; block += kCols) {
      const int64_t last = block + kCols < s.cols ? block + kCols : int64_t(INT32_MAX) + 1;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t ahead = next[std::min(i + 8, count - 1)];  // where no hardware prefetch looks
        __builtin_prefetch(s.col_idx + ahead);
        __builtin_prefetch(out + ahead, 1);
        const int64_t start = next[i], row_end = s.row_ptr[first + i + 1];
        int64_t stop = start;
        while (stop < row_end && s.col_idx[stop] < last) ++stop;
        if (stop == start) continue;
        next[i] = stop;
        Vec<T> row[kVecs];
        const T* source = a + (first + i) * k;
        if (length == kTile) {
          for (int j = 0; j < kVecs; ++j) row[j] = simd::load(source + j * kWidth);
        } else {
          T padded[kTile] = {};
          std::copy_n(source, length, padded);
          for (int j = 0; j < kVecs; ++j) row[j] = simd::load(padded + j * kWidth);
        }
        add_products<T, kVecs>(row, bt, s.col_idx + start, stop - start, first_tile, out + start);
      }
    }
  }
}

template <class T, int kVecs>
void sampled_product(const T* a, const T* b, int64_t k, const Csr<T>& s, T* out, const ParallelFor& parallel_for) {
  constexpr int64_t kTile = kVecs * kLanes<T>;
  const auto bt = aligned<T>(s.cols * kTile);
  for (int64_t first = 0; first < k; first += kTile) {
    const int64_t length = std::min(kTile, k - first);
    parallel_for(s.cols, kGrainOps / kTile, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        std::fill_n(std::copy_n(b + c * k + first, length, bt.get() + c * kTile), kTile - length, T(0));
    });
    for_rows(s, 2 * kTile, parallel_for, [&](int64_t begin, int64_t end) {
      simd::run(
          [&] SIMD_LAMBDA() { sddmm_tile<T, kVecs>(a + first, k, length, bt.get(), s, first == 0, begin, end, out); });
    });
  }
}

template <class T>
void linear_few(const T* x, int64_t batch, const Csr<T>& s, const T* bias, T* y, const ParallelFor& parallel_for) {
  constexpr int kWidth = kLanes<T>;
  if (batch == 1) return linear_one(x, s, bias, y, parallel_for);
  if (batch <= kWidth) return linear_narrow<T, 1>(x, batch, s, bias, y, parallel_for);
  if (batch <= 2 * kWidth) return linear_narrow<T, 2>(x, batch, s, bias, y, parallel_for);
  if (batch <= 4 * kWidth) return linear_narrow<T, 4>(x, batch, s, bias, y, parallel_for);
  linear_narrow<T, kFewSamples / kWidth>(x, batch, s, bias, y, parallel_for);
}

constexpr int64_t kMagic = 0x636d645f6c696e31;

struct Header {
  int64_t magic, bytes, few;
  PlannedLinear sizes;
  int64_t nnz;
};

// The arrays of a plan, in the memory behind its header: for few samples S as it is, else its blocks.
template <class T>
struct Plan {
  Header* head;
  int32_t *row_ptr, *col_idx;
  T* values;
  Blocks<T> blocks;
  int64_t size;

  Plan(void* memory, const Header& h) : head(static_cast<Header*>(memory)) {
    char* at = static_cast<char*>(memory) + lanes::round_up(sizeof(Header), 64);
    const auto take = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(at);
      at += lanes::round_up(count * int64_t(sizeof(*array)), 64);
    };
    take(row_ptr, h.sizes.rows + 1);
    take(col_idx, h.few ? h.nnz : 0);
    take(values, h.few ? h.nnz : 0);
    take(blocks.entries, h.few ? 0 : h.nnz);
    take(blocks.ptr, h.few ? 0 : Blocks<T>::count(h.sizes.cols) * h.sizes.rows + 1);
    size = at - static_cast<char*>(memory);
  }
  Csr<T> csr() const { return {head->sizes.rows, head->sizes.cols, values, row_ptr, col_idx}; }
};

}  // namespace

template <class T>
void sparse_linear(const T* x, int64_t batch, const Csr<T>& s, const T* bias, T* y, const ParallelFor& parallel_for) {
  if (batch <= kFewSamples) return linear_few(x, batch, s, bias, y, parallel_for);
  const auto entries = aligned<Entry<T>>(s.nnz());
  const auto ptr = aligned<uint32_t>(Blocks<T>::count(s.cols) * s.rows + 1);
  const Blocks<T> blocks{entries.get(), ptr.get()};
  fill_blocks(s, blocks, parallel_for);
  linear_wide(x, batch, s, blocks, bias, y, parallel_for);
}

template <class T>
int64_t plan_linear(const Csr<T>& s, bool few, void* memory, const ParallelFor& parallel_for) {
  Header head{kMagic, 0, few, {sizeof(T), s.rows, s.cols}, s.nnz()};
  head.bytes = Plan<T>(nullptr, head).size;
  if (!memory) return head.bytes;
  const Plan<T> plan(memory, head);
  *plan.head = head;
  std::copy_n(s.row_ptr, s.rows + 1, plan.row_ptr);
  if (few) {
    std::copy_n(s.col_idx, head.nnz, plan.col_idx);
    std::copy_n(s.values, head.nnz, plan.values);
  } else {
    fill_blocks(s, plan.blocks, parallel_for);
  }
  return head.bytes;
}

bool read_linear_plan(const void* memory, int64_t bytes, PlannedLinear& sizes) {
  Header head;
  if (bytes < int64_t(sizeof head)) return false;
  std::memcpy(&head, memory, sizeof head);
  sizes = head.sizes;
  return head.magic == kMagic && head.bytes == bytes;
}

template <class T>
bool run_linear_plan(const void* memory, const T* x, int64_t batch, const T* bias, T* y,
                     const ParallelFor& parallel_for) {
  const Header& head = *static_cast<const Header*>(memory);
  if (bool(head.few) != (batch <= kFewSamples)) return false;
  const Plan<T> plan(const_cast<void*>(memory), head);
  if (head.few)
    linear_few(x, batch, plan.csr(), bias, y, parallel_for);
  else
    linear_wide(x, batch, plan.csr(), plan.blocks, bias, y, parallel_for);
  return true;
}

template <class T>
void sddmm(const T* a, const T* b, int64_t k, const Csr<T>& pattern, T* out, const ParallelFor& parallel_for) {
  constexpr int kWidth = kLanes<T>;
  if (k == 0) return std::fill_n(out, pattern.nnz(), T(0)), void();
  if (k <= kWidth) return sampled_product<T, 1>(a, b, k, pattern, out, parallel_for);
  if (k <= 2 * kWidth) return sampled_product<T, 2>(a, b, k, pattern, out, parallel_for);
  if (k <= 4 * kWidth) return sampled_product<T, 4>(a, b, k, pattern, out, parallel_for);
  sampled_product<T, 8>(a, b, k, pattern, out, parallel_for);
}

template <class T>
void add_sparse(const Csr<T>& s, T* w, const ParallelFor& parallel_for) {
  parallel_for(s.rows, row_grain(s.rows, s.nnz()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t p = s.row_ptr[i]; p < s.row_ptr[i + 1]; ++p) w[i * s.cols + s.col_idx[p]] += s.values[p];
  });
}

#define INSTANTIATE(T)                                                                             \
  template int64_t plan_linear(const Csr<T>&, bool, void*, const ParallelFor&);                    \
  template bool run_linear_plan(const void*, const T*, int64_t, const T*, T*, const ParallelFor&); \
  template void sparse_linear(const T*, int64_t, const Csr<T>&, const T*, T*, const ParallelFor&); \
  template void add_sparse(const Csr<T>&, T*, const ParallelFor&);                                 \
  template void sddmm(const T*, const T*, int64_t, const Csr<T>&, T*, const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace cmd_ext::cpu

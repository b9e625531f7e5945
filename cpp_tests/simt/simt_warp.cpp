// What the warp operations compute, from the data of the active lanes.
#include "simt_internal.h"

namespace simt {

namespace {

template <class T>
T& word(Lanes& data, int lane) {
  return *static_cast<T*>(data[lane]);
}

template <class Body>
void for_lanes(uint32_t active, const Body& body) {
  for (int lane = 0; lane < 32; ++lane)
    if (active >> lane & 1) body(lane);
}

template <class T, class F>
void reduce(Lanes& data, uint32_t active, const F& f) {
  T result = word<T>(data, __builtin_ctz(active));
  for_lanes(active & (active - 1), [&](int lane) { result = f(result, word<T>(data, lane)); });
  for_lanes(active, [&](int lane) { word<T>(data, lane) = result; });
}

}  // namespace

void shuffle(Lanes& data, uint32_t active) {
  uint64_t values[32];
  for_lanes(active, [&](int lane) { values[lane] = word<Shuffle>(data, lane).value; });
  for_lanes(active, [&](int lane) {
    Shuffle& own = word<Shuffle>(data, lane);
    if (active >> own.source & 1) {
      own.value = values[own.source];
      return;
    }
    own.value = 0x7ff7dead7fc0dead;  // a NaN as float and as double
    const Location line = current->line;
    if (first_report("shfl-inactive", site_of(line)))
      report("shfl-inactive", "lane %d reads lane %d, which takes no part (active lanes %08x), at %s", lane, own.source,
             active, describe(line).c_str());
  });
}

void ballot(Lanes& data, uint32_t active) {
  uint32_t votes = 0;
  for_lanes(active, [&](int lane) { votes |= uint32_t(word<int>(data, lane) != 0) << lane; });
  for_lanes(active, [&](int lane) { word<uint32_t>(data, lane) = votes; });
}

void match_any(Lanes& data, uint32_t active) {
  uint64_t values[32];
  for_lanes(active, [&](int lane) { values[lane] = word<uint64_t>(data, lane); });
  for_lanes(active, [&](int lane) {
    uint64_t equal = 0;
    for_lanes(active, [&](int other) { equal |= uint64_t(values[other] == values[lane]) << other; });
    word<uint64_t>(data, lane) = equal;
  });
}

#define SIMT_REDUCE(name, T, expression)                             \
  void name(Lanes& data, uint32_t active) {                          \
    reduce<T>(data, active, [](T a, T b) { return T(expression); }); \
  }
SIMT_REDUCE(reduce_add, uint32_t, a + b)
SIMT_REDUCE(reduce_min, uint32_t, b < a ? b : a)
SIMT_REDUCE(reduce_max, uint32_t, a < b ? b : a)
SIMT_REDUCE(reduce_min_signed, int32_t, b < a ? b : a)
SIMT_REDUCE(reduce_max_signed, int32_t, a < b ? b : a)
SIMT_REDUCE(reduce_and, uint32_t, a& b)
SIMT_REDUCE(reduce_or, uint32_t, a | b)
SIMT_REDUCE(reduce_xor, uint32_t, a ^ b)
#undef SIMT_REDUCE

// Matrices -----------------------------------------------------------------------------------------------------------

namespace {

bool all_lanes(const char* instruction, uint32_t active) {
  if (active == ~0u) return true;
  if (first_report("warp-mask", site_of(current->line)))
    report("warp-mask", "%s needs all 32 lanes, has %08x, at %s", instruction, active, describe(current->line).c_str());
  return false;
}

struct LoadMatrix {
  const unsigned char* row;
  bool transposed;
  uint32_t* r;
};

// Lane l names row l % 8 of matrix l / 8, and receives row l / 4, elements 2 (l % 4) and the next one, of each matrix;
// in a transposed one the row index is that of the columns.
void load_matrices(Lanes& data, uint32_t active) {
  if (!all_lanes("ldmatrix", active)) return;
  const Thread* threads = &block.threads[size_t(current->warp) * 32];
  uint16_t elements[4][8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const unsigned char* row = word<LoadMatrix>(data, lane).row;
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0 && first_report("misaligned", site_of(current->line)))
      report("misaligned", "ldmatrix row of lane %d at %p, at %s", lane, static_cast<const void*>(row),
             describe(current->line).c_str());
    race::check(const_cast<Thread&>(threads[lane]), row, 16, kRead, current->line);
    std::memcpy(elements[lane / 8][lane % 8], row, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const LoadMatrix& own = word<LoadMatrix>(data, lane);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = own.transposed ? elements[i][column][row] : elements[i][row][column];
      const uint32_t high = own.transposed ? elements[i][column + 1][row] : elements[i][row][column + 1];
      own.r[i] = low | high << 16;
    }
  }
}

struct Mma {
  const uint32_t *a, *b;
  float* d;
};

float unpack_bf16(uint32_t bits, int i) { return __uint_as_float(i ? bits & 0xffff0000u : bits << 16); }
float unpack_f16(uint32_t bits, int i) {
  __half_raw raw;
  raw.x = uint16_t(bits >> 16 * i);
  return __half2float(__half(raw));
}
float unpack_tf32(uint32_t bits, int) { return __uint_as_float(bits & 0xffffe000u); }  // the low bits are not read

using Pair = double __attribute__((vector_size(16)));
union Row {  // of eight columns
  double columns[8];
  Pair pairs[4];
};

// d [16, 8] += a [16, 8 words] b [8 words, 8], where a word holds kPacked elements of k. Lane l has of a the rows l / 4
// and l / 4 + 8 and the words l % 4 and l % 4 + 4, of b the column l / 4 and the same words, of d the same rows and the
// columns 2 (l % 4) and the next one.
template <int kPacked, float (*unpack)(uint32_t bits, int i)>
void multiply(Lanes& data, uint32_t active) {
  if (!all_lanes("mma", active)) return;
  double a[16][8 * kPacked];
  Row b[8 * kPacked], d[16];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& own = word<Mma>(data, lane);
    const int group = lane / 4;
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < kPacked; ++i) {
        const int k = (lane % 4 + 4 * half) * kPacked + i;
        a[group][k] = unpack(own.a[2 * half], i);
        a[group + 8][k] = unpack(own.a[2 * half + 1], i);
        b[k].columns[group] = unpack(own.b[half], i);
      }
    for (int i = 0; i < 4; ++i) d[group + i / 2 * 8].columns[lane % 4 * 2 + i % 2] = own.d[i];
  }
  for (int row = 0; row < 16; ++row) {
    Row sums = d[row];
    for (int k = 0; k < 8 * kPacked; ++k) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums.pairs[j] += a[row][k] * b[k].pairs[j];
    }
    d[row] = sums;
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      word<Mma>(data, lane).d[i] = float(d[lane / 4 + i / 2 * 8].columns[lane % 4 * 2 + i % 2]);
}

}  // namespace

void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed, Location line) {
  LoadMatrix own{static_cast<const unsigned char*>(row), transposed, r};
  warp_operation(~0u, load_matrices, &own, line);
}

#define SIMT_MMA(name, operation)                                                           \
  void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location line) { \
    Mma own{a, b, d};                                                                       \
    warp_operation(~0u, operation, &own, line);                                             \
  }
SIMT_MMA(mma_bf16, (multiply<2, unpack_bf16>))
SIMT_MMA(mma_f16, (multiply<2, unpack_f16>))
SIMT_MMA(mma_tf32, (multiply<1, unpack_tf32>))
#undef SIMT_MMA

}  // namespace simt

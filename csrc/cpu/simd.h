// Vectors of 32 bytes and the run-time choice of instruction set, for the torch-free CPU kernels.
//
// Kernels are written once, on GCC/Clang vector extensions, as always_inline code. `simd::run(body)` compiles `body`
// for the baseline and again for AVX2+FMA and picks at run time, so one wheel serves every x86-64 machine; on other
// architectures the baseline (e.g. NEON) is the only copy. CMD_EXT_CPU=baseline forces the baseline (tests use it).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define SIMD_INLINE inline __attribute__((always_inline))

namespace cmd_ext::cpu::simd {

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  using type = float __attribute__((vector_size(32)));
};
template <>
struct VecOf<double> {
  using type = double __attribute__((vector_size(32)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
inline constexpr int kLanes = 32 / sizeof(T);

template <class T>
SIMD_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
SIMD_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
// The pointer, hidden from the optimiser: loads at constant distances from it then need one register and no arithmetic
// (GCC keeps every sum of a base and an invariant in a register of its own, and spills them).
template <class T>
SIMD_INLINE T* opaque(T* p) {
  __asm__("" : "+r"(p));
  return p;
}
template <class T>
SIMD_INLINE T sum(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

// sum of a[i] * b[i] over `count` entries; four chains hide the latency of the FMA.
template <class T>
SIMD_INLINE T dot(const T* a, const T* b, int64_t count) {
  constexpr int kWidth = kLanes<T>;
  Vec<T> acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth)
    for (int j = 0; j < 4; ++j) acc[j] += load(a + i + j * kWidth) * load(b + i + j * kWidth);
  for (; i + kWidth <= count; i += kWidth) acc[0] += load(a + i) * load(b + i);
  T total = sum<T>((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

enum class Isa { baseline, avx2 };

inline Isa isa() {
  static const Isa chosen = [] {
    const char* forced = std::getenv("CMD_EXT_CPU");
    if (forced && std::strcmp(forced, "baseline") == 0) return Isa::baseline;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::baseline;
  }();
  return chosen;
}
inline const char* isa_name() { return isa() == Isa::avx2 ? "avx2" : "baseline"; }

#if defined(__x86_64__)
template <class Body>
__attribute__((target("avx2,fma"))) void run_avx2(const Body& body) {
  body();
}
#endif

// Body: a lambda marked SIMD_LAMBDA, so that it is compiled inside each copy.
#define SIMD_LAMBDA() __attribute__((always_inline))
template <class Body>
inline void run(const Body& body) {
#if defined(__x86_64__)
  if (isa() == Isa::avx2) return run_avx2(body);
#endif
  body();
}

}  // namespace cmd_ext::cpu::simd

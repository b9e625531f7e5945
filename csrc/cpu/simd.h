// Vectors and the run-time choice of instruction set, for the torch-free CPU kernels.
//
// Kernels are written once, on GCC/Clang vector extensions, as always_inline code. `simd::run(body)` compiles `body`
// for the portable instructions of the build's target (SSE2, NEON) and again for AVX2+FMA and picks at run time, so one
// wheel serves every x86-64 machine. Target attributes, rather than flags of a file, keep the inline functions of other
// headers portable: their copies are merged by the linker, and any caller may get any of them.
//
// A vector has 32 bytes. A file compiled with CMD_EXT_VECTOR_BYTES = 64 holds the copy of its kernels for AVX-512, in a
// namespace of its own, and is called only where isa() (isa.h) says so. With CMD_EXT_AVX512_AS_AVX2 (tests) that copy
// is made of pairs of AVX2 registers, so that it runs on machines without AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

#ifndef CMD_EXT_VECTOR_BYTES
#define CMD_EXT_VECTOR_BYTES 32
#endif
// Of everything whose meaning depends on the size of a vector.
#if CMD_EXT_VECTOR_BYTES == 64
#define SIMD_NAMESPACE bytes64
#else
#define SIMD_NAMESPACE bytes32
#endif

namespace cmd_ext::cpu::simd {

inline namespace SIMD_NAMESPACE {

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  using type = float __attribute__((vector_size(CMD_EXT_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  using type = double __attribute__((vector_size(CMD_EXT_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
inline constexpr int kLanes = CMD_EXT_VECTOR_BYTES / sizeof(T);

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

#if defined(__x86_64__)
#if CMD_EXT_VECTOR_BYTES == 64
#define SIMD_TARGET SIMD_AVX512
#else
#define SIMD_TARGET SIMD_AVX2
#endif
template <class Body>
__attribute__((target(SIMD_TARGET))) void run_on_target(const Body& body) {
  body();
}
#endif

// Body: a lambda marked SIMD_LAMBDA, so that it is compiled inside each copy.
#define SIMD_LAMBDA() __attribute__((always_inline))
template <class Body>
inline void run(const Body& body) {
#if CMD_EXT_VECTOR_BYTES == 64
  run_on_target(body);
#else
#if defined(__x86_64__)
  if (isa() != Isa::scalar) return run_on_target(body);
#endif
  body();
#endif
}

}  // namespace SIMD_NAMESPACE
}  // namespace cmd_ext::cpu::simd

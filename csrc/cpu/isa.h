// The run-time choice of instruction set.
//
// The best that the CPU has, but for AVX-512 where its FMAs do no more a second than those of AVX2: there (Zen 4, Intel
// CPUs with one wide unit) wide vectors gain nothing in the products and lose in lanes that small maps leave empty:
// convolutions of 14x14 and 7x7 took 1.1 to 1.9 times as long on Zen 4. That is measured, in under a millisecond, by
// the first call; the ratios seen are near 1 and near 2.
//
// CMD_EXT_CPU=scalar|avx2|avx512 forces a path; `baseline` is the older name of `scalar`.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#define SIMD_INLINE inline __attribute__((always_inline))
#define SIMD_AVX2 "avx2,fma"
#if defined(CMD_EXT_AVX512_AS_AVX2)
#define SIMD_AVX512 SIMD_AVX2
#else
#define SIMD_AVX512 "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"
#endif

namespace cmd_ext::cpu::simd {

enum class Isa { scalar, avx2, avx512 };
constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512"};

inline constexpr int kChains = 12;
using Floats16 = float __attribute__((vector_size(16)));
using Floats32 = float __attribute__((vector_size(32)));
using Floats64 = float __attribute__((vector_size(64)));

// `steps` multiply-adds a <- a b + c of each of kChains vectors, which touch no memory: 12 chains cover the latency of
// two FMA units (8 would on most cores) and leave room for b and c among 16 registers. The result depends on all, so
// that none can be left out.
template <class V>
SIMD_INLINE float fma_chains(int64_t steps) {
  V a[kChains], b = V{} + 0.999f, c = V{} + 0.001f;
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) a[i] = V{} + static_cast<float>(i);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) a[i] = a[i] * b + c;
  }
#pragma GCC unroll 12
  for (int i = 1; i < kChains; ++i) a[0] += a[i];
  return a[0][0];
}

// fma_chains with the registers of a path; those of the build's target have 16 bytes (GCC keeps a vector that takes two
// of them in memory).
constexpr int register_bytes(Isa isa) { return 16 << int(isa); }
#if defined(__x86_64__)
__attribute__((target(SIMD_AVX2))) inline float fma_chains_avx2(int64_t steps) { return fma_chains<Floats32>(steps); }
__attribute__((target(SIMD_AVX512))) inline float fma_chains_avx512(int64_t steps) {
  return fma_chains<Floats64>(steps);
}
#endif
inline float fma_chains_of(Isa isa, int64_t steps) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return fma_chains_avx512(steps);
  if (isa == Isa::avx2) return fma_chains_avx2(steps);
#endif
  return fma_chains<Floats16>(steps);
}

inline Isa best_isa() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::scalar;
#if defined(CMD_EXT_AVX512_AS_AVX2)
  return Isa::avx512;
#else
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return wide ? Isa::avx512 : Isa::avx2;
#endif
#else
  return Isa::scalar;
#endif
}

// FMAs a second with 64-byte vectors as a multiple of those with 32-byte vectors, on a CPU that has AVX-512.
inline double gain_of_avx512() {
  using Clock = std::chrono::steady_clock;
  constexpr int kRounds = 64;  // the first ones pass while the CPU turns its upper halves on
  constexpr int64_t kSteps = 500;
  double seconds[2] = {1, 1};
  volatile float sink = 0;
  for (int round = 0; round < kRounds; ++round)
    for (int wide = 0; wide < 2; ++wide) {
      const auto begin = Clock::now();
      sink = fma_chains_of(wide ? Isa::avx512 : Isa::avx2, kSteps);
      seconds[wide] = std::min(seconds[wide], std::chrono::duration<double>(Clock::now() - begin).count());
    }
  (void)sink;
  return 2 * seconds[0] / seconds[1];
}

// What is chosen unasked on a machine that has all paths up to `best`.
inline Isa preferred_isa(Isa best) { return best == Isa::avx512 && gain_of_avx512() < 1.5 ? Isa::avx2 : best; }

// The path by the name in CMD_EXT_CPU (may be null), on a machine that has all paths up to `best`.
inline Isa choose_isa(const char* name, Isa best, Isa (*preferred)(Isa) = preferred_isa) {
  if (!name || !*name) return preferred(best);
  if (std::strcmp(name, "baseline") == 0) return Isa::scalar;
  std::string had;
  for (int i = 0; i <= int(best); ++i) {
    if (std::strcmp(name, kIsaNames[i]) == 0) return Isa(i);
    had += (i ? ", " : "") + std::string(kIsaNames[i]);
  }
  throw std::invalid_argument("CMD_EXT_CPU must be a path that this CPU has (" + had + "), got " + name);
}

// Throws std::invalid_argument where CMD_EXT_CPU names no path of this machine.
inline Isa isa() {
  static const Isa chosen = choose_isa(std::getenv("CMD_EXT_CPU"), best_isa());
  return chosen;
}
inline const char* isa_name() { return kIsaNames[int(isa())]; }

}  // namespace cmd_ext::cpu::simd

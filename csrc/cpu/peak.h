// The multiply-adds that this machine can do: what the benchmarks state their operations as a fraction of.
//
// Every thread keeps kChains independent vectors a <- a b + c in registers and touches no memory: 12 chains cover the
// latency of two FMA units (8 would on most cores) and leave room for b and c among 16 registers. A vector is a whole
// register: 32 bytes with AVX2, else 16, as GCC keeps a 32-byte vector that takes two registers in memory. Rounds last
// 10 ms and the best of five counts, as other programs can only slow one down; its rate is the sum over the threads in
// the same round, since two threads of one core share its units.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "simd.h"

namespace cmd_ext::cpu {

inline constexpr int kChains = 12;
using HalfVec = float __attribute__((vector_size(16)));

// `steps` multiply-adds of every chain. The result depends on all, so that none can be left out.
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

// Peak of float32 multiply-adds on `threads` threads, in GFLOP/s.
inline double fma_peak(int threads) {
  using Clock = std::chrono::steady_clock;
  constexpr int kRounds = 5;
  constexpr int64_t kSteps = 20000;
  constexpr std::chrono::milliseconds kRound(10);
  const bool wide = simd::isa() != simd::Isa::scalar;
  const double flop = 2.0 * kSteps * kChains * (wide ? sizeof(simd::Vec<float>) : sizeof(HalfVec)) / sizeof(float);

  std::vector<double> rates(threads * kRounds);
  std::atomic<int> waiting(threads);
  std::atomic<float> sink(0);
  const auto measure = [&](int thread) {
    for (--waiting; waiting > 0;) std::this_thread::yield();
    const auto start = Clock::now();
    auto begin = start;
    for (int round = 0; round < kRounds; ++round) {
      int64_t calls = 0;
      auto end = begin;
      do {
        float sum = 0;
        simd::run(
            [&]() SIMD_LAMBDA() { sum = wide ? fma_chains<simd::Vec<float>>(kSteps) : fma_chains<HalfVec>(kSteps); });
        sink = sum;
        ++calls;
        end = Clock::now();
      } while (end < start + (round + 1) * kRound);
      rates[thread * kRounds + round] = calls * flop / std::chrono::duration<double, std::nano>(end - begin).count();
      begin = end;
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(measure, thread);
  measure(0);
  for (auto& other : others) other.join();

  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    double sum = 0;
    for (int thread = 0; thread < threads; ++thread) sum += rates[thread * kRounds + round];
    best = std::max(best, sum);
  }
  return best;
}

}  // namespace cmd_ext::cpu

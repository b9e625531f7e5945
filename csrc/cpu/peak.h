// The multiply-adds that this machine can do: what the benchmarks state their operations as a fraction of.
//
// Rounds of the chains of isa.h last 10 ms and the best of five counts, as other programs can only slow one down; its
// rate is the sum over the threads in the same round, since two threads of one core share its units.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "isa.h"

namespace cmd_ext::cpu {

// Peak of float32 multiply-adds on `threads` threads, in GFLOP/s.
inline double fma_peak(int threads) {
  using Clock = std::chrono::steady_clock;
  constexpr int kRounds = 5;
  constexpr int64_t kSteps = 20000;
  constexpr std::chrono::milliseconds kRound(10);
  const simd::Isa isa = simd::isa();
  const double flop = 2.0 * kSteps * simd::kChains * simd::register_bytes(isa) / sizeof(float);

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
        sink = simd::fma_chains_of(isa, kSteps);
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

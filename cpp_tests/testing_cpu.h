// What the tests of the CPU kernels add to testing.h: ways to split a parallel loop, and the instruction set in use.
#pragma once

#include <functional>
#include <thread>

#include "kernels.h"
#include "simd.h"
#include "testing.h"

namespace testing {

template <class T>
cmd_ext::cpu::Csr<T> csr_of(const RandomCsr<T>& s) {
  return {s.rows, s.cols, s.values.data(), s.row_ptr.data(), s.col_idx.data()};
}

// Ends the program before main, as skipped, where this machine lacks the path that CMD_EXT_CPU names.
inline const bool has_isa = [] {
  try {
    cmd_ext::cpu::simd::isa();
  } catch (const std::invalid_argument& error) {
    std::cout << error.what() << '\n';
    std::exit(77);
  }
  return true;
}();

// Prints the closing line and returns the exit status of main.
inline int finish_cpu() {
  const char* forced = std::getenv("CMD_EXT_CPU");
  const std::string isa = cmd_ext::cpu::simd::isa_name();
  CHECK(!forced || isa == forced, "CMD_EXT_CPU =", forced ? forced : "", "and instruction set", isa);
  std::cout << "instruction set " << isa << '\n';
  return finish();
}

using Body = std::function<void(int64_t, int64_t)>;

// Every way to cut the loops: results must not depend on it.
inline const std::vector<std::pair<const char*, cmd_ext::cpu::ParallelFor>>& splits() {
  static const std::vector<std::pair<const char*, cmd_ext::cpu::ParallelFor>> all{
      {"one piece",
       [](int64_t count, int64_t, const Body& body) {
         if (count > 0) body(0, count);
       }},
      {"pieces of one, backwards",
       [](int64_t count, int64_t, const Body& body) {
         for (int64_t i = count; i > 0; --i) body(i - 1, i);
       }},
      {"three threads",
       [](int64_t count, int64_t, const Body& body) {
         std::vector<std::thread> threads;
         for (int64_t i = 0; i < 3; ++i)
           if (count * i / 3 < count * (i + 1) / 3)
             threads.emplace_back([&body, count, i] { body(count * i / 3, count * (i + 1) / 3); });
         for (std::thread& thread : threads) thread.join();
       }},
      {"pieces of the grain",
       [](int64_t count, int64_t grain, const Body& body) {
         for (int64_t i = 0; i < count; i += grain) body(i, std::min(count, i + grain));
       }},
  };
  return all;
}

}  // namespace testing

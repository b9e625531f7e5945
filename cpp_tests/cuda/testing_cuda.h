// What the tests of the CUDA kernels add to testing.h: device buffers, schedule seeds, tolerances. The kernels run
// under the SIMT emulator. A buffer has exactly the size that the kernel may touch and starts as NaN.
#pragma once

#include "../testing.h"
#include "gpu.h"
#include "kernels.h"

namespace testing {

using cmd_ext::cuda::gpu::bf16;
using cmd_ext::cuda::gpu::half;

template <class T>
class Device {
 public:
  explicit Device(int64_t count) : count_(count), data_(static_cast<T*>(simt::dev_malloc(size_t(count) * sizeof(T)))) {}
  explicit Device(const std::vector<T>& host) : Device(int64_t(host.size())) {
    if (count_ == 0) return;
    std::memcpy(data_, host.data(), host.size() * sizeof(T));
    simt::mark_init(data_, host.size() * sizeof(T));
  }
  ~Device() { simt::dev_free(data_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  T* get() const { return data_; }
  operator T*() const { return data_; }
  std::vector<T> host() const { return std::vector<T>(data_, data_ + count_); }

 private:
  int64_t count_;
  T* data_;
};

template <class T>
Device<T> to_device(const std::vector<T>& host) {
  return Device<T>(host);
}

template <class T>
T from_double(double x) {
  return cmd_ext::cuda::gpu::narrow<T>(cmd_ext::cuda::gpu::Acc<T>(x));
}
template <class T>
double as_double(T x) {
  return double(cmd_ext::cuda::gpu::widen(x));
}
// Unit roundoff: half of the distance from 1 to the next number.
template <class T>
constexpr double roundoff() {
  if constexpr (std::is_same_v<T, bf16>) return 1.0 / (1 << 8);
  if constexpr (std::is_same_v<T, half>) return 1.0 / (1 << 11);
  if constexpr (std::is_same_v<T, float>) return 1.0 / (1 << 24);
  return 1.0 / (1ll << 53);
}

template <class T>
std::vector<T> random_values(int64_t count) {
  std::vector<T> out(count);
  for (T& value : out) value = from_double<T>(uniform());
  return out;
}

// One rounding to T, and (terms + 1) roundings of the accumulator relative to the sum of magnitudes.
template <class T>
bool near(T got, const Sum& want) {
  const long double accumulator = roundoff<cmd_ext::cuda::gpu::Acc<T>>() * 2;
  const long double bound =
      (want.terms + 1) * want.magnitude * accumulator + 1.01L * roundoff<T>() * std::abs(want.value);
  return std::abs(as_double(got) - want.value) <= bound;
}

// Runs body once for every schedule seed and requires the outputs it returns to be the same bits each time.
template <class Body>
auto for_all_schedules(const Body& body, const std::string& name) {
  simt::config.seed = 0;
  const auto first = body();
  for (int seed = 1; seed <= 5; ++seed) {
    simt::config.seed = seed;
    CHECK(same_bits(body(), first), name, "differs from the first schedule with seed", seed);
  }
  simt::config.seed = 0;
  CHECK(simt::n_errors == 0, name, "was reported by the emulator:", simt::last_error());
  simt::reset_errors();
  return first;
}

}  // namespace testing

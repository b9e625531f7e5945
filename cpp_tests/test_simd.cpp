// The choice of the instruction set, and the transposes of both sizes of vectors.
#include <stdexcept>

#include "lanes.h"
#include "testing_cpu.h"

namespace {

namespace simd = cmd_ext::cpu::simd;
using simd::Isa;

std::string error_of(const char* name, Isa best) {
  try {
    simd::choose_isa(name, best);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "none";
}

void check_choice() {
  for (Isa best : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    for (const char* unset : {static_cast<const char*>(nullptr), ""})
      for (auto preferred : {+[](Isa best) { return best; }, +[](Isa) { return Isa::scalar; }})
        CHECK(simd::choose_isa(unset, best, preferred) == preferred(best), "unset", int(best));
    if (best < Isa::avx512) CHECK(simd::preferred_isa(best) == best, "preferred", int(best));
    CHECK(simd::choose_isa("baseline", best) == Isa::scalar, "baseline", int(best));
    for (Isa wanted : {Isa::scalar, Isa::avx2, Isa::avx512}) {
      const char* name = simd::kIsaNames[int(wanted)];
      if (wanted <= best)
        CHECK(simd::choose_isa(name, best) == wanted, name, int(best));
      else
        CHECK(error_of(name, best) != "none", name, int(best));
    }
  }
  if (simd::best_isa() == Isa::avx512) {
    const double gain = simd::gain_of_avx512();
    CHECK(gain > 0 && gain < 4, "AVX-512 over AVX2", gain);
  }
  const std::string error = error_of("avx", Isa::avx2);
  CHECK(error == "CMD_EXT_CPU must be a path that this CPU has (scalar, avx2), got avx", error);
}

template <class T>
void check_transpose() {
  constexpr int kCount = simd::kLanes<T>;
  std::vector<T> in(kCount * kCount), out(in.size());
  for (size_t i = 0; i < in.size(); ++i) in[i] = T(i);
  simd::run([&] SIMD_LAMBDA() {
    simd::Vec<T> r[kCount];
    for (int i = 0; i < kCount; ++i) r[i] = simd::load(in.data() + i * kCount);
    cmd_ext::cpu::SIMD_NAMESPACE::lanes::transpose<T>(r);
    for (int i = 0; i < kCount; ++i) simd::store(out.data() + i * kCount, r[i]);
  });
  for (int i = 0; i < kCount; ++i)
    for (int j = 0; j < kCount; ++j) CHECK(out[i * kCount + j] == in[j * kCount + i], "lanes", kCount, "at", i, j);
}

}  // namespace

int main() {
  check_choice();
  check_transpose<float>();
  check_transpose<double>();
  return testing::finish_cpu();
}

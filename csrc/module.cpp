// The Python module cmd_ext._C: facts about this build and this machine, and the short way through a layer's call.
// Torch-free, so that it loads, and `doctor` can speak, even where the op library does not.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/peak.h"
#include "cpu/simd.h"
#include "kept_call.h"

#define STRINGIZE_(x) #x
#define STRINGIZE(x) STRINGIZE_(x)

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = STRINGIZE(CMD_EXT_TORCH);
    info["stable_abi"] = "2.10";
    info["compiler"] = __VERSION__;
    info["cuda"] = STRINGIZE(CMD_EXT_CUDA_BUILD);
    return info;
  });
  m.def("cpu_capability", [] { return cmd_ext::cpu::simd::isa_name(); });
  m.def(
      "fma_peak",
      [](int threads) {
        if (threads < 1) throw std::invalid_argument("fma_peak: threads must be >= 1, got " + std::to_string(threads));
        pybind11::gil_scoped_release unlocked;
        return cmd_ext::cpu::fma_peak(threads);
      },
      pybind11::arg("threads"), "Peak of float32 multiply-adds on so many threads, in GFLOP/s; takes 50 ms.");
  m.add_object("kept_call", PyCFunction_New(&cmd_ext::kept::kMethod, nullptr));  // pybind11's own calls take longer
}

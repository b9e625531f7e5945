// The Python module cmd_ext._C: facts about this build and this machine. Torch-free, so that it loads, and `doctor`
// can speak, even where the op library does not.
#include <pybind11/pybind11.h>

#include "cpu/simd.h"

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
}

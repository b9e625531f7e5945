# The operators with the CUDA path of every entry point, on CPU tensors under the emulator: a library that the Python
# tests load as cmd_ext_simt, so that ref.py judges the CUDA kernels too. Wants -DCMD_EXT_TORCH=<folder of torch>.
if(NOT CMD_EXT_TORCH)
  return()
endif()
file(GLOB entries CONFIGURE_DEPENDS csrc/*.cpp)
list(FILTER entries EXCLUDE REGEX module.cpp)
add_library(cmd_ext_simt SHARED ${entries} ${kernels} ${cuda_kernels} ${emulator})
target_compile_definitions(cmd_ext_simt PRIVATE CMD_EXT_SIMT TORCH_TARGET_VERSION=0x020a000000000000)
target_compile_options(cmd_ext_simt PRIVATE -O2 -g0 -fvisibility=hidden -Wno-unknown-pragmas -Wno-unused-parameter
                                            -Wno-error)
target_include_directories(cmd_ext_simt PRIVATE csrc csrc/cuda cpp_tests/simt)
target_include_directories(cmd_ext_simt SYSTEM PRIVATE ${CMD_EXT_TORCH}/include ${CUDA_INCLUDE})
target_link_directories(cmd_ext_simt PRIVATE ${CMD_EXT_TORCH}/lib)
target_link_libraries(cmd_ext_simt PRIVATE torch_cpu Threads::Threads ${CMAKE_DL_LIBS})
set_target_properties(cmd_ext_simt PROPERTIES POSITION_INDEPENDENT_CODE ON EXCLUDE_FROM_ALL ON)

# Three builds of the emulator, of the kernels and of their tests: fast, asan (address and undefined-behaviour
# sanitizers) and race (the compiler's thread-sanitizer hooks, answered by simt_race.cpp, so linked without its library).
file(GLOB cuda_kernels CONFIGURE_DEPENDS csrc/cuda/*.cu)
file(GLOB cuda_tests CONFIGURE_DEPENDS cpp_tests/cuda/test_*.cpp)
file(GLOB emulator CONFIGURE_DEPENDS cpp_tests/simt/simt*.cpp)
set(simt_kernels cpp_tests/simt/test_kernels.cu)
set_source_files_properties(${cuda_kernels} ${simt_kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")

foreach(mode fast asan race)
  add_library(simt_${mode} OBJECT ${emulator})
  add_library(simt_kernels_${mode} OBJECT ${simt_kernels})
  add_library(cuda_kernels_${mode} OBJECT ${cuda_kernels})
  foreach(target simt_${mode} simt_kernels_${mode} cuda_kernels_${mode})
    target_compile_definitions(${target} PUBLIC CMD_EXT_SIMT)
    target_compile_options(${target} PUBLIC -Wno-unknown-pragmas -ffp-contract=off)
    target_include_directories(${target} PUBLIC csrc/cuda cpp_tests/simt)
    target_include_directories(${target} SYSTEM PUBLIC ${CUDA_INCLUDE})
    if(mode STREQUAL "fast")
      target_compile_options(${target} PUBLIC -O2)
    elseif(mode STREQUAL "asan")
      target_compile_options(${target} PUBLIC -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined
                                              -fno-sanitize-recover=undefined)
      target_link_options(${target} PUBLIC -fsanitize=address,undefined)
    else()
      target_compile_definitions(${target} PUBLIC SIMT_RACE)
      target_compile_options(${target} PUBLIC -O1 -g)
    endif()
  endforeach()
endforeach()
target_compile_options(simt_race PRIVATE -O2)

# Only the kernels are instrumented. memcpy stays a call, which the emulator sees.
foreach(kernels simt_kernels cuda_kernels)
  target_compile_options(${kernels}_race PRIVATE
    -fsanitize=thread,alignment -fsanitize-recover=alignment --param=tsan-distinguish-volatile=0
    --param=tsan-instrument-func-entry-exit=0 -fno-builtin-memcpy -fno-builtin-memmove -fno-builtin-memset
    -Wno-maybe-uninitialized)
endforeach()

function(add_simt_test name executable source kernels mode)
  add_executable(${executable} ${source})
  target_link_libraries(${executable} PRIVATE ${kernels}_${mode} simt_${mode} Threads::Threads)
  add_test(NAME ${name} COMMAND ${executable})
endfunction()

foreach(mode fast asan race)
  add_simt_test(simt_${mode} test_simt_${mode} cpp_tests/simt/test_simt.cpp simt_kernels ${mode})
  foreach(source ${cuda_tests})
    get_filename_component(stem ${source} NAME_WE)
    string(REPLACE "test_" "" stem ${stem})
    add_simt_test(cuda_${stem}_${mode} cuda_${stem}_${mode} ${source} cuda_kernels ${mode})
  endforeach()
endforeach()

include(cpp_tests/simt/ptx.cmake)
include(cpp_tests/simt/torch.cmake)

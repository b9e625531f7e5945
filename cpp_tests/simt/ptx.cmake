# A fourth and fifth build of the tests: the PTX that nvcc emits for sm_80 and sm_90, translated to C++ by ptx2cpp.py,
# takes the place of the kernels' source in the race build. Only where a CUDA toolkit is installed.
file(GLOB toolkits /usr/local/cuda*)
find_program(CUDA_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin PATHS ${toolkits} PATH_SUFFIXES bin NO_SYSTEM_ENVIRONMENT_PATH)
find_package(Python3 COMPONENTS Interpreter)
if(NOT CUDA_NVCC OR NOT Python3_FOUND)
  message(STATUS "No nvcc in CUDA_HOME or /usr/local/cuda*, or no Python: the tests of the PTX are left out")
  return()
endif()

# Their launchers; the kernels in them only lend their names.
add_library(cuda_launchers OBJECT ${cuda_kernels})
target_link_libraries(cuda_launchers PRIVATE simt_race)
target_compile_options(cuda_launchers PRIVATE -O0 -g0)

set(translator ${PROJECT_SOURCE_DIR}/cpp_tests/simt/ptx2cpp.py)
foreach(arch 80 90)
  set(translated)
  foreach(source ${cuda_kernels})
    get_filename_component(stem ${source} NAME_WE)
    set(base ${CMAKE_CURRENT_BINARY_DIR}/ptx/${stem}_${arch})
    add_custom_command(
      OUTPUT ${base}.cpp
      COMMAND ${CUDA_NVCC} -std=c++17 -O3 -lineinfo -arch=compute_${arch} -ptx -I${PROJECT_SOURCE_DIR}/csrc/cuda
              -MD -MF ${base}.d -MT ${base}.cpp ${source} -o ${base}.ptx
      COMMAND Python3::Interpreter ${translator} ${base}.ptx ${base}.cpp
      DEPENDS ${source} ${translator}
      DEPFILE ${base}.d
      VERBATIM)
    list(APPEND translated ${base}.cpp)
  endforeach()
  file(MAKE_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/ptx)

  add_library(cuda_kernels_ptx${arch} OBJECT ${translated})
  target_link_libraries(cuda_kernels_ptx${arch} PRIVATE simt_race)
  target_compile_options(cuda_kernels_ptx${arch} PRIVATE -g0 -w -fno-strict-aliasing)

  foreach(source ${cuda_kernels})
    get_filename_component(stem ${source} NAME_WE)
    set(test ${PROJECT_SOURCE_DIR}/cpp_tests/cuda/test_${stem}.cpp)
    if(EXISTS ${test})
      set(name cuda_${stem}_ptx${arch})
      add_executable(${name} ${test})
      target_link_libraries(${name} PRIVATE cuda_kernels_ptx${arch} cuda_launchers simt_race Threads::Threads
                                            ${CMAKE_DL_LIBS})
      target_link_options(${name} PRIVATE -rdynamic)
      add_test(NAME ${name} COMMAND ${name})
    endif()
  endforeach()
endforeach()

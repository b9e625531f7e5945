# Where Python is: the test of ptx2cpp.py. Where a CUDA toolkit is too: a fourth and fifth build of the kernels' tests, in
# which the PTX that nvcc emits for sm_80 and sm_90, translated to C++, takes the place of the kernels' source.
find_package(Python3 COMPONENTS Interpreter)
if(NOT Python3_FOUND)
  return()
endif()
set(simt ${PROJECT_SOURCE_DIR}/cpp_tests/simt)
set(translator ${simt}/ptx2cpp.py ${simt}/ptx_instructions.py)
set(ptx ${CMAKE_CURRENT_BINARY_DIR}/ptx)
file(MAKE_DIRECTORY ${ptx})
set(translated_options -g0 -w -fno-strict-aliasing)

add_custom_command(
  OUTPUT ${ptx}/test_ptx2cpp.cpp
  COMMAND Python3::Interpreter ${simt}/test_ptx2cpp.py ${ptx}/test_ptx2cpp.cpp
  DEPENDS ${simt}/test_ptx2cpp.py ${translator}
  VERBATIM)
add_executable(ptx2cpp ${ptx}/test_ptx2cpp.cpp)
target_include_directories(ptx2cpp PRIVATE cpp_tests/cuda)
target_link_libraries(ptx2cpp PRIVATE simt_race Threads::Threads ${CMAKE_DL_LIBS})
target_compile_options(ptx2cpp PRIVATE ${translated_options})
add_test(NAME ptx2cpp COMMAND ptx2cpp)

file(GLOB toolkits /usr/local/cuda*)
find_program(CUDA_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin PATHS ${toolkits} PATH_SUFFIXES bin NO_DEFAULT_PATH)
if(NOT CUDA_NVCC)
  message(STATUS "No nvcc in CUDA_HOME or /usr/local/cuda*: the tests of the kernels' PTX are left out")
  return()
endif()

# Their launchers; the kernels in them only lend their names.
add_library(cuda_launchers OBJECT ${cuda_kernels})
target_link_libraries(cuda_launchers PRIVATE simt_race)
target_compile_options(cuda_launchers PRIVATE -O0 -g0)

foreach(arch 80 90)
  set(translated)
  foreach(source ${cuda_kernels})
    get_filename_component(stem ${source} NAME_WE)
    set(base ${ptx}/${stem}_${arch})
    add_custom_command(
      OUTPUT ${base}.cpp
      COMMAND ${CUDA_NVCC} -std=c++17 -O3 -lineinfo -arch=compute_${arch} -ptx -I${PROJECT_SOURCE_DIR}/csrc/cuda
              -MD -MF ${base}.d -MT ${base}.cpp ${source} -o ${base}.ptx
      COMMAND Python3::Interpreter ${simt}/ptx2cpp.py ${base}.ptx ${base}.cpp
      DEPENDS ${source} ${translator}
      DEPFILE ${base}.d
      VERBATIM)
    list(APPEND translated ${base}.cpp)
  endforeach()
  add_library(cuda_kernels_ptx${arch} OBJECT ${translated})
  target_link_libraries(cuda_kernels_ptx${arch} PRIVATE simt_race)
  target_compile_options(cuda_kernels_ptx${arch} PRIVATE ${translated_options})

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

# Prints the coalescing and bank conflicts of the kernels, for cpp_tests/ledger.py.
add_executable(cuda_access EXCLUDE_FROM_ALL cpp_tests/cuda/access.cpp)
target_link_libraries(cuda_access PRIVATE cuda_kernels_ptx90 cuda_launchers simt_race Threads::Threads ${CMAKE_DL_LIBS})
target_link_options(cuda_access PRIVATE -rdynamic)

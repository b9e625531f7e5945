// The only fork between nvcc and the SIMT emulator (cpp_tests/simt): launching, dynamic shared memory, asynchronous
// copies and the tensor-core instructions. Everything else in csrc/cuda is plain CUDA C++ that both compile unchanged.
// mma.sync, ldmatrix and cp.async exist on every target from sm_80 on; nothing newer is used.
#pragma once

#include <cstdint>
#include <utility>

#ifdef CMD_EXT_SIMT
#include "simt.h"
#define GPU_DYNAMIC_SHARED(name) unsigned char* name = static_cast<unsigned char*>(simt::dynamic_shared())
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define GPU_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace cmd_ext::cuda::gpu {

using bf16 = __nv_bfloat16;
using half = __half;

#ifdef CMD_EXT_SIMT

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A&&... args) {
  return simt::launch(kernel, grid, block, shared, stream, std::forward<A>(args)...);
}
inline int multiprocessors() { return simt::config.multiprocessors; }
inline int max_shared_bytes() { return simt::config.max_shared_bytes; }

SIMT_RUNTIME inline void cp_async16(void* shared, const void* global, bool in_range = true, SIMT_LINE) {
  simt::cp_async(shared, global, 16, in_range ? 16 : 0, line);
}
SIMT_RUNTIME inline void cp_async_commit() { simt::cp_async_commit(); }
template <int kPending>
SIMT_RUNTIME void cp_async_wait() {
  simt::cp_async_wait(kPending);
}

SIMT_RUNTIME inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_LINE) {
  simt::ldmatrix(r, row, false, line);
}
SIMT_RUNTIME inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SIMT_LINE) {
  simt::ldmatrix(r, row, true, line);
}
SIMT_RUNTIME inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16, SIMT_LINE) {
  simt::mma_bf16(d, a, b, line);
}
SIMT_RUNTIME inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half, SIMT_LINE) {
  simt::mma_f16(d, a, b, line);
}
SIMT_RUNTIME inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float, SIMT_LINE) {
  simt::mma_tf32(d, a, b, line);
}
inline uint32_t to_tf32(uint32_t bits) { return simt::to_tf32(bits); }

#else

// Dynamic shared memory that needs no attribute: 48 KB less what a kernel may have as static arrays.
constexpr size_t kWithoutOptIn = 16 << 10;

// Launches with `shared` bytes of dynamic shared memory and returns the launch's error, if any. Never synchronises.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared > kWithoutOptIn) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  // clang-format off
  kernel<<<grid, block, shared, stream>>>(P(std::forward<A>(args))...);
  // clang-format on
  return cudaGetLastError();
}
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int max_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory without registers; zeros where not in_range (`global` must still be an address).
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool in_range = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(in_range ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's groups are in flight; a barrier must follow before others' copies are read.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8 and gets, of each matrix, the four
// bytes at row l / 4, byte 4 * (l % 4) (transposed as 16-bit elements by the second form).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d [16, 8] += a [16, 32 bytes] b [8, 32 bytes]^T in the fragment layouts of the PTX manual: m16n8k16 for 16-bit
// elements, m16n8k8 for tf32 (float operands, rounded by to_tf32). Products accumulate in fp32.
#define CMD_EXT_MMA(tag, instruction)                                                                       \
  __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], tag) { \
    asm volatile("mma.sync.aligned." instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"   \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                       \
  }
CMD_EXT_MMA(bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
CMD_EXT_MMA(half, "m16n8k16.row.col.f32.f16.f16.f32")
CMD_EXT_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef CMD_EXT_MMA

// Rounds a float to the 10 mantissa bits of tf32, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

#endif

// The type that a kernel accumulates in, and conversions to and from it (round to nearest even).
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(half x) { return __half2float(x); }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(Acc<T> x) {
  return x;
}
template <>
__device__ __forceinline__ half narrow<half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cmd_ext::cuda::gpu

// simt.h - run CUDA kernels on the host, one fiber per thread (g++ -DCMD_EXT_SIMT). C++17.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector_types.h>        // float4, dim3... NVIDIA headers are plain C++ for a host compiler
#include <vector_functions.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <driver_types.h>
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __align__
#undef __grid_constant__
#undef __restrict__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
#ifdef SIMT_CHECK                  // ASan gives static (not thread_local) objects redzones: blocks run one after another
#define __shared__ static
#else
#define __shared__ static thread_local
#endif
#define SIMT_RUNTIME __attribute__((no_sanitize("thread")))
#define SIMT_LINE int line = __builtin_LINE()


extern __thread uint3 threadIdx, blockIdx;
extern __thread uint3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {
enum Policy { kFifo, kRandom };
struct Config { uint64_t seed = 0; int preempt = 0; int max_errors = 20; int threads = 1; bool strict_exit = true; bool shuffle_blocks = true; bool metrics = false; int multiprocessors = 8; int max_shared_bytes = 232448;
  bool require_translated = false;  // a launch of a kernel without a registered translation is an error
};
extern Config config;
extern long n_errors, n_switch, n_access;
void report(const char* kind, const char* fmt, ...) __attribute__((format(printf, 2, 3)));
const char* last_error();
void reset_errors();
void* dev_malloc(size_t n);              // stands for cudaMalloc: exact bounds are known in check mode
void dev_free(void* p);
void mark_init(void* p, size_t n);       // host-side cudaMemcpy/memset to device
void* dynamic_shared();
void run_grid(dim3 g, dim3 b, size_t smem, void (*tramp)(void*), void* ctx);
void bar(int id, int count, int kind, int pred, int* res, int line);      // kind 0 sync 1 count 2 and 3 or
struct Lane { const void* in; void* out; };
typedef void (*WarpFn)(Lane* l, uint32_t mask);
void warp_op(uint32_t mask, WarpFn fn, const void* in, void* out, int line, bool mem_order);
uint32_t active_mask();
int lane_id();
void fence();
void enter_kernel();
void access(const void* p, size_t n, int kind, int site = 0);      // 0 read 1 write 2 atomic; site: PTX line
void cp_async(void* d, const void* s, int n, int src_n, int site = 0);
void cp_async_commit();
void cp_async_wait(int n);

// A kernel translated from PTX, which launch runs in place of the C++ source once it is registered under the kernel's
// mangled name. `run` reads the parameters at their C ABI offsets; its shared memory begins at dynamic_shared(): first
// static_shared_bytes of static arrays, then the dynamic bytes of the launch. It tells every access by access(), with
// its PTX line as the site.
struct Translated {
  const char* name;
  size_t static_shared_bytes;
  size_t param_bytes;
  void (*run)(const unsigned char* params);
};
void register_translated(const Translated& kernel);
const Translated* find_translated(const char* mangled_name);
const Translated* find_translated(const void* function);  // null, with an error where config.require_translated

// Kernel parameters as PTX lays them out: in order, each at its natural alignment.
struct Params {
  alignas(16) unsigned char bytes[4096];
  size_t size = 0;

  template <class T> void add(const T& value) {
    size = (size + alignof(T) - 1) / alignof(T) * alignof(T);
    memcpy(bytes + size, &value, sizeof value);
    size += sizeof value;
  }
};
cudaError_t launch_translated(const Translated& kernel, const Params& params, dim3 g, dim3 b, size_t smem);

template <class... P, class... A>
cudaError_t launch(void (*k)(P...), dim3 g, dim3 b, size_t smem, cudaStream_t, A&&... a) {
  if (g.x == 0 || g.y == 0 || g.z == 0) return cudaSuccess;
  if (const Translated* translated = find_translated(reinterpret_cast<const void*>(k))) {
    Params params;
    (params.add(P(std::forward<A>(a))), ...);
    return launch_translated(*translated, params, g, b, smem);
  }
  if (config.require_translated) return cudaErrorInvalidDeviceFunction;
  struct Ctx { void (*k)(P...); std::tuple<P...> args; } c{k, std::tuple<P...>(std::forward<A>(a)...)};
  run_grid(g, b, smem, [](void* p) SIMT_RUNTIME {
    Ctx local = *static_cast<Ctx*>(p);               // kernel parameters live on the fiber's own stack
    enter_kernel();
    std::apply(local.k, local.args);
  }, &c);
  return cudaSuccess;
}
struct ShflIn { uint64_t v; int mode, arg, width; };
void shfl_fn(Lane* l, uint32_t mask);
template <class T> SIMT_RUNTIME T shfl(uint32_t m, T v, int mode, int arg, int w, int line) {
  static_assert(sizeof(T) <= 8, "");
  ShflIn in{0, mode, arg, w}; uint64_t out = 0; memcpy(&in.v, &v, sizeof(T));
  warp_op(m, shfl_fn, &in, &out, line, false);
  T r; memcpy(&r, &out, sizeof(T)); return r;
}
void vote_fn(Lane*, uint32_t); void match_fn(Lane*, uint32_t); void red_add_fn(Lane*, uint32_t); void red_max_fn(Lane*, uint32_t); void red_min_fn(Lane*, uint32_t); void nop_fn(Lane*, uint32_t);
void mma_tf32_fn(Lane*, uint32_t); void mma_f16_fn(Lane*, uint32_t); void mma_bf16_fn(Lane*, uint32_t); void ldmatrix_fn(Lane*, uint32_t);
struct MmaIn { uint32_t a[4], b[2]; float c[4]; };
struct LdmIn { const void* row; int n, trans, site; };
template <class T> SIMT_RUNTIME T rmw(T* p, T (*f)(T, T), T v) {
  access(p, sizeof(T), 2);
#ifdef SIMT_CHECK
  T o = *p; *p = f(o, v); return o;
#else
  T o, n; __atomic_load(p, &o, __ATOMIC_RELAXED);
  do { n = f(o, v); } while (!__atomic_compare_exchange(p, &o, &n, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  return o;
#endif
}
SIMT_RUNTIME inline void mma_any(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], WarpFn fn, int line) {
  MmaIn in; memcpy(in.a, a, 16); memcpy(in.b, b, 8); memcpy(in.c, d, 16); warp_op(~0u, fn, &in, d, line, false); }
SIMT_RUNTIME inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) { mma_any(d, a, b, mma_bf16_fn, line); }
SIMT_RUNTIME inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) { mma_any(d, a, b, mma_f16_fn, line); }
SIMT_RUNTIME inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) { mma_any(d, a, b, mma_tf32_fn, line); }
SIMT_RUNTIME inline void ldmatrix(uint32_t (&r)[4], const void* row, bool trans, int line, int site = 0) { LdmIn in{row, 4, trans, site}; warp_op(~0u, ldmatrix_fn, &in, r, line, false); }
inline uint32_t to_tf32(uint32_t u) { return (u + 0x1000u) & 0xffffe000u; }
}  // namespace simt

SIMT_RUNTIME inline void __syncthreads(SIMT_LINE) { simt::bar(0, 0, 0, 0, nullptr, line); }
SIMT_RUNTIME inline int __syncthreads_count(int p, SIMT_LINE) { int r; simt::bar(0, 0, 1, !!p, &r, line); return r; }
SIMT_RUNTIME inline int __syncthreads_and(int p, SIMT_LINE) { int r; simt::bar(0, 0, 2, !!p, &r, line); return r; }
SIMT_RUNTIME inline int __syncthreads_or(int p, SIMT_LINE) { int r; simt::bar(0, 0, 3, !!p, &r, line); return r; }
SIMT_RUNTIME inline void __syncwarp(uint32_t m = ~0u, SIMT_LINE) { simt::warp_op(m, simt::nop_fn, nullptr, nullptr, line, true); }
template <class T> SIMT_RUNTIME T __shfl_sync(uint32_t m, T v, int s, int w = 32, SIMT_LINE) { return simt::shfl(m, v, 0, s, w, line); }
template <class T> SIMT_RUNTIME T __shfl_up_sync(uint32_t m, T v, unsigned d, int w = 32, SIMT_LINE) { return simt::shfl(m, v, 1, int(d), w, line); }
template <class T> SIMT_RUNTIME T __shfl_down_sync(uint32_t m, T v, unsigned d, int w = 32, SIMT_LINE) { return simt::shfl(m, v, 2, int(d), w, line); }
template <class T> SIMT_RUNTIME T __shfl_xor_sync(uint32_t m, T v, int x, int w = 32, SIMT_LINE) { return simt::shfl(m, v, 3, x, w, line); }
SIMT_RUNTIME inline uint32_t __ballot_sync(uint32_t m, int p, SIMT_LINE) { uint32_t o = 0; simt::warp_op(m, simt::vote_fn, &p, &o, line, false); return o; }
SIMT_RUNTIME inline int __any_sync(uint32_t m, int p, SIMT_LINE) { return __ballot_sync(m, p, line) != 0; }
SIMT_RUNTIME inline int __all_sync(uint32_t m, int p, SIMT_LINE) { return __ballot_sync(m, !p, line) == 0; }
template <class T> SIMT_RUNTIME uint32_t __match_any_sync(uint32_t m, T v, SIMT_LINE) { uint64_t x = 0; memcpy(&x, &v, sizeof v); uint32_t o = 0; simt::warp_op(m, simt::match_fn, &x, &o, line, false); return o; }
SIMT_RUNTIME inline uint32_t __reduce_add_sync(uint32_t m, uint32_t v, SIMT_LINE) { uint32_t o; simt::warp_op(m, simt::red_add_fn, &v, &o, line, false); return o; }
SIMT_RUNTIME inline uint32_t __reduce_max_sync(uint32_t m, uint32_t v, SIMT_LINE) { uint32_t o; simt::warp_op(m, simt::red_max_fn, &v, &o, line, false); return o; }
SIMT_RUNTIME inline uint32_t __reduce_min_sync(uint32_t m, uint32_t v, SIMT_LINE) { uint32_t o; simt::warp_op(m, simt::red_min_fn, &v, &o, line, false); return o; }
SIMT_RUNTIME inline uint32_t __activemask() { return simt::active_mask(); }
SIMT_RUNTIME inline void __threadfence() { simt::fence(); }
SIMT_RUNTIME inline void __threadfence_block() {}

template <class T> SIMT_RUNTIME T atomicAdd(T* p, T v) { return simt::rmw<T>(p, [](T a, T b) SIMT_RUNTIME { return T(a + b); }, v); }
SIMT_RUNTIME inline int atomicSub(int* p, int v) { return atomicAdd(p, -v); }
template <class T> SIMT_RUNTIME T atomicMax(T* p, T v) { return simt::rmw<T>(p, [](T a, T b) SIMT_RUNTIME { return a < b ? b : a; }, v); }
template <class T> SIMT_RUNTIME T atomicMin(T* p, T v) { return simt::rmw<T>(p, [](T a, T b) SIMT_RUNTIME { return b < a ? b : a; }, v); }
template <class T> SIMT_RUNTIME T atomicOr(T* p, T v) { return simt::rmw<T>(p, [](T a, T b) SIMT_RUNTIME { return T(a | b); }, v); }
template <class T> SIMT_RUNTIME T atomicAnd(T* p, T v) { return simt::rmw<T>(p, [](T a, T b) SIMT_RUNTIME { return T(a & b); }, v); }
template <class T> SIMT_RUNTIME T atomicExch(T* p, T v) { return simt::rmw<T>(p, [](T, T b) SIMT_RUNTIME { return b; }, v); }
SIMT_RUNTIME inline uint32_t atomicInc(uint32_t* p, uint32_t v) { return simt::rmw<uint32_t>(p, [](uint32_t a, uint32_t b) SIMT_RUNTIME { return a >= b ? 0u : a + 1; }, v); }
template <class T> SIMT_RUNTIME T atomicCAS(T* p, T c, T v) { simt::access(p, sizeof(T), 2); T e = c; __atomic_compare_exchange(p, &e, &v, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED); return e; }

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
inline uint32_t __float_as_uint(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
inline int __float_as_int(float f) { int u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline float __int_as_float(int u) { float f; memcpy(&f, &u, 4); return f; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(uint32_t(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __brev(uint32_t x) { uint32_t r = 0; for (int i = 0; i < 32; ++i) r |= ((x >> i) & 1u) << (31 - i); return r; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }

// What a kernel sees when g++ compiles it for the host (-DCMD_EXT_SIMT): CUDA's keywords, built-in variables and
// intrinsics, answered by the emulator in simt*.cpp. Every thread of a block is a fiber; the fibers of a block take
// turns on one operating-system thread and blocks run one after another, in a random order where a seed is given. So
// kernels must not wait for other blocks. Barriers, warp operations and launches are checked in every build; with
// SIMT_RACE (kernels compiled by -fsanitize=thread, see simt_race.cpp) each memory access is checked too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

// NVIDIA's headers are plain C++ to a host compiler, except for the keywords. There is no __constant__: kernels have no
// globals.
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
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// One block runs at a time, so a static array serves all of them. The scope object before it finds the array's bounds
// by its own name in the symbol table, and refills the array with 0xff when a block first comes by.
#define __shared__ SIMT_SHARED(__COUNTER__)
#define SIMT_SHARED(id) SIMT_SHARED_SCOPE(id)
#define SIMT_SHARED_SCOPE(id)               \
  static simt::SharedScope simt_scope_##id; \
  simt_scope_##id.enter();                  \
  static

// Marks functions of the emulator, whose own accesses are not the kernel's.
#define SIMT_RUNTIME __attribute__((no_sanitize("thread")))
// The last parameter of whatever may be reported: where the kernel called it.
#define SIMT_LINE simt::Location line = simt::Location(__builtin_FILE(), __builtin_LINE())

// Constant for as long as one thread runs, so that the compiler may keep them, and does not instrument their reads.
extern const uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

struct Location {
  const char* file = nullptr;  // null in kernels translated from PTX
  int line = 0;

  constexpr Location(const char* file, int line) : file(file), line(line) {}
  constexpr Location(int ptx_line = 0) : line(ptx_line) {}
};

struct Config {
  uint64_t seed = 0;                // 0: threads and blocks in order. SIMT_SEED in the environment is added to it
  int preempt = 0;                  // race build: about every n-th access lets another thread run. Default SIMT_PREEMPT
  int max_errors = 20;              // reports printed of each kind
  bool strict_exit = true;          // a barrier after some threads have returned is an error
  bool shuffle_blocks = true;       // blocks in random order too
  bool metrics = false;             // print the accesses of translated kernels in the race build, see simt_metrics.h
  bool require_translated = false;  // a launch of a kernel without a registered translation is an error
  int multiprocessors = 8;
  int max_shared_bytes = 232448;  // of a block, with those of static arrays
};
extern Config config;

// Errors that the emulator found: printed with kernel, block and thread, and counted. Repetitions of one fault at one
// place count, but are printed once.
extern long n_errors;
void report(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));
long n_reported(const char* kind);
const char* last_error();  // "kind: message"
void reset_errors();

// Device memory, filled with 0xff. What the host writes there, a kernel may read after mark_init.
void* dev_malloc(size_t bytes);
void dev_free(void* p);
void mark_init(void* p, size_t bytes);

// A kernel translated from PTX, which launch runs in place of the C++ source once it is registered under the kernel's
// mangled name. `run` reads the parameters at their C ABI offsets; its shared memory begins at dynamic_shared(): first
// static_shared_bytes of static arrays, then the dynamic bytes of the launch. It tells every access by access(), with
// its PTX line as the place.
struct Translated {
  const char* name;
  size_t static_shared_bytes;
  size_t param_bytes;
  void (*run)(const unsigned char* params);
};
void register_translated(const Translated& kernel);
const Translated* find_translated(const char* mangled_name);
const Translated* find_translated(const void* function);  // null, with an error where config.require_translated

enum AccessKind { kRead, kWrite, kAtomic };
// Checks an access whose address must be a multiple of its size; only the race build does.
void access(const void* p, size_t bytes, int kind, Location line = {});

// Kernel parameters as PTX lays them out: in order, each at its natural alignment.
struct Params {
  alignas(16) unsigned char bytes[4096];
  size_t size = 0;

  template <class T>
  void add(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>, "kernel parameters are copied bytewise");
    size = (size + alignof(T) - 1) / alignof(T) * alignof(T);
    std::memcpy(bytes + size, &value, sizeof value);
    size += sizeof value;
  }
};
cudaError_t launch_translated(const Translated& kernel, const Params& params, dim3 grid, dim3 block, size_t shared);
cudaError_t launch_source(const void* function, dim3 grid, dim3 block, size_t shared, void (*run)(const void* call),
                          const void* call);
void enter_kernel();  // from here on, this thread's accesses are the kernel's

template <class... P>
struct Call {
  void (*kernel)(P...);
  std::tuple<P...> arguments;

  SIMT_RUNTIME static void run(const void* call) {
    Call local = *static_cast<const Call*>(call);  // on the thread's own stack, as parameters are its own
    enter_kernel();
    std::apply(local.kernel, local.arguments);
  }
};

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t, A&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (const Translated* translated = find_translated(function)) {
    Params params;
    (params.add(P(std::forward<A>(arguments))), ...);
    return launch_translated(*translated, params, grid, block, shared);
  }
  if (config.require_translated) return cudaErrorInvalidDeviceFunction;
  const Call<P...> call{kernel, std::tuple<P...>(std::forward<A>(arguments)...)};
  return launch_source(function, grid, block, shared, Call<P...>::run, &call);
}

// Shared memory.
void* dynamic_shared();
struct SharedVariables;
extern uint32_t block_generation;
struct SharedScope {
  uint32_t generation = 0;
  SharedVariables* variables = nullptr;  // of the enclosing function

  SIMT_RUNTIME void enter() {
    if (generation != block_generation) enter_block();
  }
  void enter_block();
};

// Barriers. The result is the number of true predicates, or whether all or any are.
enum class Barrier { kSync, kCount, kAnd, kOr };
int barrier(Barrier kind, int predicate, Location line);
void fence();

// A warp operation: each lane waits with its `data` until all lanes of the mask that still run have come, then
// `operation` sees the data of the active lanes.
using Lanes = void* const[32];
using Operation = void (*)(Lanes& data, uint32_t active);
void warp_operation(uint32_t mask, Operation operation, void* data, Location line);
void sync_warp(uint32_t mask, Location line);  // which also orders memory
uint32_t active_mask();
int lane_id();

struct Shuffle {
  uint64_t value;
  int source;
};
void shuffle(Lanes& data, uint32_t active);

template <class T>
SIMT_RUNTIME T shuffle(uint32_t mask, T value, int source, Location line) {
  static_assert(sizeof(T) <= 8, "");
  Shuffle lane{0, source};
  __builtin_memcpy(&lane.value, &value, sizeof value);
  warp_operation(mask, shuffle, &lane, line);
  __builtin_memcpy(&value, &lane.value, sizeof value);
  return value;
}

// Operations on one word a lane, replaced by the result.
void ballot(Lanes& data, uint32_t active);
void match_any(Lanes& data, uint32_t active);  // of 64 bits
void reduce_add(Lanes& data, uint32_t active);
void reduce_min(Lanes& data, uint32_t active);
void reduce_max(Lanes& data, uint32_t active);
void reduce_min_signed(Lanes& data, uint32_t active);
void reduce_max_signed(Lanes& data, uint32_t active);
void reduce_and(Lanes& data, uint32_t active);
void reduce_or(Lanes& data, uint32_t active);
void reduce_xor(Lanes& data, uint32_t active);

template <class T>
SIMT_RUNTIME uint32_t word_operation(uint32_t mask, Operation operation, T word, Location line) {
  warp_operation(mask, operation, &word, line);
  return uint32_t(word);
}

// The instructions that gpu.h wraps, with the operands of PTX. Lanes must all take part.
void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed, Location line);
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location line);
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location line);
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location line);
inline uint32_t to_tf32(uint32_t bits) { return (bits + 0x1000u) & 0xffffe000u; }

// The copy happens as late as is allowed, in cp_async_wait; until then the destination is poison. Bytes beyond
// source_bytes become zero.
void cp_async(void* shared, const void* global, int bytes, int source_bytes, SIMT_LINE);
void cp_async_commit();
void cp_async_wait(int pending_groups);

template <class T>
struct Same {
  using type = T;
};
template <class T>
using Value = typename Same<T>::type;  // a parameter that converts to the T of another one

// *p = f(*p, value), with nothing in between; returns the old *p.
template <class T, class F>
SIMT_RUNTIME T rmw(T* p, const F& f, Value<T> value, Location line = {}) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "atomics are of 4- or 8-byte integers");
  access(p, sizeof(T), kAtomic, line);
  const T old = *p;
  *p = f(old, value);
  return old;
}

}  // namespace simt

SIMT_RUNTIME inline void __syncthreads(SIMT_LINE) { simt::barrier(simt::Barrier::kSync, 0, line); }
SIMT_RUNTIME inline int __syncthreads_count(int p, SIMT_LINE) { return simt::barrier(simt::Barrier::kCount, p, line); }
SIMT_RUNTIME inline int __syncthreads_and(int p, SIMT_LINE) { return simt::barrier(simt::Barrier::kAnd, p, line); }
SIMT_RUNTIME inline int __syncthreads_or(int p, SIMT_LINE) { return simt::barrier(simt::Barrier::kOr, p, line); }
SIMT_RUNTIME inline void __syncwarp(uint32_t mask = ~0u, SIMT_LINE) { simt::sync_warp(mask, line); }
SIMT_RUNTIME inline void __threadfence() { simt::fence(); }
SIMT_RUNTIME inline void __threadfence_block() {}

template <class T>
SIMT_RUNTIME T __shfl_sync(uint32_t mask, T value, int source, int width = 32, SIMT_LINE) {
  const int base = simt::lane_id() & -width;
  return simt::shuffle(mask, value, base + (source & (width - 1)), line);
}
template <class T>
SIMT_RUNTIME T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_LINE) {
  const int lane = simt::lane_id(), base = lane & -width;
  return simt::shuffle(mask, value, lane - base < int(delta) ? lane : lane - int(delta), line);
}
template <class T>
SIMT_RUNTIME T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_LINE) {
  const int lane = simt::lane_id(), end = (lane & -width) + width;
  return simt::shuffle(mask, value, lane + int(delta) < end ? lane + int(delta) : lane, line);
}
template <class T>
SIMT_RUNTIME T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, SIMT_LINE) {
  const int lane = simt::lane_id(), end = (lane & -width) + width;
  return simt::shuffle(mask, value, (lane ^ lane_mask) < end ? lane ^ lane_mask : lane, line);
}

SIMT_RUNTIME inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_LINE) {
  return simt::word_operation(mask, simt::ballot, predicate, line);
}
SIMT_RUNTIME inline int __any_sync(uint32_t mask, int predicate, SIMT_LINE) {
  return __ballot_sync(mask, predicate, line) != 0;
}
SIMT_RUNTIME inline int __all_sync(uint32_t mask, int predicate, SIMT_LINE) {
  return __ballot_sync(mask, !predicate, line) == 0;
}
template <class T>
SIMT_RUNTIME uint32_t __match_any_sync(uint32_t mask, T value, SIMT_LINE) {
  uint64_t word = 0;
  __builtin_memcpy(&word, &value, sizeof value);
  return simt::word_operation(mask, simt::match_any, word, line);
}
#define SIMT_REDUCE(name, operation, type)                                           \
  SIMT_RUNTIME inline type name(uint32_t mask, type value, SIMT_LINE) {              \
    return type(simt::word_operation(mask, simt::operation, uint32_t(value), line)); \
  }
SIMT_REDUCE(__reduce_add_sync, reduce_add, uint32_t)
SIMT_REDUCE(__reduce_add_sync, reduce_add, int)
SIMT_REDUCE(__reduce_min_sync, reduce_min, uint32_t)
SIMT_REDUCE(__reduce_min_sync, reduce_min_signed, int)
SIMT_REDUCE(__reduce_max_sync, reduce_max, uint32_t)
SIMT_REDUCE(__reduce_max_sync, reduce_max_signed, int)
SIMT_REDUCE(__reduce_and_sync, reduce_and, uint32_t)
SIMT_REDUCE(__reduce_or_sync, reduce_or, uint32_t)
SIMT_REDUCE(__reduce_xor_sync, reduce_xor, uint32_t)
#undef SIMT_REDUCE
SIMT_RUNTIME inline uint32_t __activemask() { return simt::active_mask(); }

#define SIMT_ATOMIC(name, expression)                                                            \
  template <class T>                                                                             \
  SIMT_RUNTIME T name(T* p, simt::Value<T> value, SIMT_LINE) {                                   \
    return simt::rmw(p, [](T old, T value) SIMT_RUNTIME { return T(expression); }, value, line); \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicMax, old < value ? value : old)
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
SIMT_ATOMIC(atomicExch, ((void)old, value))
SIMT_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef SIMT_ATOMIC
template <class T>
SIMT_RUNTIME T atomicCAS(T* p, simt::Value<T> expected, simt::Value<T> value, SIMT_LINE) {
  return simt::rmw(p, [expected](T old, T value) SIMT_RUNTIME { return old == expected ? value : old; }, value, line);
}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline void __stcg(T* p, T value) {
  *p = value;
}
template <class T>
inline void __stcs(T* p, T value) {
  *p = value;
}

namespace simt {
template <class To, class From>
SIMT_RUNTIME To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace simt
inline uint32_t __float_as_uint(float x) { return simt::bit_cast<uint32_t>(x); }
inline int __float_as_int(float x) { return simt::bit_cast<int>(x); }
inline float __uint_as_float(uint32_t x) { return simt::bit_cast<float>(x); }
inline float __int_as_float(int x) { return simt::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bit_cast<double>(x); }

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(uint32_t(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline uint32_t __brev(uint32_t x) {
  uint32_t reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

// Approximate functions are exact here.
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline double rsqrt(double x) { return 1. / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

// Of a NaN and a number, CUDA's min and max give the number.
template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "error"; }

// Whole-struct assignments are hooked by the compiler; calls of these are not, so they come to simt_race.cpp by name.
// Wants -fno-builtin-memcpy and so on, lest small ones become moves.
#ifdef __SANITIZE_THREAD__
extern "C" {
void* memcpy(void*, const void*, size_t) __asm__("simt_memcpy");
void* memmove(void*, const void*, size_t) __asm__("simt_memmove");
void* memset(void*, int, size_t) __asm__("simt_memset");
}
#endif

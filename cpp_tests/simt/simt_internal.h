// What the parts of the emulator share: the threads and the block that run, and the hooks of the race build.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;  // with red zones around every local array
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// A suspended fiber: its stack pointer, and what AddressSanitizer wants to know of its stack.
struct Context {
  void* stack_pointer = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

struct Copy {
  unsigned char* shared;
  const unsigned char* global;
  int bytes, source_bytes;
  Location line;
};

enum class State : uint8_t { kReady, kBarrier, kWarp, kFinished };

struct Thread {
  uint3 index;
  int linear, lane, warp;
  State state;
  bool in_kernel;
  Location line;  // of the barrier or warp operation that it waits at
  Context context;
  char* stack;

  uint32_t mask;  // of the warp operation
  Operation operation;
  void* data;

  std::deque<Copy> copies;  // cp.async: the groups in order, then those not committed
  std::deque<size_t> groups;
  size_t committed = 0;

  uint32_t clocks[32];  // race build: the own clock, and the clocks of the warp's lanes at the last __syncwarp
};

struct Launch {
  const void* function;  // null if translated
  const char* name;      // mangled, null until needed
  dim3 grid, block;
  size_t shared_bytes;
  void (*run)(const void* call);
  const void* call;
};

struct Block {
  const Launch* launch = nullptr;
  uint32_t linear = 0;
  std::vector<Thread> threads;
  int live = 0;
  uint32_t epoch = 0;  // barriers passed
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0, static_shared_bytes = 0;
};

extern Block block;
extern Thread* current;

uint64_t random_number();
void maybe_preempt();  // lets another thread run, as often as config.preempt says

// simt_report.cpp
struct Symbol {
  std::string name;
  uintptr_t begin;
  size_t bytes;
};
std::string symbol_at(uintptr_t address);                         // mangled; empty if none begins there
std::vector<Symbol> writable_objects(const std::string& prefix);  // whose mangled names begin so
std::string kernel_name(const Launch& launch);                    // mangled
std::string demangle(const std::string& name);                    // without the parameter list
std::string source_line(uintptr_t return_address);                // "file:line" of the call
uintptr_t image_base();

// A place in the code in 32 bits: a call's return address from the image's base, or a Location.
uint32_t site_of(Location line);
uint32_t site_of(const void* return_address);
std::string describe(uint32_t site);  // "file:line"
std::string describe(Location line);
std::string coordinates(uint64_t linear, uint3 extent);  // "(x,y,z)"
const char* verb(int kind);                              // of an AccessKind
// Whether a fault of this kind is new at these places; counts it if not.
bool first_report(const char* kind, uint32_t site, uint32_t other = 0);

// simt_race.cpp
namespace race {
#ifdef SIMT_RACE
void add_global(void* p, size_t bytes);
void remove_global(void* p);
void mark_init(void* p, size_t bytes);
void begin_launch();
void begin_block();
void enter_shared(const Symbol& variable);
void pass_barrier();
void sync_lanes(int warp, uint32_t active);
void fence();
void begin_copy(Thread& thread, const Copy& copy);
void end_copy(Thread& thread, const Copy& copy);
void check(Thread& thread, const void* p, size_t bytes, int kind, Location line);
#else
inline void add_global(void*, size_t) {}
inline void remove_global(void*) {}
inline void mark_init(void*, size_t) {}
inline void begin_launch() {}
inline void begin_block() {}
inline void enter_shared(const Symbol&) {}
inline void pass_barrier() {}
inline void sync_lanes(int, uint32_t) {}
inline void fence() {}
inline void begin_copy(Thread&, const Copy&) {}
inline void end_copy(Thread&, const Copy&) {}
inline void check(Thread&, const void*, size_t, int, Location) {}
#endif
}  // namespace race

}  // namespace simt

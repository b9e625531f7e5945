// Fibers, the scheduler of a block, barriers, warp operations and launches.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>

#include "simt_internal.h"
#include "simt_metrics.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

// simt.h declares these constant, under the same symbols.
uint3 thread_index asm("threadIdx"), block_index asm("blockIdx");
uint3 block_extent asm("blockDim"), grid_extent asm("gridDim");

Config config;  // without a constructor to run, as static objects of other files set it
Block block;
Thread* current = nullptr;
uint32_t block_generation = 0;

// Fibers -------------------------------------------------------------------------------------------------------------

// simt_switch(save, to): pushes the registers that a call must preserve, stores the stack pointer in *save, continues
// on the stack `to`, which another simt_switch or start_fiber has left in the same form. Twenty times faster than
// swapcontext, which saves the signal mask by a system call.
#ifndef __x86_64__
#error "simt_switch is written for x86-64"
#endif
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.p2align 4
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace {

Context main_context;
Context* switched_from;

// Continues `to`; returns when something continues `from`, never if that is `finished`.
void switch_context(Context& from, Context& to, bool finished) {
  switched_from = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(finished ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
  (void)finished;
  simt_switch(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

char* new_stack() {
  constexpr size_t kGuard = 4096;
  void* stack =
      mmap(nullptr, kStackBytes + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED || mprotect(stack, kGuard, PROT_NONE) != 0) std::abort();
  return static_cast<char*>(stack) + kGuard;
}

void start_fiber(Thread& thread, void (*entry)()) {
  // Stacks begin at different lines of a page, else all would compete for the same lines of the cache.
  char* top = thread.stack + kStackBytes - 64 - thread.linear % 16 * 192;
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;  // aligns the stack as after a call
  *--stack = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  thread.context = {stack, thread.stack, kStackBytes, nullptr};
}

// The scheduler ------------------------------------------------------------------------------------------------------

// Threads that can run, in a ring; a seed picks them at random.
class ReadyQueue {
 public:
  void reset(size_t threads) {
    size_t slots = 1;
    while (slots < threads) slots *= 2;
    ring_.resize(slots);
    begin_ = end_ = 0;
  }
  void push(Thread* thread) { ring_[end_++ & (ring_.size() - 1)] = thread; }
  Thread* pop() {
    if (begin_ == end_) return nullptr;
    Thread*& first = ring_[begin_ & (ring_.size() - 1)];
    if (random_) std::swap(first, ring_[(begin_ + random_number() % (end_ - begin_)) & (ring_.size() - 1)]);
    ++begin_;
    return first;
  }
  void set_random(bool random) { random_ = random; }

 private:
  std::vector<Thread*> ring_;
  size_t begin_ = 0, end_ = 0;
  bool random_ = false;
};

bool same_place(Location a, Location b) {
  return a.line == b.line && (a.file == b.file || (a.file && b.file && std::strcmp(a.file, b.file) == 0));
}

struct BarrierState {
  int arrived, predicates;
  Barrier kind;
  Location line;
  int result;
};

ReadyQueue ready;
bool random_order;
uint64_t random_state;
BarrierState barrier_state;
uint32_t warp_running[32], warp_waiting[32];  // lanes

uint64_t environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? std::strtoull(value, nullptr, 10) : 0;
}

uint64_t seed() {
  static const uint64_t base = environment("SIMT_SEED");
  return base + config.seed;
}

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  ready.push(&thread);
}

// Runs another thread, or the launch if none can run. Returns when this thread is picked again.
void suspend() {
  Thread* from = current;
  Thread* next = ready.pop();
  if (next == from) return;
  current = next;
  if (next) thread_index = next->index;
  switch_context(from->context, next ? next->context : main_context, from->state == State::kFinished);
}

void yield() {
  make_ready(*current);
  suspend();
}

void release_barrier() {
  BarrierState& b = barrier_state;
  b.result = b.kind == Barrier::kCount ? b.predicates
             : b.kind == Barrier::kAnd ? b.predicates == b.arrived
                                       : b.predicates > 0;
  b.arrived = b.predicates = 0;
  ++block.epoch;
  race::pass_barrier();
  for (Thread& thread : block.threads)
    if (thread.state == State::kBarrier) make_ready(thread);
}

bool complete_operation(Thread& waiting);

void leave_kernel() {
  Thread& thread = *current;
  thread.in_kernel = false;
  if (!thread.copies.empty()) report("cp-async", "a thread returns while its asynchronous copies are in flight");
  thread.state = State::kFinished;
  --block.live;
  warp_running[thread.warp] &= ~(1u << thread.lane);
  for (int lane = 0; lane < 32; ++lane)
    if (warp_waiting[thread.warp] >> lane & 1 && complete_operation(block.threads[thread.warp * 32 + lane])) break;
  const BarrierState& b = barrier_state;
  if (b.arrived == 0 || b.arrived < block.live) return;
  if (config.strict_exit && first_report("barrier-after-exit", site_of(b.line)))
    report("barrier-after-exit", "a thread returns while %d others wait in the barrier at %s", b.arrived,
           describe(b.line).c_str());
  release_barrier();
}

// The first frame of a fiber. It has no red zones that an abandoned frame would leave behind on its stack.
__attribute__((no_sanitize("address"))) void run_thread() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &switched_from->stack_bottom, &switched_from->stack_bytes);
#endif
  block.launch->run(block.launch->call);
  leave_kernel();
  suspend();
  std::abort();
}

}  // namespace

uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void maybe_preempt() {
  static const uint64_t base = environment("SIMT_PREEMPT");
  const uint64_t every = config.preempt > 0 ? uint64_t(config.preempt) : base;
  if (every > 0 && random_number() % every == 0) yield();
}

void enter_kernel() { current->in_kernel = true; }

int barrier(Barrier kind, int predicate, Location line) {
  BarrierState& b = barrier_state;
  if (b.arrived == 0) {
    b.kind = kind;
    b.line = line;
  } else if ((b.kind != kind || !same_place(b.line, line)) &&
             first_report("divergent-barrier", site_of(b.line), site_of(line))) {
    report("divergent-barrier", "threads of one block wait at %s and at %s for the same barrier",
           describe(b.line).c_str(), describe(line).c_str());
  }
  const int returned = int(block.threads.size()) - block.live;
  if (returned > 0 && config.strict_exit && first_report("barrier-after-exit", site_of(line)))
    report("barrier-after-exit", "a barrier at %s after %d threads of the block have returned", describe(line).c_str(),
           returned);
  ++b.arrived;
  b.predicates += predicate != 0;
  current->state = State::kBarrier;
  current->line = line;
  if (b.arrived >= block.live) release_barrier();
  suspend();
  return b.result;  // the next barrier cannot complete before this thread comes to it
}

void fence() { race::fence(); }

// Warp operations ----------------------------------------------------------------------------------------------------

namespace {

bool same_operation(const Thread& a, const Thread& b) {
  return a.mask == b.mask && a.operation == b.operation && same_place(a.line, b.line);
}

// Compares with the first lane that waits, which is enough unless the warp is split in groups.
void check_same_operation(const Thread& thread) {
  const uint32_t waiting = warp_waiting[thread.warp];
  if (waiting == 0) return;
  const Thread& first = block.threads[size_t(thread.warp * 32 + __builtin_ctz(waiting))];
  const bool meet = first.mask >> thread.lane & 1 || thread.mask >> first.lane & 1;
  if (!meet || same_operation(first, thread)) return;
  if (first_report("warp-mismatch", site_of(first.line), site_of(thread.line)))
    report("warp-mismatch", "lanes %d and %d wait at %s with mask %08x and at %s with mask %08x", first.lane,
           thread.lane, describe(first.line).c_str(), first.mask, describe(thread.line).c_str(), thread.mask);
}

// Performs the operation that a thread waits at, if all lanes that take part have come. They become ready, except for
// the current one, which goes on.
bool complete_operation(Thread& waiting) {
  const int warp = waiting.warp;
  const uint32_t active = waiting.mask & warp_running[warp];
  if ((warp_waiting[warp] & active) != active) return false;
  Thread* threads = &block.threads[size_t(warp) * 32];
  void* data[32];
  for (int lane = 0; lane < 32; ++lane) {
    data[lane] = nullptr;
    if (!(active >> lane & 1)) continue;
    const Thread& other = threads[lane];
    if (!same_operation(other, waiting)) return false;  // reported when the later one came
    data[lane] = other.data;
  }
  waiting.operation(data, active);
  warp_waiting[warp] &= ~active;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(active >> lane & 1)) continue;
    if (&threads[lane] == current)
      current->state = State::kReady;
    else
      make_ready(threads[lane]);
  }
  return true;
}

void order_memory(Lanes&, uint32_t active) { race::sync_lanes(current->warp, active); }

}  // namespace

void warp_operation(uint32_t mask, Operation operation, void* data, Location line) {
  Thread& thread = *current;
  const uint32_t own = 1u << thread.lane;
  if (!(mask & own) && first_report("warp-mask", site_of(line)))
    report("warp-mask", "lane %d is not in the mask %08x that it passes at %s", thread.lane, mask,
           describe(line).c_str());
  thread.mask = mask | own;
  thread.operation = operation;
  thread.data = data;
  thread.line = line;
  thread.state = State::kWarp;
  check_same_operation(thread);
  warp_waiting[thread.warp] |= own;
  if (!complete_operation(thread)) {
    suspend();
  } else if (random_order && random_number() % 4 == 0) {
    yield();
  }
}

void sync_warp(uint32_t mask, Location line) { warp_operation(mask, order_memory, nullptr, line); }
uint32_t active_mask() { return warp_running[current->warp]; }
int lane_id() { return current->lane; }

// Blocks and launches ------------------------------------------------------------------------------------------------

namespace {

void start_threads(dim3 extent) {
  const size_t count = size_t(extent.x) * extent.y * extent.z;
  static std::vector<char*> stacks;
  while (stacks.size() < count) stacks.push_back(new_stack());
  block.threads.resize(count);
  ready.reset(count);
  std::fill_n(warp_running, 32, 0);
  std::fill_n(warp_waiting, 32, 0);
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.index = {unsigned(i % extent.x), unsigned(i / extent.x % extent.y), unsigned(i / extent.x / extent.y)};
    thread.linear = int(i);
    thread.lane = int(i % 32);
    thread.warp = int(i / 32);
    thread.in_kernel = false;
    thread.stack = stacks[i];
    thread.copies.clear();
    thread.groups.clear();
    thread.committed = 0;
    std::fill_n(thread.clocks, 32, 0);
    thread.clocks[thread.lane] = 1;
    warp_running[thread.warp] |= 1u << thread.lane;
    start_fiber(thread, run_thread);
    make_ready(thread);
  }
  block.live = int(count);
}

std::string waiting_places() {
  std::map<std::string, int> places;
  for (const Thread& thread : block.threads)
    if (thread.state == State::kBarrier)
      ++places["the barrier at " + describe(thread.line)];
    else if (thread.state == State::kWarp)
      ++places["the warp operation at " + describe(thread.line)];
  std::string out;
  for (const auto& [place, count] : places)
    out += (out.empty() ? "" : ", ") + std::to_string(count) + (count == 1 ? " waits in " : " wait in ") + place;
  return out;
}

// Returns false if threads wait for each other.
bool run_block(uint32_t linear) {
  const Launch& launch = *block.launch;
  const dim3 grid = launch.grid;
  block.linear = linear;
  block.epoch = 1;
  block.static_shared_bytes = 0;
  block_index = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
  ++block_generation;
  random_order = seed() != 0;
  random_state = (seed() + 1) * 0x9E3779B97F4A7C15ull ^ (linear + 1) * 0xD1B54A32D192ED03ull;
  ready.set_random(random_order);
  barrier_state = {};
  if (block.shared_bytes) std::memset(block.shared, 0xff, block.shared_bytes);
  race::begin_block();
  start_threads(launch.block);
  current = ready.pop();
  thread_index = current->index;
  switch_context(main_context, current->context, false);
  current = nullptr;
  if (block.live == 0) return true;
  report("deadlock", "no thread can run: %s", waiting_places().c_str());
#ifdef __SANITIZE_ADDRESS__
  for (Thread& thread : block.threads) __asan_unpoison_memory_region(thread.stack, kStackBytes);
#endif
  return false;
}

// Exactly the bytes of the launch, between bytes that no kernel may touch.
void allocate_dynamic_shared(size_t bytes) {
  static void* buffer = nullptr;
  std::free(buffer);
  buffer = nullptr;
  block.shared = nullptr;
  block.shared_bytes = bytes;
  if (bytes == 0) return;
#ifdef __SANITIZE_ADDRESS__
  constexpr size_t kMargin = 0;
#else
  constexpr size_t kMargin = 1024;
#endif
  if (posix_memalign(&buffer, 1024, bytes + 2 * kMargin) != 0) std::abort();
  block.shared = static_cast<unsigned char*>(buffer) + kMargin;
}

std::vector<uint32_t> block_order(size_t count) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (seed() == 0 || !config.shuffle_blocks) return order;
  random_state = seed() * 0x9E3779B97F4A7C15ull | 1;
  for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  return order;
}

cudaError_t refuse(cudaError_t error, const char* message, size_t got, size_t limit) {
  report("launch", "%s: %zu, limit %zu", message, got, limit);
  return error;
}

// Shared memory, static and dynamic, that any kernel may have, whatever a test sets as the limit.
constexpr size_t kAlwaysShared = 48 << 10;

// `shared` is what the launch asks for; of a translated kernel also its static part.
cudaError_t check_limits(dim3 grid, dim3 extent, size_t shared, bool translated) {
  const size_t threads = size_t(extent.x) * extent.y * extent.z;
  const size_t limit = std::max(size_t(config.max_shared_bytes), translated ? kAlwaysShared : 0);
  if (threads == 0) return refuse(cudaErrorInvalidConfiguration, "no threads in a block", 0, 1024);
  if (threads > 1024 || extent.z > 64)
    return refuse(cudaErrorInvalidConfiguration, "threads of a block", threads, 1024);
  if (grid.x > 0x7fffffff) return refuse(cudaErrorInvalidConfiguration, "gridDim.x", grid.x, 0x7fffffff);
  if (grid.y > 65535) return refuse(cudaErrorInvalidConfiguration, "gridDim.y", grid.y, 65535);
  if (grid.z > 65535) return refuse(cudaErrorInvalidConfiguration, "gridDim.z", grid.z, 65535);
  if (shared > limit) return refuse(cudaErrorInvalidValue, "bytes of shared memory", shared, limit);
  return cudaSuccess;
}

cudaError_t run_grid(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  block.launch = &launch;
  grid_extent = {launch.grid.x, launch.grid.y, launch.grid.z};
  block_extent = {launch.block.x, launch.block.y, launch.block.z};
  block_index = {};
  cudaError_t error = check_limits(launch.grid, launch.block, launch.shared_bytes, !launch.function);
  if (error == cudaSuccess) {
    allocate_dynamic_shared(launch.shared_bytes);
    race::begin_launch();
    for (const uint32_t linear : block_order(size_t(launch.grid.x) * launch.grid.y * launch.grid.z)) {
      if (!run_block(linear)) error = cudaErrorLaunchFailure;
      const size_t shared = launch.shared_bytes + block.static_shared_bytes;
      const size_t limit = std::max(size_t(config.max_shared_bytes), kAlwaysShared);
      if (shared > limit)
        error = refuse(cudaErrorInvalidValue, "static and dynamic bytes of shared memory", shared, limit);
      if (error != cudaSuccess) break;
    }
  }
  block.launch = nullptr;
  return error;
}

std::map<std::string, Translated>& translated_kernels() {
  static std::map<std::string, Translated> kernels;
  return kernels;
}

struct TranslatedCall {
  void (*run)(const unsigned char* params);
  const unsigned char* params;

  static void start(const void* call) {
    const TranslatedCall& self = *static_cast<const TranslatedCall*>(call);
    enter_kernel();
    self.run(self.params);
  }
};

}  // namespace

std::string kernel_name(const Launch& launch) {
  return launch.name ? launch.name : symbol_at(reinterpret_cast<uintptr_t>(launch.function));
}

cudaError_t launch_source(const void* function, dim3 grid, dim3 extent, size_t shared, void (*run)(const void* call),
                          const void* call) {
  return run_grid({function, nullptr, grid, extent, shared, run, call});
}

cudaError_t launch_translated(const Translated& kernel, const Params& params, dim3 grid, dim3 extent, size_t shared) {
  if (params.size != kernel.param_bytes) {
    report("params", "%s takes %zu bytes of parameters, got %zu", kernel.name, kernel.param_bytes, params.size);
    return cudaErrorInvalidValue;
  }
  const TranslatedCall call{kernel.run, params.bytes};
  const cudaError_t error =
      run_grid({nullptr, kernel.name, grid, extent, kernel.static_shared_bytes + shared, TranslatedCall::start, &call});
  if (config.metrics) metrics::print(kernel.name);
  return error;
}

void register_translated(const Translated& kernel) { translated_kernels()[kernel.name] = kernel; }

const Translated* find_translated(const char* name) {
  const auto it = translated_kernels().find(name);
  return it == translated_kernels().end() ? nullptr : &it->second;
}

const Translated* find_translated(const void* function) {
  if (translated_kernels().empty() && !config.require_translated) return nullptr;
  const std::string name = symbol_at(reinterpret_cast<uintptr_t>(function));
  const Translated* found = find_translated(name.c_str());
  if (!found && config.require_translated) report("untranslated", "no translation of kernel %s", name.c_str());
  return found;
}

}  // namespace simt

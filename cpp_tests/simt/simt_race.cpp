// The race build: the kernels are compiled by -fsanitize=thread,alignment, but linked to the hooks below instead of
// those libraries. Each access is checked for bounds, alignment, initialised memory and asynchronous copies in flight,
// and against the accesses before it: two accesses to the same bytes, not both reads or both atomic, must be ordered.
//
// What orders accesses: a thread's own order; __syncthreads (a block's epochs); __syncwarp within its warp (clocks, one
// a lane); between blocks, a __threadfence before an atomic operation, and one after a later atomic operation on the
// same address that the other block performs; and the ends of launches. Shuffles, votes and atomics alone do not.
//
// Of each word the last write is kept, the last two reads and the last two atomics by different threads, of different
// warps where there were some: whatever a later access races with, it races with one of these (unless __syncwarp with
// partial masks has ordered just those).
#ifdef SIMT_RACE

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <memory>
#include <unordered_map>

#include "simt_internal.h"
#include "simt_metrics.h"

namespace simt {

namespace {

// Shadow memory ------------------------------------------------------------------------------------------------------

enum class Space { kGlobal, kDynamicShared, kStaticShared };

struct Stamp {
  uint32_t block = 0;  // linear index + 1; 0 for none
  uint32_t epoch = 0, site = 0;
  uint32_t thread : 10, clock : 22;
};
using Stamps = Stamp[2];  // of different threads, the newest first

// All zero at first. A line of the cache; the stamps of atomics, which few cells have, are elsewhere.
struct alignas(64) Cell {
  uint32_t generation;  // of the launch or block that the stamps are from
  uint32_t atomics;     // index + 1 of the region's
  Stamp write;
  Stamps reads;
};
struct AtomicStamps {
  Stamps stamps = {};
};

constexpr uint8_t kInitialised = 1, kPending = 2;

struct Region {
  Space space;
  uintptr_t begin, end;
  std::string name;
  int shift = 2;  // bytes of a cell: 4 until a smaller access comes
  Cell* cells = nullptr;
  std::vector<AtomicStamps> atomics;
  std::vector<uint8_t> state;  // of each byte

  Region(Space space, uintptr_t begin, size_t bytes, std::string name)
      : space(space), begin(begin), end(begin + bytes), name(std::move(name)), state(bytes) {
    cells = allocate(shift);
  }
  ~Region() { munmap(cells, count(shift) * sizeof(Cell)); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  uintptr_t base() const { return begin & ~uintptr_t(7); }
  size_t count(int cell_shift) const { return ((end - base()) >> cell_shift) + 1; }
  Cell* allocate(int cell_shift) const {  // pages that are never touched cost nothing
    void* p = mmap(nullptr, count(cell_shift) * sizeof(Cell), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::abort();
    return static_cast<Cell*>(p);
  }
  // Halves the cells until they are no larger than the access.
  void refine(size_t granule) {
    for (; (size_t(1) << shift) > granule; --shift) {
      Cell* finer = allocate(shift - 1);
      for (size_t i = 0; i < count(shift); ++i) {
        if (cells[i].generation == 0) continue;
        Cell* halves = finer + 2 * i;
        halves[0] = cells[i];
        if (2 * i + 1 == count(shift - 1)) break;
        halves[1] = cells[i];
        if (cells[i].atomics == 0) continue;
        atomics.push_back(atomics[cells[i].atomics - 1]);
        halves[1].atomics = uint32_t(atomics.size());
      }
      munmap(cells, count(shift) * sizeof(Cell));
      cells = finer;
    }
  }
  uint32_t generation() const;
  Cell& current_cell(uintptr_t address) {
    Cell& cell = cells[(address - base()) >> shift];
    if (cell.generation == generation()) return cell;
    cell.generation = generation();
    cell.write = cell.reads[0] = cell.reads[1] = Stamp();
    if (cell.atomics) atomics[cell.atomics - 1] = AtomicStamps();
    return cell;
  }
  Stamps& atomics_of(Cell& cell) {
    if (cell.atomics == 0) {
      atomics.emplace_back();
      cell.atomics = uint32_t(atomics.size());
    }
    return atomics[cell.atomics - 1].stamps;
  }
};

uint32_t launch_generation = 0;
std::map<uintptr_t, std::unique_ptr<Region>> regions;
Region* recent[64];  // by address

uint32_t Region::generation() const { return space == Space::kGlobal ? launch_generation : block_generation; }

Region* find_region(uintptr_t address) {
  Region*& cached = recent[address >> 10 & 63];
  if (cached && address - cached->begin < cached->end - cached->begin) return cached;
  auto it = regions.upper_bound(address);
  if (it == regions.begin()) return nullptr;
  Region* region = std::prev(it)->second.get();
  if (address >= region->end) return nullptr;
  return cached = region;
}

void remove_region(uintptr_t begin) {
  regions.erase(begin);
  std::fill(std::begin(recent), std::end(recent), nullptr);
}

Region& add_region(Space space, uintptr_t begin, size_t bytes, std::string name) {
  remove_region(begin);
  return *(regions[begin] = std::make_unique<Region>(space, begin, bytes, std::move(name)));
}

bool in_read_only_segment(uintptr_t address) {
  static const std::vector<std::pair<uintptr_t, uintptr_t>> segments = [] {
    std::vector<std::pair<uintptr_t, uintptr_t>> found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            if (segment.p_type != PT_LOAD || segment.p_flags & PF_W) continue;
            const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
            static_cast<decltype(found)*>(out)->emplace_back(begin, begin + segment.p_memsz);
          }
          return 0;
        },
        &found);
    return found;
  }();
  return std::any_of(segments.begin(), segments.end(),
                     [&](const auto& segment) { return address >= segment.first && address < segment.second; });
}

std::string region_name(const Region& region) {
  static const char* const kSpaces[] = {"global memory", "dynamic shared memory", "static shared memory"};
  return kSpaces[int(region.space)] + (region.name.empty() ? "" : " `" + region.name + "`");
}

std::string place(const Region& region, uintptr_t address) {
  return "byte " + std::to_string(address - region.begin) + " of " + region_name(region);
}

void report_out_of_bounds(uintptr_t address, size_t bytes, int kind, uint32_t site) {
  if (!first_report("oob", site)) return;
  const Region* nearest = nullptr;
  const auto after = regions.upper_bound(address);
  constexpr uintptr_t kNear = 4096;
  if (after != regions.begin() && address - std::prev(after)->second->end < kNear)
    nearest = std::prev(after)->second.get();
  else if (const Region* inside = find_region(address))
    nearest = inside;
  else if (after != regions.end() && after->first - address < kNear)
    nearest = after->second.get();
  const std::string line = describe(site);
  if (!nearest) {
    report("oob-wild", "%s of %zu bytes at %p, which is not device memory, shared memory or the thread's own, at %s",
           verb(kind), bytes, reinterpret_cast<void*>(address), line.c_str());
    return;
  }
  const long long offset = static_cast<long long>(address) - static_cast<long long>(nearest->begin);
  report(nearest->space == Space::kGlobal ? "oob-global" : "oob-shared",
         "%s of %zu bytes at offset %lld of the %zu bytes of %s, at %s", verb(kind), bytes, offset,
         size_t(nearest->end - nearest->begin), region_name(*nearest).c_str(), line.c_str());
}

// Order between blocks -----------------------------------------------------------------------------------------------

// The accesses of a block that precede its fences: all of the epochs before `epoch`, and of each thread those up to a
// clock.
struct Released {
  uint32_t block = 0, epoch = 0;
  std::vector<uint32_t> clocks;

  void merge(const Thread& thread, uint32_t fence_epoch, const std::array<uint32_t, 32>& lanes) {
    epoch = std::max(epoch, fence_epoch);
    clocks.resize(block_threads());
    for (int lane = 0; lane < 32; ++lane) {
      const size_t other = size_t(thread.warp) * 32 + size_t(lane);
      if (other < clocks.size()) clocks[other] = std::max(clocks[other], lanes[size_t(lane)]);
    }
  }
  bool covers(const Stamp& stamp) const {
    return stamp.epoch < epoch || (stamp.thread < clocks.size() && stamp.clock <= clocks[stamp.thread]);
  }
  static size_t block_threads() { return simt::block.threads.size(); }
};

struct Fence {
  int thread;
  std::array<uint32_t, 32> clocks;
};

// What an atomic operation saw of other blocks. The own block may rely on it after a fence.
struct Acquired {
  std::vector<std::shared_ptr<const Released>> by_block;
  uintptr_t address;
  int thread;
  uint32_t epoch, clock;
  uint32_t fence_epoch = 0;            // the first with a fence
  std::vector<uint32_t> fence_clocks;  // by thread; 0 before its fence
};

Released fenced_before;          // by fences of earlier epochs of this block
std::vector<Fence> fences;       // of this epoch
std::vector<Acquired> acquired;  // by this block
std::unordered_map<uintptr_t, std::vector<std::shared_ptr<const Released>>> released;  // by address, in this launch

// Whether a barrier, __syncwarp or the own order makes what `thread` did at this time precede what `now` does.
inline bool precedes(uint32_t epoch, uint32_t clock, int thread, const Thread& now) {
  if (epoch < block.epoch || thread == now.linear) return true;
  return thread / 32 == now.warp && clock <= now.clocks[thread % 32];
}

bool may_rely_on(const Acquired& entry, const Thread& now) {
  if (entry.fence_epoch == 0) return false;
  if (entry.fence_epoch < block.epoch || entry.fence_clocks[size_t(now.linear)] > 0) return true;
  for (size_t lane = 0, i = size_t(now.warp) * 32; lane < 32 && i < entry.fence_clocks.size(); ++lane, ++i)
    if (entry.fence_clocks[i] > 0 && entry.fence_clocks[i] <= now.clocks[lane]) return true;
  return false;
}

bool ordered_by_atomics(const Stamp& stamp, const Thread& now) {
  for (const Acquired& entry : acquired) {
    const Released* from = entry.by_block[stamp.block - 1].get();
    if (from && from->covers(stamp) && may_rely_on(entry, now)) return true;
  }
  return false;
}

inline bool ordered(const Stamp& stamp, const Thread& now) {
  if (stamp.block == block.linear + 1) return precedes(stamp.epoch, stamp.clock, int(stamp.thread), now);
  return ordered_by_atomics(stamp, now);
}

void acquire(const Thread& thread, uintptr_t address) {
  const auto it = released.find(address);
  if (it == released.end()) return;
  const dim3 grid = block.launch->grid;
  Acquired entry{{}, address, thread.linear, block.epoch, thread.clocks[thread.lane], 0, {}};
  entry.by_block.resize(size_t(grid.x) * grid.y * grid.z);
  for (const auto& release : it->second) entry.by_block[release->block - 1] = release;
  for (Acquired& older : acquired)
    if (older.address == address && older.thread == thread.linear && older.fence_epoch == 0) {
      older = std::move(entry);
      return;
    }
  acquired.push_back(std::move(entry));
}

void release(const Thread& thread, uintptr_t address) {
  Released own = fenced_before;
  for (const Fence& fence : fences)
    if (fence.thread == thread.linear) own.merge(thread, block.epoch, fence.clocks);
  if (own.epoch == 0) return;
  own.block = block.linear + 1;
  auto& all = released[address];
  if (!all.empty() && all.back()->block == own.block && all.back()->clocks == own.clocks) return;
  all.push_back(std::make_shared<const Released>(std::move(own)));
}

// The check ----------------------------------------------------------------------------------------------------------

void report_race(const Region& region, uintptr_t address, const Stamp& before, int before_kind, int kind,
                 uint32_t site) {
  if (!first_report("race", site, before.site)) return;
  const bool same_block = before.block == block.linear + 1;
  std::string who = "thread " + coordinates(before.thread, blockDim);
  if (!same_block) who += " of block " + coordinates(before.block - 1, gridDim);
  report("race", "%s: %s by %s at %s, then %s at %s without %s between", place(region, address).c_str(),
         verb(before_kind), who.c_str(), describe(before.site).c_str(), verb(kind), describe(site).c_str(),
         same_block ? "a barrier" : "fences and an atomic of both blocks");
}

// Keeps the newest stamp first, behind it one of another thread, of another warp if there is one.
void remember(Stamps& kept, const Stamp& stamp, const Thread& now) {
  const Stamp old = kept[0];
  kept[0] = stamp;
  if (!old.block || (old.block == stamp.block && old.thread == stamp.thread)) return;
  const Stamp& other = kept[1];
  const bool other_elsewhere =
      other.block && !ordered(other, now) && (other.block != stamp.block || other.thread / 32 != stamp.thread / 32);
  if (!other_elsewhere) kept[1] = old;
}

struct Access {
  Thread& thread;
  Region& region;
  int kind;
  uint32_t site;
  bool reported = false;

  void against(const Stamp& before, int before_kind, uintptr_t address) {
    if (reported || !before.block || ordered(before, thread)) return;
    reported = true;
    report_race(region, address, before, before_kind, kind, site);
  }

  void update(uintptr_t address) {
    Cell& cell = region.current_cell(address);
    against(cell.write, kWrite, address);
    if (kind != kRead)
      for (const Stamp& stamp : cell.reads) against(stamp, kRead, address);
    if (kind != kAtomic && cell.atomics)
      for (const Stamp& stamp : region.atomics_of(cell)) against(stamp, kAtomic, address);
    const Stamp stamp{block.linear + 1, block.epoch, site, uint32_t(thread.linear), thread.clocks[thread.lane]};
    if (kind == kWrite)
      cell.write = stamp;
    else
      remember(kind == kRead ? cell.reads : region.atomics_of(cell), stamp, thread);
  }
};

void check_state(Region& region, uintptr_t address, size_t bytes, int kind, uint32_t site) {
  uint8_t* state = &region.state[address - region.begin];
  uint8_t all = kInitialised, any = 0;
  for (size_t i = 0; i < bytes; ++i) {
    all &= state[i];
    any |= state[i];
  }
  if (any & kPending && first_report("cp-async", site))
    report("cp-async", "%s of %s before cp_async_wait covers the copy, at %s", verb(kind),
           place(region, address).c_str(), describe(site).c_str());
  if (kind != kWrite && !all && first_report("uninit", site))
    report("uninit", "%s of %s before it was written, at %s", verb(kind), place(region, address).c_str(),
           describe(site).c_str());
  if (kind != kRead && !all)
    for (size_t i = 0; i < bytes; ++i) state[i] |= kInitialised;
}

void update_cells(Thread& thread, Region& region, uintptr_t address, size_t bytes, int kind, uint32_t site) {
  region.refine((address | bytes) & 1 ? 1 : (address | bytes) & 2 ? 2 : 4);
  Access access{thread, region, kind, site};
  const size_t step = size_t(1) << region.shift;
  for (uintptr_t at = address; at < address + bytes; at += step) access.update(at);
}

void check_access(Thread& thread, uintptr_t address, size_t bytes, int kind, uint32_t site) {
  if (address - reinterpret_cast<uintptr_t>(thread.stack) < kStackBytes || bytes == 0) return;
  Region* region = find_region(address);
  if (!region || address + bytes > region->end) {
    if (kind != kRead || !in_read_only_segment(address)) report_out_of_bounds(address, bytes, kind, site);
    return;
  }
  check_state(*region, address, bytes, kind, site);
  update_cells(thread, *region, address, bytes, kind, site);
  if (kind == kAtomic && region->space == Space::kGlobal) {
    acquire(thread, address);
    release(thread, address);
  }
}

void hook(const void* p, size_t bytes, int kind, const void* pc) {
  if (!current || !current->in_kernel) return;
  maybe_preempt();
  check_access(*current, reinterpret_cast<uintptr_t>(p), bytes, kind, site_of(pc));
}

}  // namespace

namespace race {

void add_global(void* p, size_t bytes) { add_region(Space::kGlobal, reinterpret_cast<uintptr_t>(p), bytes, ""); }
void remove_global(void* p) { remove_region(reinterpret_cast<uintptr_t>(p)); }

void mark_init(void* p, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  Region* region = find_region(begin);
  if (region) std::memset(&region->state[begin - region->begin], kInitialised, std::min(bytes, region->end - begin));
}

void begin_launch() {
  static uintptr_t previous = 0;
  if (previous) remove_region(previous);
  previous = reinterpret_cast<uintptr_t>(block.shared);
  if (previous) add_region(Space::kDynamicShared, previous, block.shared_bytes, "");
  ++launch_generation;
  released.clear();
}

void begin_block() {
  if (block.shared) {
    auto& state = regions[reinterpret_cast<uintptr_t>(block.shared)]->state;
    std::fill(state.begin(), state.end(), uint8_t(0));
  }
  fenced_before = Released();
  fences.clear();
  acquired.clear();
}

void enter_shared(const Symbol& variable) {
  const auto it = regions.find(variable.begin);
  if (it == regions.end())
    add_region(Space::kStaticShared, variable.begin, variable.bytes, variable.name);
  else
    std::fill(it->second->state.begin(), it->second->state.end(), uint8_t(0));
}

void pass_barrier() {
  for (const Fence& fence : fences)
    fenced_before.merge(block.threads[size_t(fence.thread)], block.epoch - 1, fence.clocks);
  fences.clear();
}

void sync_lanes(int warp, uint32_t active) {
  Thread* threads = &block.threads[size_t(warp) * 32];
  uint32_t newest[32] = {};
  for (int lane = 0; lane < 32; ++lane)
    if (active >> lane & 1)
      for (int i = 0; i < 32; ++i) newest[i] = std::max(newest[i], threads[lane].clocks[i]);
  for (int lane = 0; lane < 32; ++lane)
    if (active >> lane & 1) {
      std::copy_n(newest, 32, threads[lane].clocks);
      ++threads[lane].clocks[lane];
    }
}

void fence() {
  Thread& thread = *current;
  Fence own{thread.linear, {}};
  std::copy_n(thread.clocks, 32, own.clocks.begin());
  fences.push_back(own);
  for (Acquired& entry : acquired) {
    if (!precedes(entry.epoch, entry.clock, entry.thread, thread)) continue;
    if (entry.fence_epoch == 0) {
      entry.fence_epoch = block.epoch;
      entry.fence_clocks.resize(block.threads.size());
    }
    uint32_t& clock = entry.fence_clocks[size_t(thread.linear)];
    if (clock == 0) clock = thread.clocks[thread.lane];
  }
  ++thread.clocks[thread.lane];
}

// The destination of a copy is written at any time between the two: when it is issued, and when it is waited for.
void begin_copy(Thread& thread, const Copy& copy) {
  if (copy.source_bytes > 0) check(thread, copy.global, size_t(copy.source_bytes), kRead, copy.line);
  check(thread, copy.shared, size_t(copy.bytes), kWrite, copy.line);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(copy.shared);
  Region* region = find_region(begin);
  if (!region || begin + size_t(copy.bytes) > region->end) return;
  for (int i = 0; i < copy.bytes; ++i) region->state[begin - region->begin + size_t(i)] |= kPending;
  if (region->space == Space::kGlobal && first_report("cp-async", site_of(copy.line)))
    report("cp-async", "the destination is not in shared memory, at %s", describe(copy.line).c_str());
}

void end_copy(Thread& thread, const Copy& copy) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(copy.shared);
  Region* region = find_region(begin);
  if (!region || begin + size_t(copy.bytes) > region->end) return;
  for (int i = 0; i < copy.bytes; ++i) region->state[begin - region->begin + size_t(i)] &= uint8_t(~kPending);
  update_cells(thread, *region, begin, size_t(copy.bytes), kWrite, site_of(copy.line));
}

void check(Thread& thread, const void* p, size_t bytes, int kind, Location line) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  const uint32_t site = site_of(line);
  if (address % bytes != 0 && first_report("misaligned", site))
    report("misaligned", "%s of %zu bytes at %p, at %s", verb(kind), bytes, p, describe(line).c_str());
  check_access(thread, address, bytes, kind, site);
  if (!config.metrics || block.linear > 0 || line.file) return;
  if (const Region* region = find_region(address))
    metrics::note(thread.linear, line.line, address, bytes, kind, region->space != Space::kGlobal);
}

}  // namespace race

}  // namespace simt

// What -fsanitize=thread calls.
#define SIMT_HOOK(name, bytes, kind) \
  extern "C" void name(void* p) { simt::hook(p, bytes, simt::kind, __builtin_return_address(0)); }
#define SIMT_HOOKS(bytes)                               \
  SIMT_HOOK(__tsan_read##bytes, bytes, kRead)           \
  SIMT_HOOK(__tsan_write##bytes, bytes, kWrite)         \
  SIMT_HOOK(__tsan_unaligned_read##bytes, bytes, kRead) \
  SIMT_HOOK(__tsan_unaligned_write##bytes, bytes, kWrite)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_read_range(void* p, size_t bytes) { simt::hook(p, bytes, simt::kRead, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { simt::hook(p, bytes, simt::kWrite, __builtin_return_address(0)); }
// The guard of a static array whose elements have a constructor.
char __tsan_atomic8_load(const volatile char* p, int) { return *p; }
// What -fsanitize=alignment calls where a pointer is not aligned for its type.
struct SimtTypeMismatch {
  const char* file;
  uint32_t line, column;
  const struct {
    uint16_t kind, info;
    char name[1];
  }* type;
  uint8_t log_alignment, use;
};
void __ubsan_handle_type_mismatch_v1(const SimtTypeMismatch* at, const void* p) {
  if (!simt::current || !simt::current->in_kernel) return;
  const simt::Location line(at->file, int(at->line));
  if (simt::first_report("misaligned", simt::site_of(line)))
    simt::report("misaligned", "%s at %p must be aligned to %d bytes, at %s", at->type->name, p, 1 << at->log_alignment,
                 simt::describe(line).c_str());
}
// What the kernels' copies and fills are renamed to (see the end of simt.h).
void* simt_memcpy(void* to, const void* from, size_t bytes) {
  simt::hook(from, bytes, simt::kRead, __builtin_return_address(0));
  simt::hook(to, bytes, simt::kWrite, __builtin_return_address(0));
  return std::memcpy(to, from, bytes);
}
void* simt_memmove(void* to, const void* from, size_t bytes) {
  simt::hook(from, bytes, simt::kRead, __builtin_return_address(0));
  simt::hook(to, bytes, simt::kWrite, __builtin_return_address(0));
  return std::memmove(to, from, bytes);
}
void* simt_memset(void* to, int value, size_t bytes) {
  simt::hook(to, bytes, simt::kWrite, __builtin_return_address(0));
  return std::memset(to, value, bytes);
}
}

#endif

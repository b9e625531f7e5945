#pragma GCC diagnostic ignored "-Wmisleading-indentation"
#pragma GCC diagnostic ignored "-Wunused-function"
// simt_rt.cpp - runtime of simt.h. Compiled WITHOUT -fsanitize=thread; it supplies the __tsan_* callbacks itself.
#include "simt.h"
#include "simt_metrics.h"
#include <algorithm>
#include <atomic>
#include <bitset>
#include <cstdarg>
#include <deque>
#include <link.h>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unordered_map>
#include <vector>
#include <execinfo.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif
__thread uint3 threadIdx, blockIdx, blockDim, gridDim;
namespace simt {
Config config;
long n_errors = 0, n_switch = 0, n_access = 0;
static std::string g_last;
static std::map<std::string, int> g_seen;
static std::mutex g_mu;
#if defined(SIMT_CHECK) && defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

#ifndef SIMT_UCONTEXT
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.p2align 4
.type simt_switch,@function
.globl simt_switch
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
#endif

struct PendCopy { void* d; const void* s; int n, sn; };
enum St : uint8_t { kReady, kBar, kWarp, kDone };
struct Thread {
  uint3 tid; int lin, lane, warp; St st; bool in_kernel, fenced;
  void* sp; char* stk; void* fake;
#ifdef SIMT_UCONTEXT
  ucontext_t uc;
#endif
  int line; int bar_id;
  uint32_t mask; WarpFn fn; Lane io; bool mem_order;
  uint32_t vc[32];
  std::deque<std::vector<PendCopy>> groups; std::vector<PendCopy> open;
};
struct Bar { int arrived = 0, want = 0, line = 0, cnt = 0, kind = 0; std::vector<Thread*> w; std::vector<int*> res; };
struct Block {
  std::vector<Thread> th; std::vector<int> ready; size_t head = 0; Bar bars[16]; int live = 0; uint32_t epoch = 1; uint32_t gen = 0; uint32_t lin_bid = 0;
  unsigned char* smem = nullptr; size_t smem_sz = 0; std::vector<unsigned char> smem_buf; uint64_t rng = 1; void* main_sp = nullptr; bool dead = false;
  std::vector<char*> stacks; void (*tramp)(void*) = nullptr; void* ctx = nullptr; void* main_fake = nullptr; const void* main_bot = nullptr; size_t main_sz = 0;
  std::vector<bool> seen_blocks; uint32_t wlive[32], wwait[32]; long switches = 0;
#ifdef SIMT_UCONTEXT
  ucontext_t main_uc;
#endif
};
static __thread Thread* cur = nullptr;
static __thread Block* blk = nullptr;
static uint32_t g_gen = 0;

void report(const char* kind, const char* fmt, ...) {
  char buf[700]; va_list ap; va_start(ap, fmt); vsnprintf(buf, sizeof buf, fmt, ap); va_end(ap);
  std::lock_guard<std::mutex> g(g_mu);
  ++n_errors; g_last = std::string(kind) + ": " + buf;
  if (g_seen[kind]++ < config.max_errors && config.max_errors > 0) {
    fprintf(stderr, "SIMT %s: %s", kind, buf);
    if (cur) fprintf(stderr, " [block %u,%u,%u thread %u,%u,%u]", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    fputc('\n', stderr);
  }
}
const char* last_error() { return g_last.c_str(); }
void reset_errors() { n_errors = 0; g_last.clear(); g_seen.clear(); }
static uint64_t rnd() { uint64_t& x = blk->rng; x ^= x << 13; x ^= x >> 7; x ^= x << 17; return x; }

// ---------------------------------------------------------------- fibers
static void to_main() {
  Thread* t = cur;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(t->st == kDone ? nullptr : &t->fake, blk->main_bot, blk->main_sz);
#endif
#ifdef SIMT_UCONTEXT
  swapcontext(&t->uc, &blk->main_uc);
#else
  simt_switch(&t->sp, blk->main_sp);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(t->fake, nullptr, nullptr);
#endif
}
static void on_exit_thread(Thread* t);
static void entry() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &blk->main_bot, &blk->main_sz);
#endif
  blk->tramp(blk->ctx);
  cur->in_kernel = false; on_exit_thread(cur); cur->st = kDone; to_main(); __builtin_trap();
}
static void resume(Thread* t) {
  cur = t; threadIdx = t->tid; ++blk->switches;
#ifdef __SANITIZE_ADDRESS__
  void* fake; __sanitizer_start_switch_fiber(&fake, t->stk, kStack);
#endif
#ifdef SIMT_UCONTEXT
  swapcontext(&blk->main_uc, &t->uc);
#else
  simt_switch(&blk->main_sp, t->sp);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  cur = nullptr;
}
static void make_ready(Thread* t) { t->st = kReady; blk->ready.push_back(t->lin); }
static void block_me(St s, int line) { cur->st = s; cur->line = line; to_main(); }

// ---------------------------------------------------------------- barriers
static void release(Bar& b) {
  int r = b.kind == 1 ? b.cnt : b.kind == 2 ? b.cnt == b.arrived : b.cnt > 0;
  for (int* p : b.res) *p = r;
  bool full = b.arrived == int(blk->th.size()) || b.arrived == blk->live;
  if (full) { ++blk->epoch; } else {   // named barrier over part of the block: join the warp clocks is not enough; be permissive
    ++blk->epoch;
  }
  for (Thread* t : b.w) if (t != cur) make_ready(t);
  b.w.clear(); b.res.clear(); b.arrived = b.cnt = b.line = 0;
}
void bar(int id, int count, int kind, int pred, int* res, int line) {
  Bar& b = blk->bars[id];
  int n = int(blk->th.size()), want = count ? count : n;
  if (b.arrived && (b.line != line || b.kind != kind)) report("divergent-barrier", "threads of one block wait at lines %d and %d for the same barrier", b.line, line);
  if (!count && blk->live < n) {
    if (config.strict_exit) report("barrier-after-exit", "__syncthreads at line %d while %d threads of the block have exited", line, n - blk->live);
    want = blk->live;
  }
  if (!b.arrived) { b.line = line; b.kind = kind; b.want = want; }
  ++b.arrived; b.cnt += pred; b.w.push_back(cur); if (res) b.res.push_back(res);
  cur->bar_id = id;
  if (b.arrived >= want) { release(b); if (config.seed) { make_ready(cur); to_main(); } return; }
  block_me(kBar, line);
}
// ---------------------------------------------------------------- warp collectives
static bool try_complete(Thread* any) {
  int w0 = any->warp * 32, n = int(blk->th.size()); Lane l[32] = {}; uint32_t m = 0;
  for (int i = 0; i < 32; ++i) if (any->mask >> i & 1) {
    if (w0 + i >= n) continue;
    Thread& o = blk->th[w0 + i];
    if (o.st == kDone) continue;
    if (o.st != kWarp) return false;
    if (o.mask != any->mask || o.fn != any->fn) {
      report("warp-mismatch", "lanes of warp %d wait at different warp operations or masks: line %d mask %08x / line %d mask %08x", any->warp, any->line, any->mask, o.line, o.mask);
      return false;
    }
    l[i] = o.io; m |= 1u << i;
  }
  any->fn(l, m); blk->wwait[any->warp] &= ~m;
  if (any->mem_order) {
    uint32_t j[32] = {};
    for (int i = 0; i < 32; ++i) if (m >> i & 1) for (int k = 0; k < 32; ++k) j[k] = std::max(j[k], blk->th[w0 + i].vc[k]);
    for (int i = 0; i < 32; ++i) if (m >> i & 1) { memcpy(blk->th[w0 + i].vc, j, sizeof j); ++blk->th[w0 + i].vc[i]; }
  }
  for (int i = 0; i < 32; ++i) if (m >> i & 1) { Thread* o = &blk->th[w0 + i]; if (o != cur) make_ready(o); else o->st = kReady; }
  return true;
}
void warp_op(uint32_t mask, WarpFn fn, const void* in, void* out, int line, bool mo) {
  Thread* t = cur;
  if (!(mask >> t->lane & 1)) report("warp-mask", "lane %d is not in its own mask %08x at line %d", t->lane, mask, line);
  t->mask = mask | (1u << t->lane); t->fn = fn; t->io = {in, out}; t->mem_order = mo; t->st = kWarp; t->line = line;
  blk->wwait[t->warp] |= 1u << t->lane;
  uint32_t lv = blk->wlive[t->warp], ww = blk->wwait[t->warp];
  if ((ww & t->mask & lv) != (t->mask & lv)) { to_main(); return; }      // somebody of the mask is still on the way
  if (try_complete(t)) { if (config.seed && (rnd() & 3) == 0) { make_ready(t); to_main(); } return; }
  to_main();
}
static void on_exit_thread(Thread* t) {
  --blk->live; t->st = kDone; blk->wlive[t->warp] &= ~(1u << t->lane);
  if (!t->open.empty() || !t->groups.empty()) report("cp-async", "thread exits with %zu cp.async groups not waited for", t->groups.size() + !t->open.empty());
  int w0 = t->warp * 32;
  for (int i = 0; i < 32 && w0 + i < int(blk->th.size()); ++i) { Thread& o = blk->th[w0 + i]; if (o.st == kWarp && try_complete(&o)) break; }
  Bar& b = blk->bars[0];
  if (b.arrived && b.arrived >= blk->live && blk->live) {
    if (config.strict_exit) report("barrier-after-exit", "thread exits while %d threads wait in __syncthreads at line %d", b.arrived, b.line);
    release(b);
  }
}
uint32_t active_mask() { uint32_t m = 0; int w0 = cur->warp * 32; for (int i = 0; i < 32 && w0 + i < int(blk->th.size()); ++i) if (blk->th[w0 + i].st != kDone) m |= 1u << i; return m; }
int lane_id() { return cur->lane; }
void nop_fn(Lane*, uint32_t) {}
void shfl_fn(Lane* l, uint32_t m) {
  for (int i = 0; i < 32; ++i) if (m >> i & 1) {
    const ShflIn& s = *(const ShflIn*)l[i].in; int w = s.width, base = i & ~(w - 1), src = i;
    if (s.mode == 0) src = base + (s.arg & (w - 1));
    else if (s.mode == 1) src = i - s.arg < base ? i : i - s.arg;
    else if (s.mode == 2) src = i + s.arg > base + w - 1 ? i : i + s.arg;
    else { src = i ^ s.arg; if (src > base + w - 1) src = i; }
    if (!(m >> src & 1)) { report("shfl-inactive", "lane %d reads lane %d, which is not active (mask %08x)", i, src, m); *(uint64_t*)l[i].out = 0x7ff7dead7fc0deadull; }
    else *(uint64_t*)l[i].out = ((const ShflIn*)l[src].in)->v;
  }
}
void vote_fn(Lane* l, uint32_t m) { uint32_t r = 0; for (int i = 0; i < 32; ++i) if ((m >> i & 1) && *(const int*)l[i].in) r |= 1u << i; for (int i = 0; i < 32; ++i) if (m >> i & 1) *(uint32_t*)l[i].out = r; }
void match_fn(Lane* l, uint32_t m) { for (int i = 0; i < 32; ++i) if (m >> i & 1) { uint32_t r = 0; for (int j = 0; j < 32; ++j) if ((m >> j & 1) && *(const uint64_t*)l[i].in == *(const uint64_t*)l[j].in) r |= 1u << j; *(uint32_t*)l[i].out = r; } }
template <class F> static void red(Lane* l, uint32_t m, F f) { bool first = true; uint32_t r = 0; for (int i = 0; i < 32; ++i) if (m >> i & 1) { uint32_t v = *(const uint32_t*)l[i].in; r = first ? v : f(r, v); first = false; } for (int i = 0; i < 32; ++i) if (m >> i & 1) *(uint32_t*)l[i].out = r; }
void red_add_fn(Lane* l, uint32_t m) { red(l, m, [](uint32_t a, uint32_t b) { return a + b; }); }
void red_max_fn(Lane* l, uint32_t m) { red(l, m, [](uint32_t a, uint32_t b) { return std::max(a, b); }); }
void red_min_fn(Lane* l, uint32_t m) { red(l, m, [](uint32_t a, uint32_t b) { return std::min(a, b); }); }
static float bf(uint32_t r, int i) { return __uint_as_float((i ? r & 0xffff0000u : r << 16)); }
template <int K, class FA, class FB> static void mma(Lane* l, uint32_t m, FA fa, FB fb) {
  if (m != ~0u) { report("mma", "mma.sync with mask %08x: all 32 lanes must take part", m); return; }
  static thread_local float A[16][K], B[K][8];
  for (int i = 0; i < 32; ++i) { const MmaIn& x = *(const MmaIn*)l[i].in; fa(A, x, i >> 2, i & 3); fb(B, x, i >> 2, i & 3); }
  for (int i = 0; i < 32; ++i) { const MmaIn& x = *(const MmaIn*)l[i].in; float* d = (float*)l[i].out;
    for (int q = 0; q < 4; ++q) { int r = (i >> 2) + 8 * (q >> 1), c = (i & 3) * 2 + (q & 1); double s = 0; for (int k = 0; k < K; ++k) s += double(A[r][k]) * B[k][c]; d[q] = float(s + x.c[q]); } }
}
void mma_tf32_fn(Lane* l, uint32_t m) {
  auto t = [](uint32_t u) { return __uint_as_float(u & 0xffffe000u); };     // the hardware drops the low 13 bits
  mma<8>(l, m, [&](auto& A, const MmaIn& x, int g, int t4) { A[g][t4] = t(x.a[0]); A[g + 8][t4] = t(x.a[1]); A[g][t4 + 4] = t(x.a[2]); A[g + 8][t4 + 4] = t(x.a[3]); },
         [&](auto& B, const MmaIn& x, int g, int t4) { B[t4][g] = t(x.b[0]); B[t4 + 4][g] = t(x.b[1]); });
}
static float hf(uint32_t r, int i) { uint16_t h = uint16_t(i ? r >> 16 : r); __half_raw x; x.x = h; return __half2float(__half(x)); }
void mma_f16_fn(Lane* l, uint32_t m) {
  mma<16>(l, m, [](auto& A, const MmaIn& x, int g, int t) { for (int r = 0; r < 4; ++r) for (int i = 0; i < 2; ++i) A[g + 8 * (r & 1)][2 * t + i + 8 * (r >> 1)] = hf(x.a[r], i); },
          [](auto& B, const MmaIn& x, int g, int t) { for (int r = 0; r < 2; ++r) for (int i = 0; i < 2; ++i) B[2 * t + i + 8 * r][g] = hf(x.b[r], i); });
}
void mma_bf16_fn(Lane* l, uint32_t m) {
  mma<16>(l, m, [](auto& A, const MmaIn& x, int g, int t) { for (int r = 0; r < 4; ++r) for (int i = 0; i < 2; ++i) A[g + 8 * (r & 1)][2 * t + i + 8 * (r >> 1)] = bf(x.a[r], i); },
          [](auto& B, const MmaIn& x, int g, int t) { for (int r = 0; r < 2; ++r) for (int i = 0; i < 2; ++i) B[2 * t + i + 8 * r][g] = bf(x.b[r], i); });
}
static void matrix_access(const void* p, size_t n, const Lane& lane);
void ldmatrix_fn(Lane* l, uint32_t m) {
  if (m != ~0u) { report("ldmatrix", "mask %08x", m); return; }
  if (const int site = ((const LdmIn*)l[0].in)->site; site && config.metrics && blk->lin_bid == 0)
    for (int q = 0; q < 4; ++q) {
      uintptr_t rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = (uintptr_t)((const LdmIn*)l[8 * q + i].in)->row;
      metrics::note_rows(site, rows);
    }
  for (int q = 0; q < 4; ++q) for (int i = 0; i < 32; ++i) {
    const char* row = (const char*)((const LdmIn*)l[q * 8 + i / 4].in)->row;
    if ((uintptr_t)row & 15) report("misaligned", "ldmatrix row address %p", row);
    if (!((const LdmIn*)l[i].in)->trans) { matrix_access(row + 4 * (i & 3), 4, l[i]); memcpy((uint32_t*)l[i].out + q, row + 4 * (i & 3), 4); continue; }
    for (int h = 0; h < 2; ++h) { const char* rr = (const char*)((const LdmIn*)l[q * 8 + 2 * (i & 3) + h].in)->row; matrix_access(rr + 2 * (i >> 2), 2, l[i]); memcpy((uint16_t*)((uint32_t*)l[i].out + q) + h, rr + 2 * (i >> 2), 2); }
  }
}
static void set_pend(void* d, int n, bool v);
// ---------------------------------------------------------------- cp.async: the copy happens as LATE as allowed
void cp_async(void* d, const void* s, int n, int sn, int site) {
  if (((uintptr_t)d | (uintptr_t)s) & (n - 1)) report("misaligned", "cp.async %d bytes: dst %p src %p", n, d, s);
  if (sn) access(s, sn, 0, site);
  access(d, n, 1, site); memset(d, 0xff, n); set_pend(d, n, true);
  cur->open.push_back({d, s, n, sn});
}
void cp_async_commit() { cur->groups.push_back(std::move(cur->open)); cur->open.clear(); }
void cp_async_wait(int n) {
  while (int(cur->groups.size()) > n) {
    for (auto& c : cur->groups.front()) { set_pend(c.d, c.n, false); access(c.d, c.n, 1); memset(c.d, 0, c.n); memcpy(c.d, c.s, c.sn); }
    cur->groups.pop_front();
  }
}
void* dynamic_shared() { return blk->smem; }
void enter_kernel() { cur->in_kernel = true; }

// ---------------------------------------------------------------- memory checks (race mode)
struct Alloc { char* p; size_t n; };
static std::map<uintptr_t, size_t> g_alloc;
static std::vector<std::pair<uintptr_t, uintptr_t>> g_rw, g_ro;
struct Acc { uint32_t tid1 = 0, blk = 0, ep = 0, clk = 0; void* pc = nullptr; };
struct Cell { uint32_t gen = 0; bool init = false, pend = false; Acc w, r[2], a; };
static std::unordered_map<uintptr_t, Cell*> g_pages;           // one page of cells per 4 KiB
constexpr uintptr_t kGran = 2;
static uint32_t g_launch = 0;
static std::unordered_map<uintptr_t, std::vector<bool>> g_sync;
static __thread uintptr_t lp = 0; static __thread Cell* lc = nullptr;   // one-entry cache
static Cell& cell(uintptr_t a) {
  uintptr_t pg = a >> 12;
  if (pg != lp || !lc) { Cell*& c = g_pages[pg]; if (!c) c = new Cell[4096 / kGran]; lc = c; lp = pg; }
  return lc[(a & 4095) / kGran];
}
static void set_pend(void* d, int n, bool v) {
#ifdef SIMT_RACE
  for (uintptr_t a = (uintptr_t)d; a < (uintptr_t)d + n; a += kGran) cell(a).pend = v;
#else
  (void)d; (void)n; (void)v;
#endif
}
// Forgets what is known of a range that an allocation takes or leaves (it may have been a block's shared memory); the
// other buffers stay initialised.
static void forget(uintptr_t begin, size_t bytes) {
  for (uintptr_t a = begin & ~(kGran - 1); a < begin + bytes;) {
    if (!g_pages.count(a >> 12)) { a = ((a >> 12) + 1) << 12; continue; }
    cell(a) = Cell();
    a += kGran;
  }
}
void* dev_malloc(size_t n) { char* p = (char*)aligned_alloc(256, (n + 255) / 256 * 256);
#ifdef __SANITIZE_ADDRESS__
  free(p); p = nullptr; if (posix_memalign((void**)&p, 256, n)) return nullptr;   // exact size: redzone right after the last byte
#endif
  memset(p, 0xff, n); g_alloc[(uintptr_t)p] = n; forget((uintptr_t)p, n); return p; }
void dev_free(void* p) {
  const auto it = g_alloc.find((uintptr_t)p);
  if (it != g_alloc.end()) { forget(it->first, it->second); g_alloc.erase(it); }
  free(p);
}
void mark_init(void* p, size_t n) {
#ifdef SIMT_RACE
  for (uintptr_t a = (uintptr_t)p; a < (uintptr_t)p + n; a += kGran) { Cell& c = cell(a); c = Cell(); c.init = true; c.gen = 0; }
#else
  (void)p; (void)n;
#endif
}
void fence() { cur->fenced = true; }
static bool ordered(const Acc& a, bool global) {
  if (global && a.blk != blk->lin_bid + 1) return a.blk - 1 < blk->seen_blocks.size() && blk->seen_blocks[a.blk - 1];
  if (a.ep < blk->epoch) return true;
  int o = int(a.tid1) - 1; if (o == cur->lin) return true;
  return o / 32 == cur->warp && cur->vc[o & 31] >= a.clk;
}
static bool is_site(void* pc) { return (uintptr_t)pc < 1 << 24; }  // a line of PTX, see access
static void where(void* pc, char* out, size_t n) { if (is_site(pc)) { snprintf(out, n, "PTX line %d", int((uintptr_t)pc)); return; } Dl_info i; if (dladdr(pc, &i)) snprintf(out, n, "+0x%lx", (unsigned long)((uintptr_t)pc - (uintptr_t)i.dli_fbase - 1)); else snprintf(out, n, "?"); }
static void check(const void* p, size_t n, int kind, void* pc, bool noted = true) {
  Thread* t = cur; uintptr_t a = (uintptr_t)p; ++n_access;
  if (a >= (uintptr_t)t->stk && a < (uintptr_t)t->stk + kStack) return;
  for (const uint3* v : {&threadIdx, &blockIdx, &blockDim, &gridDim}) if (a - (uintptr_t)v < sizeof(uint3)) return;
  char pcs[64]; bool global = false, shared = false; const char* what = "global";
  auto it = g_alloc.upper_bound(a);
  if (it != g_alloc.begin() && (--it, a < it->first + it->second + 0) && a >= it->first) {
    global = true;
    if (a + n > it->first + it->second) { where(pc, pcs, 64); report("oob-global", "%zu-byte access at offset %zu of an allocation of %zu bytes, pc %s", n, a - it->first, it->second, pcs); return; }
  } else if (a >= (uintptr_t)blk->smem && a < (uintptr_t)blk->smem + blk->smem_sz) {
    shared = true; what = "dynamic shared";
    if (a + n > (uintptr_t)blk->smem + blk->smem_sz) { where(pc, pcs, 64); report("oob-shared", "past the %zu bytes of dynamic shared memory, pc %s", blk->smem_sz, pcs); return; }
  } else {
    for (auto& r : g_rw) if (a >= r.first && a < r.second) { shared = true; what = "static shared"; break; }
    if (!shared) { if (!kind) for (auto& r : g_ro) if (a >= r.first && a < r.second) return;
      where(pc, pcs, 64); report("oob-wild", "%s of %zu bytes at %p: not device memory, shared memory or the thread's own stack, pc %s", kind ? "write" : "read", n, p, pcs); return; }
  }
  if (n > 1 && (n & (n - 1)) == 0 && (a & (n - 1))) { where(pc, pcs, 64); report("misaligned", "%zu-byte access at %p, pc %s", n, p, pcs); }
  if (config.metrics && noted && is_site(pc) && blk->lin_bid == 0) metrics::note(t->lin, int((uintptr_t)pc), a, n, kind, shared);
  Acc me; me.tid1 = t->lin + 1; me.blk = blk->lin_bid + 1; me.ep = blk->epoch; me.clk = t->vc[t->lane]; me.pc = pc;
  uint32_t gen = global ? g_launch : blk->gen; bool said = false;
  auto bad = [&](const Acc& o, const char* k) {
    if (said || !o.tid1) return; said = true; char q[64]; where(pc, pcs, 64); where(o.pc, q, 64);
    report("race", "%s memory, %s: thread %d (block %u) pc %s / thread %d pc %s, no barrier between", what, k, int(o.tid1) - 1, o.blk - 1, q, t->lin, pcs); };
  for (uintptr_t b = a & ~(kGran - 1); b < a + n; b += kGran) {
    Cell& c = cell(b);
    if (c.gen != gen) { bool i = global && c.init; c = Cell(); c.gen = gen; c.init = i; }
    if (!kind) {
      if (c.pend && !said) { said = true; where(pc, pcs, 64); report("cp-async", "%s memory read before cp.async.wait_group covers the copy, pc %s", what, pcs); }
      if (!c.init && !said) { said = true; where(pc, pcs, 64); report("uninit", "%s memory read before it was written, pc %s", what, pcs); }
      if (c.w.tid1 && !ordered(c.w, global)) bad(c.w, "write then read");
      if (c.a.tid1 && !ordered(c.a, global)) bad(c.a, "atomic then read");
      if (c.r[0].tid1 && c.r[0].tid1 != me.tid1 && (!c.r[1].tid1 || ordered(c.r[1], global) || (c.r[0].tid1 - 1) / 32 != uint32_t(t->warp) || c.r[0].blk != me.blk)) c.r[1] = c.r[0];
      c.r[0] = me;
    } else {
      if (c.w.tid1 && !ordered(c.w, global)) bad(c.w, kind == 1 ? "write then write" : "write then atomic");
      for (auto& r : c.r) if (r.tid1 && !ordered(r, global)) bad(r, kind == 1 ? "read then write" : "read then atomic");
      if (kind == 1 && c.a.tid1 && !ordered(c.a, global)) bad(c.a, "atomic then write");
      if (kind == 2 && !c.init && !said) { said = true; where(pc, pcs, 64); report("uninit", "atomic on %s memory before it was written, pc %s", what, pcs); }
      (kind == 1 ? c.w : c.a) = me; c.init = true;
    }
  }
  if (kind == 2 && global && t->fenced) {            // release/acquire through __threadfence + atomic
    auto& s = g_sync[a]; auto& m = blk->seen_blocks; size_t nb = m.size(); if (s.size() != nb) s.assign(nb, false);
    m[blk->lin_bid] = true; for (size_t i = 0; i < nb; ++i) { bool x = s[i] || m[i]; s[i] = x; m[i] = x; }
  }
  if (config.preempt && rnd() % uint64_t(config.preempt) == 0) { make_ready(t); to_main(); }
}
static void matrix_access(const void* p, size_t n, const Lane& lane) {
#ifdef SIMT_RACE
  const int site = ((const LdmIn*)lane.in)->site;
  if (cur && cur->in_kernel) check(p, n, 0, site ? (void*)(uintptr_t)site : __builtin_return_address(0), false);
#else
  (void)p; (void)n; (void)lane;
#endif
}
void access(const void* p, size_t n, int kind, int site) {
#ifdef SIMT_RACE
  if (cur && cur->in_kernel) check(p, n, kind, site ? (void*)(uintptr_t)site : __builtin_return_address(0));
#else
  (void)p; (void)n; (void)kind; (void)site;
#endif
}
#ifdef SIMT_RACE
#define HOOK(name, n, k) extern "C" void name(void* p) { if (cur && cur->in_kernel) check(p, n, k, __builtin_return_address(0)); }
}  // namespace simt
namespace simt {
#define HOOKS(n) HOOK(__tsan_read##n, n, 0) HOOK(__tsan_write##n, n, 1) HOOK(__tsan_volatile_read##n, n, 0) HOOK(__tsan_volatile_write##n, n, 1)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
#define UHOOKS(n) HOOK(__tsan_unaligned_read##n, n, 0) HOOK(__tsan_unaligned_write##n, n, 1)
UHOOKS(2) UHOOKS(4) UHOOKS(8) UHOOKS(16)
extern "C" void __tsan_read_range(void* p, size_t n) { if (cur && cur->in_kernel) check(p, n, 0, __builtin_return_address(0)); }
extern "C" void __tsan_write_range(void* p, size_t n) { if (cur && cur->in_kernel) check(p, n, 1, __builtin_return_address(0)); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_vptr_read(void*) {}
#endif
// ---------------------------------------------------------------- one block, the grid
static void run_block(Block& B, dim3 bd, uint3 bid, uint32_t lin) {
  blk = &B; blockIdx = bid; blockDim = {bd.x, bd.y, bd.z};
  size_t n = size_t(bd.x) * bd.y * bd.z;
  if (B.th.size() != n) { B.th.clear(); B.th.resize(n); }
  while (B.stacks.size() < n) { char* s = (char*)mmap(nullptr, kStack + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); mprotect(s, 4096, PROT_NONE); B.stacks.push_back(s + 4096); }
  B.ready.clear(); B.head = 0; B.live = int(n); B.epoch = 1; B.gen = __atomic_add_fetch(&g_gen, 1, __ATOMIC_RELAXED); B.lin_bid = lin; B.dead = false;
  for (auto& b : B.bars) b = Bar();
  memset(B.wlive, 0, sizeof B.wlive); memset(B.wwait, 0, sizeof B.wwait);
  for (size_t i = 0; i < n; ++i) B.wlive[i >> 5] |= 1u << (i & 31);
  B.rng = (config.seed + 1) * 0x9E3779B97F4A7C15ull ^ (lin + 1) * 0xD1B54A32D192ED03ull;
  if (B.smem_sz) memset(B.smem, 0xff, B.smem_sz);          // NaN / -1: use of unwritten shared memory shows
  B.seen_blocks.assign(size_t(gridDim.x) * gridDim.y * gridDim.z, false);
  for (size_t i = 0; i < n; ++i) {
    Thread& t = B.th[i]; t.lin = int(i); t.lane = int(i & 31); t.warp = int(i >> 5); t.tid = {unsigned(i % bd.x), unsigned(i / bd.x % bd.y), unsigned(i / bd.x / bd.y)};
    t.in_kernel = t.fenced = false; t.stk = B.stacks[i]; t.fake = nullptr; memset(t.vc, 0, sizeof t.vc); t.vc[t.lane] = 1; t.groups.clear(); t.open.clear();
#ifdef SIMT_UCONTEXT
    getcontext(&t.uc); t.uc.uc_stack.ss_sp = t.stk; t.uc.uc_stack.ss_size = kStack; t.uc.uc_link = nullptr; makecontext(&t.uc, entry, 0);
#else
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(t.stk, kStack);     // frames abandoned by the previous block
#endif
    void** sp = (void**)(t.stk + kStack - 64); *--sp = nullptr; *--sp = (void*)entry; for (int k = 0; k < 6; ++k) *--sp = nullptr; t.sp = sp;
#endif
    make_ready(&t);
  }
  for (size_t done = 0; done < n;) {
    if (B.head == B.ready.size()) {
      char buf[400]; int o = snprintf(buf, sizeof buf, "no thread can run;"); int shown = 0;
      for (auto& t : B.th) if (t.st != kDone && shown++ < 4) o += snprintf(buf + o, sizeof buf - o, " thread %d waits at line %d (%s)", t.lin, t.line, t.st == kBar ? "block barrier" : "warp operation");
      report("deadlock", "%s", buf); break;
    }
    if (B.head > 4096) { B.ready.erase(B.ready.begin(), B.ready.begin() + B.head); B.head = 0; }
    if (config.seed) std::swap(B.ready[B.head], B.ready[B.head + rnd() % (B.ready.size() - B.head)]);
    Thread* t = &B.th[B.ready[B.head++]];
    resume(t);
    if (t->st == kDone) ++done;
  }
  __atomic_add_fetch(&n_switch, B.switches, __ATOMIC_RELAXED); B.switches = 0;
  blk = nullptr;
}
void run_grid(dim3 g, dim3 b, size_t smem, void (*tramp)(void*), void* ctx) {
  ++g_launch;
#ifdef SIMT_RACE
  if (g_rw.empty()) dl_iterate_phdr([](dl_phdr_info* i, size_t, void*) { for (int k = 0; k < i->dlpi_phnum; ++k) { auto& h = i->dlpi_phdr[k]; if (h.p_type == PT_LOAD) (h.p_flags & PF_W ? g_rw : g_ro).push_back({i->dlpi_addr + h.p_vaddr, i->dlpi_addr + h.p_vaddr + h.p_memsz}); } return 0; }, nullptr);
  g_sync.clear();
#endif
  if (size_t(b.x) * b.y * b.z > 1024 || b.x * b.y * b.z == 0 || g.y > 65535 || g.z > 65535 || g.x == 0 || smem > 227 * 1024) { report("launch", "invalid configuration: block %u,%u,%u grid %u,%u,%u shared %zu", b.x, b.y, b.z, g.x, g.y, g.z, smem); return; }
  size_t nb = size_t(g.x) * g.y * g.z; std::vector<uint32_t> order(nb);
  for (size_t i = 0; i < nb; ++i) order[i] = uint32_t(i);
  if (config.seed && config.shuffle_blocks) { uint64_t x = config.seed * 0x9E3779B97F4A7C15ull | 1; for (size_t i = nb; i > 1; --i) { x ^= x << 13; x ^= x >> 7; x ^= x << 17; std::swap(order[i - 1], order[x % i]); } }
  std::atomic<size_t> next{0};
  auto work = [&] {
    static thread_local Block B;
    gridDim = {g.x, g.y, g.z}; B.tramp = tramp; B.ctx = ctx; B.smem_sz = smem;
#ifdef __SANITIZE_ADDRESS__
    free(B.smem); B.smem = nullptr; if (smem && posix_memalign((void**)&B.smem, 256, smem)) abort();
#else
    if (B.smem_buf.size() < smem + 256) B.smem_buf.resize(smem + 256);
    B.smem = (unsigned char*)(((uintptr_t)B.smem_buf.data() + 255) & ~uintptr_t(255));
#endif
    for (size_t i; (i = next++) < nb;) { uint32_t l = order[i]; run_block(B, b, {l % g.x, l / g.x % g.y, l / g.x / g.y}, l); }
  };
#ifdef SIMT_CHECK
  work();
#else
  std::vector<std::thread> th; for (int i = 1; i < config.threads; ++i) th.emplace_back(work);
  work(); for (auto& t : th) t.join();
#endif
}
// ---------------------------------------------------------------- translated kernels
static std::map<std::string, Translated>& translated_kernels() { static std::map<std::string, Translated> kernels; return kernels; }
void register_translated(const Translated& kernel) { translated_kernels()[kernel.name] = kernel; }
const Translated* find_translated(const char* name) {
  const auto it = translated_kernels().find(name);
  return it == translated_kernels().end() ? nullptr : &it->second;
}
const Translated* find_translated(const void* function) {
  if (translated_kernels().empty() && !config.require_translated) return nullptr;
  Dl_info info = {};
  const char* name = dladdr(function, &info) && info.dli_sname && info.dli_saddr == function ? info.dli_sname : "(no symbol)";
  const Translated* found = find_translated(name);
  if (!found && config.require_translated) report("untranslated", "no translation of kernel %s", name);
  return found;
}
cudaError_t launch_translated(const Translated& kernel, const Params& params, dim3 g, dim3 b, size_t smem) {
  if (params.size != kernel.param_bytes) {
    report("params", "%s takes %zu bytes of parameters, got %zu", kernel.name, kernel.param_bytes, params.size);
    return cudaErrorInvalidValue;
  }
  struct Context { void (*run)(const unsigned char*); const unsigned char* params; } context{kernel.run, params.bytes};
  run_grid(g, b, kernel.static_shared_bytes + smem, [](void* p) {
    const Context& c = *static_cast<Context*>(p);
    enter_kernel();
    c.run(c.params);
  }, &context);
  if (config.metrics) metrics::print(kernel.name);
  return cudaSuccess;
}
}  // namespace simt

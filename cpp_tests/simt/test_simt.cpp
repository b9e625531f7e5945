// The emulator: right kernels give right results without reports, under every schedule; each planted fault is reported
// by name in the builds that can see it; fragments are where the hardware has them.
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include "../cuda/testing_cuda.h"
#include "test_kernels.h"

namespace {

using simt_test::Fault;
using testing::Device;

constexpr bool kRace =
#ifdef SIMT_RACE
    true;
#else
    false;
#endif
constexpr bool kAsan =
#ifdef __SANITIZE_ADDRESS__
    true;
#else
    false;
#endif

// Each runs a kernel, with a fault or without, and returns whether its results are right.
// ------------------------------

std::vector<float> numbers(int64_t count) {
  std::vector<float> out(count);
  for (int64_t i = 0; i < count; ++i) out[i] = float(i * 7 % 23 - 11);
  return out;
}

std::vector<__nv_bfloat16> bf16_numbers(int64_t count) {
  std::vector<__nv_bfloat16> out;
  for (const float x : numbers(count)) out.push_back(__float2bfloat16_rn(x));
  return out;
}

// a [m, k] b [n, k]^T of small integers, so exact in every precision.
template <class T>
std::vector<float> exact_product(const std::vector<T>& a, const std::vector<T>& b, int m, int n, int k) {
  std::vector<float> c(m * n);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j)
      for (int l = 0; l < k; ++l) c[i * n + j] += float(a[i * k + l]) * float(b[j * k + l]);
  return c;
}

bool product(Fault fault) {
  constexpr int kSize = 40;
  const std::vector<float> a = numbers(kSize * kSize), b = testing::random_vector<float>(kSize * kSize);
  const Device<float> a_device(a), b_device(b), c(kSize * kSize);
  if (simt_test::product(fault, a_device, b_device, c, kSize) != cudaSuccess) return false;
  for (int i = 0; i < kSize; ++i)
    for (int j = 0; j < kSize; ++j) {
      testing::Sum want;
      for (int k = 0; k < kSize; ++k) want.add((long double)(a[i * kSize + k]) * b[k * kSize + j]);
      if (!testing::near(c.get()[i * kSize + j], want)) return false;
    }
  return true;
}

bool mma_product(Fault fault) {
  constexpr int kDepth = 128;
  const auto a = bf16_numbers(64 * kDepth), b = bf16_numbers(64 * kDepth);
  const Device<__nv_bfloat16> a_device(a), b_device(b);
  const Device<float> c(64 * 64);
  if (simt_test::mma_product(fault, a_device, b_device, c, kDepth) != cudaSuccess) return false;
  return c.host() == exact_product(a, b, 64, 64, kDepth);
}

bool block_sums(Fault fault) {
  constexpr int kBlocks = 3;
  const std::vector<float> x = numbers(kBlocks * 256);
  const Device<float> x_device(x), out(kBlocks);
  if (simt_test::block_sums(fault, x_device, kBlocks, out) != cudaSuccess) return false;
  std::vector<float> want(kBlocks);
  for (size_t i = 0; i < x.size(); ++i) want[i / 256] += x[i];
  return out.host() == want;
}

bool last_block_sum(Fault fault) {
  constexpr int kBlocks = 12;
  const std::vector<float> x = numbers(kBlocks * 256);
  const Device<float> x_device(x), partial(kBlocks), out(1);
  const Device<unsigned> ticket(std::vector<unsigned>{0});
  if (simt_test::last_block_sum(fault, x_device, kBlocks, partial, ticket, out) != cudaSuccess) return false;
  float want = 0;
  for (const float value : x) want += value;
  return out.get()[0] == want;
}

bool histogram(Fault fault) {
  std::vector<unsigned> x, want(16);
  for (unsigned i = 0; i < 500; ++i) x.push_back(i * i * 2654435761u >> 7), ++want[15 - x.back() % 16];
  const Device<unsigned> x_device(x), counts(std::vector<unsigned>(16, 0)), ticket(std::vector<unsigned>{0}), out(16);
  const cudaError_t error = simt_test::histogram(fault, x_device, int(x.size()), counts, ticket, out);
  return error == cudaSuccess && out.host() == want;
}

bool reverse_warp(Fault fault) {
  const std::vector<float> x = numbers(32);
  const Device<float> x_device(x), y(32);
  return simt_test::reverse_warp(fault, x_device, y) == cudaSuccess &&
         y.host() == std::vector<float>(x.rbegin(), x.rend());
}

bool overwrite(Fault fault) {
  const Device<float> x(std::vector<float>{5}), out(64);
  return simt_test::overwrite(fault, x, out) == cudaSuccess && out.host() == std::vector<float>(64, 5);
}

bool copy_vectors(Fault fault) {
  const std::vector<float> x = numbers(4 * 50);
  const Device<float> x_device(x), y(4 * 50);
  return simt_test::copy_vectors(fault, x_device, y, 50) == cudaSuccess && y.host() == x;
}

bool move_records(Fault fault) {
  std::vector<simt_test::Record> x(32);
  for (int i = 0; i < 32; ++i)
    for (int j = 0; j < 5; ++j) x[i].words[j] = i * 5 + j;
  const Device<simt_test::Record> x_device(x), y(32);
  const Device<unsigned char> bytes(32);
  if (simt_test::move_records(fault, x_device, y, bytes) != cudaSuccess) return false;
  for (int i = 0; i < 32; ++i)
    if (y.get()[i].words[3] != x[31 - i].words[3] || bytes.get()[i] != 31 - i) return false;
  return true;
}

bool copy_async(Fault fault) {
  constexpr int kCount = 100;
  const std::vector<float> x = numbers(kCount);
  const Device<float> x_device(x), y(256);
  if (simt_test::copy_async(fault, x_device, kCount, y) != cudaSuccess) return false;
  std::vector<float> want = x;
  want.resize(256);
  return y.host() == want;
}

bool uninitialised_global(Fault fault) {
  const Device<float> x(fault == Fault::kUninitialised ? Device<float>(32) : Device<float>(numbers(32))), y(32);
  return simt_test::reverse_warp(Fault::kNone, x, y) == cudaSuccess && y.host()[31] == -11;
}

bool freed_memory(Fault fault) {
  const Device<float> kept(numbers(32)), y(32);
  const float* x = Device<float>(numbers(32)).get();
  simt_test::reverse_warp(Fault::kNone, fault == Fault::kNone ? kept.get() : x, y);
  return true;
}

bool write_same(Fault fault) {
  const Device<int> out(1);
  const bool race = fault != Fault::kNone;
  return simt_test::write_same(out, race ? 2 : 1, race ? 2 : 1) == cudaSuccess && out.get()[0] == 1;
}

// Faults -------------------------------------------------------------------------------------------------------------

struct Case {
  const char* name;
  bool (*run)(Fault fault);
  Fault fault;
  // What must be printed in each build, one of the alternatives between '|'. Empty: the build cannot see the fault.
  const char *fast, *asan, *race;
};

const Case kCases[] = {
    {"no barrier after a tile", product, Fault::kMissingBarrier, "", "", "SIMT race"},
    {"divergent barrier", product, Fault::kDivergentBarrier, "SIMT divergent-barrier", "SIMT divergent-barrier",
     "SIMT divergent-barrier"},
    {"return before a barrier", product, Fault::kEarlyReturn, "SIMT barrier-after-exit", "SIMT barrier-after-exit",
     "SIMT barrier-after-exit"},
    {"shared index", product, Fault::kSharedIndex, "", "runtime error: index 16 out of bounds", "SIMT oob-shared"},
    {"past a shared array", product, Fault::kSharedPointer, "", "AddressSanitizer|runtime error", "SIMT oob-shared"},
    {"past a global buffer", product, Fault::kGlobalRead, "", "AddressSanitizer: heap-buffer-overflow",
     "SIMT oob-global"},
    {"no barrier between two stages", mma_product, Fault::kMissingBarrier, "", "", "SIMT race|SIMT cp-async"},
    {"no wait for cp.async", mma_product, Fault::kMissingWait, "wrong result", "wrong result", "SIMT cp-async"},
    {"no barrier in a reduction", block_sums, Fault::kMissingBarrier, "", "", "SIMT race|SIMT uninit"},
    {"a barrier while the warp shuffles", block_sums, Fault::kBarrierInsteadOfShuffle, "SIMT deadlock", "SIMT deadlock",
     "SIMT deadlock"},
    {"shuffle from an inactive lane", block_sums, Fault::kInactiveLane, "SIMT shfl-inactive", "SIMT shfl-inactive",
     "SIMT shfl-inactive"},
    {"different masks", block_sums, Fault::kDifferentMasks, "SIMT warp-mismatch", "SIMT warp-mismatch",
     "SIMT warp-mismatch"},
    {"no fence before the ticket", last_block_sum, Fault::kMissingRelease, "", "", "SIMT race"},
    {"one thread without a fence", histogram, Fault::kMissingRelease, "", "", "SIMT race"},
    {"no fence after the ticket", last_block_sum, Fault::kMissingAcquire, "", "", "SIMT race"},
    {"uninitialised histogram", histogram, Fault::kUninitialised, "wrong result", "wrong result", "SIMT uninit"},
    {"no syncwarp", reverse_warp, Fault::kMissingSyncwarp, "", "", "SIMT race"},
    {"no barrier before a write", overwrite, Fault::kMissingBarrier, "", "", "SIMT race"},
    {"misaligned vectors", copy_vectors, Fault::kMisaligned, "", "runtime error: load of misaligned|misaligned address",
     "SIMT misaligned"},
    {"no barrier between copies of structs", move_records, Fault::kMissingBarrier, "", "", "SIMT race|SIMT uninit"},
    {"no barrier after cp.async", copy_async, Fault::kMissingBarrier, "", "", "SIMT race|SIMT cp-async"},
    {"cp.async overwritten", copy_async, Fault::kOverwrittenCopy, "", "", "SIMT cp-async"},
    {"return with cp.async in flight", copy_async, Fault::kCopyInFlight, "SIMT cp-async", "SIMT cp-async",
     "SIMT cp-async"},
    {"uninitialised buffer", uninitialised_global, Fault::kUninitialised, "wrong result", "wrong result",
     "SIMT uninit"},
    {"freed buffer", freed_memory, Fault::kGlobalRead, "", "AddressSanitizer: heap-use-after-free", "SIMT oob-wild"},
    {"all write one word", write_same, Fault::kMissingBarrier, "", "", "SIMT race"},
};

// What a child process prints while it runs `body`.
std::string output_of(const std::function<void()>& body) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDOUT_FILENO);
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    body();
    std::fflush(nullptr);
    _exit(0);
  }
  close(ends[1]);
  std::string out;
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) out.append(buffer, size_t(n));
  close(ends[0]);
  waitpid(child, nullptr, 0);
  return out;
}

bool contains_one_of(const std::string& text, std::string alternatives) {
  for (size_t bar; (bar = alternatives.find('|')) != std::string::npos; alternatives.erase(0, bar + 1))
    if (text.find(alternatives.substr(0, bar)) != std::string::npos) return true;
  return text.find(alternatives) != std::string::npos;
}

void check_faults() {
  for (const Case& test : kCases) {
    const std::string want = kRace ? test.race : kAsan ? test.asan : test.fast;
    if (want.empty()) continue;
    for (const uint64_t seed : {0, 1, 2}) {
      const std::string got = output_of([&] {
        simt::config.seed = seed;
        if (!test.run(test.fault)) std::fprintf(stderr, "wrong result\n");
      });
      CHECK(contains_one_of(got, want), test.name, "with seed", seed, "is reported as:", got);
    }
  }
}

void check_right_kernels() {
  for (const Case& test : kCases) {
    for (int seed = 0; seed < 6; ++seed) {
      simt::config.seed = seed;
      simt::config.preempt = seed % 2 ? 0 : 20 + seed;
      CHECK(test.run(Fault::kNone), test.name, "without the fault, seed", seed);
      CHECK(simt::n_errors == 0, test.name, "without the fault, seed", seed, "is reported:", simt::last_error());
      simt::reset_errors();
    }
  }
  simt::config.seed = simt::config.preempt = 0;
}

// The report names the kernel, the threads and the line.
void check_report() {
  if (!kRace) return;
  const Device<int> out(1);
  const std::string place = "test_kernels.cu:" + std::to_string(simt_test::write_same_line);
  const std::string one_block = output_of([&] { simt_test::write_same(out, 1, 2); });
  CHECK(contains_one_of(one_block, "SIMT race: byte 0 of global memory: write by thread "), one_block);
  CHECK(contains_one_of(one_block, ",0,0) at " + place + ", then write at " + place + " without a barrier between " +
                                       "[simt_test::write_same_kernel, block (0,0,0), thread "),
        one_block);
  const std::string two_blocks = output_of([&] { simt_test::write_same(out, 2, 1); });
  CHECK(contains_one_of(two_blocks, "write by thread (0,0,0) of block ("), two_blocks);
  const std::string array = output_of([] { product(Fault::kSharedIndex); });
  CHECK(contains_one_of(array, "of the 1024 bytes of static shared memory `a_tile`"), array);
}

// Schedules and memory
// -------------------------------------------------------------------------------------------------

std::vector<unsigned> arrival(uint64_t seed, int blocks, int threads) {
  simt::config.seed = seed;
  const Device<unsigned> counter(std::vector<unsigned>{0}), order(blocks * threads);
  CHECK(simt_test::arrival(counter, order, blocks, threads) == cudaSuccess, seed);
  simt::config.seed = 0;
  return order.host();
}

void check_schedules() {
  std::vector<unsigned> in_order(64);
  for (unsigned i = 0; i < 64; ++i) in_order[i] = i;
  for (const auto& [blocks, threads] : {std::pair(1, 64), std::pair(64, 1)}) {
    CHECK(arrival(0, blocks, threads) == in_order, blocks, threads);
    CHECK(arrival(1, blocks, threads) != in_order, blocks, threads);
    CHECK(arrival(1, blocks, threads) == arrival(1, blocks, threads), blocks, threads);
    CHECK(arrival(1, blocks, threads) != arrival(2, blocks, threads), blocks, threads);
  }
  simt::config.preempt = 2;
  CHECK(arrival(0, 1, 64) != in_order, "preempted");
  simt::config.preempt = 0;
}

void check_poison() {
  if (kRace) return;  // which reports the reads
  const Device<unsigned> values(6);
  CHECK(values.host() == std::vector<unsigned>(6, ~0u), "device memory");
  CHECK(simt_test::leftovers(values, 3) == cudaSuccess, "shared memory");
  CHECK(values.host() == std::vector<unsigned>(6, ~0u), "shared memory");
}

// Launches -----------------------------------------------------------------------------------------------------------

void check_launch_limits() {
  const auto refused = [](cudaError_t want, dim3 grid, dim3 block, size_t shared) {
    simt::config.max_errors = 0;
    const bool right =
        simt_test::empty(grid, block, shared) == want && (simt::n_reported("launch") > 0) == (want != cudaSuccess);
    simt::config.max_errors = 20;
    simt::reset_errors();
    return right;
  };
  CHECK(refused(cudaSuccess, dim3(0), dim3(32), 0), "an empty grid");
  CHECK(refused(cudaSuccess, dim3(1, 1, 1), dim3(1024), size_t(simt::config.max_shared_bytes)), "the limits");
  CHECK(refused(cudaErrorInvalidConfiguration, dim3(1), dim3(1025), 0), "1025 threads");
  CHECK(refused(cudaErrorInvalidConfiguration, dim3(1), dim3(0), 0), "0 threads");
  CHECK(refused(cudaErrorInvalidConfiguration, dim3(1), dim3(1, 1, 65), 0), "blockDim.z = 65");
  CHECK(refused(cudaErrorInvalidConfiguration, dim3(1, 65536), dim3(1), 0), "gridDim.y = 65536");
  CHECK(refused(cudaErrorInvalidConfiguration, dim3(1, 1, 65536), dim3(1), 0), "gridDim.z = 65536");
  CHECK(refused(cudaErrorInvalidValue, dim3(1), dim3(1), size_t(simt::config.max_shared_bytes) + 1), "shared memory");
}

struct Parameters {  // as the C ABI lays them out
  char a;
  double b;
  short c;
  float d;
  simt_test::Record record;
  double* out;
};

void run_translated(const unsigned char* bytes) {
  Parameters p;
  std::memcpy(static_cast<void*>(&p), bytes, sizeof p);
  simt::access(p.out, 8, simt::kWrite, 12);
  const bool shared_is_poison = *static_cast<unsigned*>(simt::dynamic_shared()) == ~0u;
  *p.out = shared_is_poison ? p.a + p.b + p.c + double(p.d) + double(p.record.words[4]) + 1 : 0;
}

void check_translated() {
  const simt_test::Record record{{0, 0, 0, 0, 16}};
  const Device<double> out(1);
  CHECK(simt_test::parameters(1, 2, 4, 8, record, out) == cudaSuccess && out.get()[0] == 31, "the source");
  simt::config.max_errors = 0;
  simt::config.require_translated = true;
  CHECK(simt_test::parameters(1, 2, 4, 8, record, out) == cudaErrorInvalidDeviceFunction &&
            simt::n_reported("untranslated") == 1,
        "no translation");
  simt::config.require_translated = false;
  simt::reset_errors();
  simt::config.max_errors = 20;
  const char* const name = "_ZN9simt_test17parameters_kernelEcdsfNS_6RecordEPd";
  simt::register_translated({name, 64, sizeof(Parameters), run_translated});
  CHECK(simt::find_translated(name) != nullptr, name);
  CHECK(simt_test::parameters(1, 2, 4, 8, record, out) == cudaSuccess && out.get()[0] == 32, "the translation");
  if (!kRace) return;
  const std::string got = output_of([&] { simt_test::parameters(1, 2, 4, 8, record, out.get() + 1); });
  CHECK(contains_one_of(
            got, "SIMT oob-global: write of 8 bytes at offset 8 of the 8 bytes of global memory, at PTX line 12"),
        got);
}

// Operations ---------------------------------------------------------------------------------------------------------

void check_operations() {
  std::vector<uint32_t> x(32);
  for (uint32_t i = 0; i < 32; ++i) x[i] = i * 37 % 101 % 64;
  const Device<uint32_t> x_device(x), out(simt_test::kOperations * 32);
  CHECK(simt_test::operations(x_device, out) == cudaSuccess, "operations");
  uint32_t odd = 0, sum = 0, smallest = ~0u, largest = 0, all = 0;
  for (uint32_t i = 0; i < 32; ++i) {
    odd |= (x[i] & 1) << i;
    sum += x[i];
    smallest = std::min(smallest, x[i]);
    largest = std::max(largest, x[i]);
    all ^= x[i];
  }
  for (uint32_t lane = 0; lane < 32; ++lane) {
    uint32_t equal = 0;
    for (uint32_t i = 0; i < 32; ++i) equal |= uint32_t(x[i] % 4 == x[lane] % 4) << i;
    const uint32_t want[simt_test::kOperations] = {
        x[lane / 8 * 8 + (lane + 5) % 8],
        x[lane < 3 ? lane : lane - 3],
        x[lane % 16 < 13 ? lane + 3 : lane],
        x[lane ^ 9],
        odd,
        uint32_t(std::count(x.begin(), x.end(), 7) > 0),
        1,
        equal,
        sum,
        smallest - 50,
        largest,
        all,
        ~0u,
        sum,
        std::min(smallest, 100u),
        std::max(largest, 100u),
        ~0u,
        32 % 10,
    };
    for (int i = 0; i < simt_test::kOperations; ++i)
      CHECK(out.get()[i * 32 + int(lane)] == want[i], "operation", i, "lane", lane, "gives",
            out.get()[i * 32 + int(lane)]);
  }
}

void check_block_votes() {
  for (const int ones : {0, 1, 63, 64}) {
    std::vector<int> x(64);
    std::fill_n(x.begin(), ones, 2);
    const Device<int> x_device(x), out(64);
    CHECK(simt_test::block_votes(x_device, out) == cudaSuccess, ones);
    CHECK(out.host() == std::vector<int>(64, ones * 4 + (ones == 64) * 2 + (ones > 0)), ones);
  }
}

template <class T, class Launch>
void check_fragments(const char* name, const Launch& launch, int k) {
  for (const bool transposed : {false, true}) {
    if (transposed && k == 8) continue;
    std::vector<T> a, b;
    for (const float x : numbers(16 * k)) a.push_back(T(x));
    for (const float x : numbers(8 * k + 3)) b.push_back(T(x));
    b.erase(b.begin(), b.begin() + 3);
    std::vector<float> want = exact_product(a, b, 16, 8, k);
    if (transposed) {
      std::vector<T> by_k;
      for (int l = 0; l < k; ++l)
        for (int j = 0; j < 8; ++j) by_k.push_back(b[j * k + l]);
      b = by_k;
    }
    const Device<T> a_device(a), b_device(b);
    const std::vector<float> before = numbers(16 * 8);
    const Device<float> d(before);
    for (size_t i = 0; i < want.size(); ++i) want[i] += before[i];
    CHECK(launch(a_device, b_device, transposed, d) == cudaSuccess, name);
    CHECK(d.host() == want, name, transposed ? "transposed" : "");
  }
}

void check_tf32() {
  const auto rounded = [](float x) {
    return testing::as_double(simt::bit_cast<float>(simt::to_tf32(simt::bit_cast<uint32_t>(x))));
  };
  const double ulp = 1.0 / 1024;
  CHECK(rounded(1) == 1 && rounded(float(1 + ulp / 4)) == 1 && rounded(float(1 + ulp / 2)) == 1 + ulp, "ties go up");
  CHECK(rounded(float(-1 - ulp / 2)) == -1 - ulp, "ties go away from zero");
}

float* strided_memory;

void strided_accesses(const unsigned char*) {
  const size_t lane = threadIdx.x;
  unsigned char* shared = static_cast<unsigned char*>(simt::dynamic_shared());
  simt::access(strided_memory + lane * 2, 4, simt::kWrite, 1);
  simt::access(shared + lane * 8, 4, simt::kWrite, 2);
  simt::access(shared + lane * 16, 16, simt::kRead, 3);
}

void check_metrics() {
  if (!kRace) return;
  const Device<float> memory(64);
  strided_memory = memory;
  simt::register_translated({"_ZN9simt_test12empty_kernelEv", 0, 0, strided_accesses});
  const std::string got = output_of([] {
    simt::config.metrics = true;
    simt_test::empty(dim3(2), dim3(32), 512);
  });
  for (const char* want : {
           " of dynamic shared memory before it was written, at PTX line 3",
           "ACCESS _ZN9simt_test12empty_kernelEv 1 global store 4 1 8 4\n",
           "ACCESS _ZN9simt_test12empty_kernelEv 2 shared store 4 1 2 1\n",
           "ACCESS _ZN9simt_test12empty_kernelEv 3 shared load 16 1 4 4\n",
       })
    CHECK(contains_one_of(got, want), want, "is not in", got);
}

}  // namespace

int main() {
  check_right_kernels();
  check_faults();
  check_report();
  check_schedules();
  check_poison();
  check_launch_limits();
  check_translated();
  check_operations();
  check_block_votes();
  check_fragments<__nv_bfloat16>("bf16", simt_test::fragments_bf16, 16);
  check_fragments<__half>("f16", simt_test::fragments_f16, 16);
  check_fragments<float>(
      "tf32", [](const float* a, const float* b, bool, float* d) { return simt_test::fragments_tf32(a, b, d); }, 8);
  check_tf32();
  check_metrics();
  CHECK(simt::n_errors == 0, simt::last_error());
  return testing::finish();
}

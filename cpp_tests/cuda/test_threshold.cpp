// The kernels of threshold.cuh. topk_csr must give the bits of the CPU's topk_csr; the residual is compared with sums
// in long double; transpose_csr must give a stable counting sort.
#include "../../csrc/cpu/threshold.cpp"  // compiled here, so that every build has it with its own flags
#include "testing_cuda.h"

namespace {

namespace cpu = cmd_ext::cpu;
namespace cuda = cmd_ext::cuda;
using testing::bf16;
using testing::Device;
using testing::half;
using testing::Sum;

template <class T>
std::string type_name() {
  if constexpr (std::is_same_v<T, bf16>) return "bf16";
  return "float" + std::to_string(8 * sizeof(T));
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return value;
}

template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

// Matrices that differ in how their magnitudes collide.
constexpr const char* kInputs[] = {"random", "few values", "all equal", "zeros", "bit patterns", "infinities and NaN"};
constexpr int64_t kInputCount = std::size(kInputs);

template <class T>
T entry(int64_t input, int64_t i) {
  const double random = testing::uniform();
  const uint64_t sign = uint64_t(i % 2) << (8 * sizeof(T) - 1);
  const uint64_t infinity = to_bits(testing::from_double<T>(std::numeric_limits<double>::infinity()));
  switch (input) {
    case 0:
      return testing::from_double<T>(random);
    case 1:
      return testing::from_double<T>(std::round(random * 3));
    case 2:
      return testing::from_double<T>(-2.5);
    case 3:
      return from_bits<T>(sign);
    case 4:  // subnormal to the largest, many of them one last bit apart
      return from_bits<T>(sign | (infinity / 97 * uint64_t(i * 29 % 97 + 1) + uint64_t(i % 3) - 1));
    default:
      if (i % 5 == 3) return from_bits<T>(sign | infinity);
      if (i % 7 == 6) return from_bits<T>(sign | (infinity + uint64_t(i % 11) + 1));
      return i % 13 ? testing::from_double<T>(random) : from_bits<T>(sign | (infinity - 1));
  }
}

template <class T>
struct Csr {
  std::vector<T> values;
  std::vector<int32_t> row_ptr, col_idx;
};
template <class T>
bool same_bits(const Csr<T>& a, const Csr<T>& b) {
  return testing::same_bits(a.values, b.values) && a.row_ptr == b.row_ptr && a.col_idx == b.col_idx;
}

template <class T>
Csr<T> cpu_topk(const T* a, int64_t m, int64_t n, int64_t nnz) {
  if constexpr (sizeof(T) == 2) {  // as the entry point: widened
    std::vector<float> wide(m * n);
    for (int64_t i = 0; i < m * n; ++i) wide[i] = cuda::gpu::widen(a[i]);
    const Csr<float> kept = cpu_topk(wide.data(), m, n, nnz);
    Csr<T> out{std::vector<T>(nnz), kept.row_ptr, kept.col_idx};
    for (int64_t i = 0; i < m; ++i)
      for (int32_t k = kept.row_ptr[i]; k < kept.row_ptr[i + 1]; ++k) out.values[k] = a[i * n + kept.col_idx[k]];
    return out;
  } else {
    Csr<T> out{std::vector<T>(nnz), std::vector<int32_t>(m + 1), std::vector<int32_t>(nnz)};
    cpu::topk_csr(a, m, n, nnz, out.values.data(), out.row_ptr.data(), out.col_idx.data(),
                  [](int64_t count, int64_t, const auto& body) { body(0, count); });
    return out;
  }
}

// The outputs of a batch, one matrix after another.
template <class T>
struct Outputs {
  Device<T> values;
  Device<int32_t> row_ptr, col_idx;
  Device<unsigned char> workspace;

  Outputs(int64_t batch, int64_t m, int64_t n, int64_t nnz)
      : values(batch * nnz),
        row_ptr(batch * (m + 1)),
        col_idx(batch * nnz),
        workspace(cuda::topk_workspace_bytes(batch, m, n)) {}
  Csr<T> host() const { return {values.host(), row_ptr.host(), col_idx.host()}; }
};

template <class V>
std::vector<V> slice(const std::vector<V>& all, int64_t index, int64_t size) {
  return {all.begin() + index * size, all.begin() + (index + 1) * size};
}
template <class T>
Csr<T> matrix(const Csr<T>& all, int64_t b, int64_t m, int64_t nnz) {
  return {slice(all.values, b, nnz), slice(all.row_ptr, b, m + 1), slice(all.col_idx, b, nnz)};
}

// A batch with one matrix of every input. `shift` elements put the matrices off their 16-byte boundary.
template <class T>
void check_topk(int64_t m, int64_t n, int64_t nnz, bool schedules, int64_t shift = 0) {
  const std::string name = "topk_csr " + type_name<T>() + " " + std::to_string(m) + "x" + std::to_string(n);
  std::vector<T> a(shift + kInputCount * m * n);
  for (int64_t input = 0; input < kInputCount; ++input)
    for (int64_t i = 0; i < m * n; ++i) a[shift + input * m * n + i] = entry<T>(input, i);
  const Device<T> a_device(a);
  const auto run = [&] {
    const Outputs<T> out(kInputCount, m, n, nnz);
    CHECK(cuda::topk_csr<T>(a_device + shift, kInputCount, m, n, nnz, out.values, out.row_ptr, out.col_idx,
                            out.workspace, nullptr) == cudaSuccess,
          name, nnz);
    return out.host();
  };
  const Csr<T> got = schedules ? testing::for_all_schedules(run, name) : run();
  for (int64_t input = 0; input < kInputCount; ++input)
    CHECK(same_bits(matrix(got, input, m, nnz), cpu_topk(a.data() + shift + input * m * n, m, n, nnz)), name, "nnz",
          nnz, kInputs[input]);
}

template <class T>
void check_all_topk() {
  check_topk<T>(33, 31, 0, false);
  check_topk<T>(33, 31, 300, true);
  check_topk<T>(33, 31, 33 * 31 - 1, false);
  check_topk<T>(33, 31, 33 * 31, false, 1);
  check_topk<T>(1, 50, 1, false);
  check_topk<T>(50, 1, 17, false);
  check_topk<T>(1, 1, 1, false);
  check_topk<T>(96, 64, 700, false);  // a tile and a half, aligned
  check_topk<T>(96, 64, 6000, false, 1);
  check_topk<T>(3, 4096, 4000, false);  // tiles are rows
  check_topk<T>(0, 5, 0, false);
  check_topk<T>(5, 0, 0, false);
}

// More tiles than two steps of the scan, with ties up to the last of them, and several tiles a block of the histogram.
void check_many_tiles() {
  const int64_t m = 2050, n = 4099, nnz = m * n / 1000 - 3;
  std::vector<half> a(m * n);
  for (int64_t i = 0; i < m * n; ++i) a[i] = i % 1000 == 0 ? testing::from_double<half>(2) : entry<half>(0, i);
  const Device<half> a_device(a);
  const Outputs<half> out(1, m, n, nnz);
  CHECK(cuda::topk_csr<half>(a_device, 1, m, n, nnz, out.values, out.row_ptr, out.col_idx, out.workspace, nullptr) ==
            cudaSuccess,
        m, n);
  CHECK(same_bits(out.host(), cpu_topk(a.data(), m, n, nnz)), "topk_csr of many tiles");
}

template <class T>
struct Residual {
  std::vector<T> dense;
  Csr<T> kept;
};
template <class T>
bool same_bits(const Residual<T>& a, const Residual<T>& b) {
  return testing::same_bits(a.dense, b.dense) && same_bits(a.kept, b.kept);
}

template <class T>
void check_residual(int64_t batch, int64_t groups, int64_t m, int64_t n, int64_t r, int64_t nnz, bool schedules) {
  const std::string name = "residual_topk_csr " + type_name<T>();
  const auto w = testing::random_values<T>(batch * m * n), u = testing::random_values<T>(batch * m * r),
             v = testing::random_values<T>(batch * groups * r * n);
  const Device<T> w_device(w), u_device(u), v_device(v);
  const auto run = [&] {
    const Device<T> residual(batch * m * n);
    const Outputs<T> out(batch, m, n, nnz);
    CHECK(cuda::residual_topk_csr<T>(w_device, u_device, v_device, batch, groups, m, n, r, nnz, residual, out.values,
                                     out.row_ptr, out.col_idx, out.workspace, nullptr) == cudaSuccess,
          name, m, n, r);
    return Residual<T>{residual.host(), out.host()};
  };
  const auto [got, kept] = schedules ? testing::for_all_schedules(run, name) : run();
  const int64_t rows = m / groups;
  for (int64_t b = 0; b < batch; ++b) {
    bool close = true;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        Sum want;
        want.add(w[(b * m + i) * n + j]);
        for (int64_t k = 0; k < r; ++k)
          want.add(-(long double)(u[(b * m + i) * r + k]) * v[((b * groups + i / rows) * r + k) * n + j]);
        close &= testing::near(got[(b * m + i) * n + j], want);
      }
    CHECK(close, name, "residual", b, "of", batch, groups, m, n, r);
    CHECK(same_bits(matrix(kept, b, m, nnz), cpu_topk(got.data() + b * m * n, m, n, nnz)), name, batch, groups, m, n, r,
          nnz);
  }
}

template <class T>
void check_all_residuals() {
  check_residual<T>(2, 1, 70, 68, 18, 500, true);  // 128-bit accesses, two tiles each way, two steps of r
  check_residual<T>(2, 1, 37, 67, 5, 500, false);  // odd row length
  check_residual<T>(1, 3, 39, 20, 3, 100, false);
  check_residual<T>(1, 2, 2, 5, 1, 10, false);
  check_residual<T>(1, 1, 9, 12, 0, 7, false);
  check_residual<T>(1, 1, 9, 12, 4, 0, false);
  check_residual<T>(2, 1, 0, 12, 4, 0, false);
  check_residual<T>(2, 1, 4, 0, 0, 0, false);
  check_residual<T>(0, 1, 4, 4, 2, 3, false);
}

struct Transposed {
  std::vector<int32_t> col_ptr, row_idx, perm;
};
bool same_bits(const Transposed& a, const Transposed& b) {
  return a.col_ptr == b.col_ptr && a.row_idx == b.row_idx && a.perm == b.perm;
}

void check_transpose(int64_t m, int64_t n, int64_t groups, double density, bool schedules) {
  const testing::RandomCsr<float> s(m, n, density);
  Transposed want{std::vector<int32_t>(groups * n + 1), std::vector<int32_t>(s.nnz()), std::vector<int32_t>(s.nnz())};
  cpu::transpose_csr(s.row_ptr.data(), s.col_idx.data(), m, n, groups, want.col_ptr.data(), want.row_idx.data(),
                     want.perm.data());
  const Device<int32_t> row_ptr(s.row_ptr), col_idx(s.col_idx);
  const auto run = [&] {
    const Device<int32_t> col_ptr(groups * n + 1), row_idx(s.nnz()), perm(s.nnz());
    const Device<unsigned char> workspace(cuda::transpose_csr_workspace_bytes(m, n, groups));
    CHECK(
        cuda::transpose_csr(row_ptr, col_idx, m, n, groups, col_ptr, row_idx, perm, workspace, nullptr) == cudaSuccess,
        m, n, groups);
    return Transposed{col_ptr.host(), row_idx.host(), perm.host()};
  };
  const Transposed got = schedules ? testing::for_all_schedules(run, "transpose_csr") : run();
  CHECK(same_bits(got, want), "transpose_csr", m, n, groups, density);
}

}  // namespace

int main() {
  check_all_topk<float>();
  check_all_topk<double>();
  check_all_topk<half>();
  check_all_topk<bf16>();
  check_many_tiles();
  check_all_residuals<float>();
  check_all_residuals<double>();
  check_transpose(70, 53, 1, 0.2, true);
  check_transpose(70, 53, 1, 1, false);
  check_transpose(72, 30, 3, 0.3, false);
  check_transpose(12, 9, 12, 0.5, false);
  check_transpose(40, 700, 1, 0.6, false);   // rows longer than a block
  check_transpose(2, 16400, 1, 1, false);    // three chunks of columns
  check_transpose(17000, 3, 1, 0.3, false);  // more rows a tile than the least
  check_transpose(3, 1500, 1, 0.3, false);   // more columns than one step of the scan
  check_transpose(5, 7, 1, 0, false);
  check_transpose(0, 7, 1, 0, false);
  check_transpose(7, 0, 1, 0, false);
  CHECK(simt::n_errors == 0, "the emulator reported:", simt::last_error());
  return testing::finish();
}

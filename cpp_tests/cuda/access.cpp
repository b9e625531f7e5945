// One launch of every kernel at a shape whose tiles are full and aligned, for counting coalescing and bank conflicts of
// the translated kernels (cpp_tests/simt/simt_metrics.h). Prints ACCESS lines; results are not looked at.
#include <utility>

#include "testing_cuda.h"

namespace {

namespace cuda = cmd_ext::cuda;
using testing::bf16;
using testing::Device;
using testing::half;

template <class T>
struct Buffer : Device<T> {
  explicit Buffer(int64_t count) : Device<T>(testing::random_values<T>(count)) {}
};
template <class T>
using Output = Device<T>;
using Bytes = Device<unsigned char>;

// S [rows, cols] in groups of rows on the device, with its transposed pattern.
template <class T>
struct Sparse {
  testing::RandomCsr<float> host;
  Device<int32_t> row_ptr, col_idx;
  Buffer<T> values;
  Device<int32_t> col_ptr, row_idx, perm;
  cuda::Csr<T> csr;

  Sparse(int64_t rows, int64_t cols, double density)
      : host(rows, cols, density),
        row_ptr(host.row_ptr),
        col_idx(host.col_idx),
        values(host.nnz()),
        col_ptr(cols + 1),
        row_idx(host.nnz()),
        perm(host.nnz()),
        csr{rows, cols, host.nnz(), values, row_ptr, col_idx} {
    const Bytes workspace(cuda::transpose_csr_workspace_bytes(rows, cols, 1));
    cuda::transpose_csr(row_ptr, col_idx, rows, cols, 1, col_ptr, row_idx, perm, workspace, nullptr);
  }
};

template <class T>
void linear() {
  const int64_t rows = 128, cols = 128, tokens = 256;
  const Sparse<T> s(rows, cols, 0.2);
  const Buffer<T> x(tokens * cols), y(tokens * rows), bias(rows), u(rows * 32), v(32 * cols);
  const Output<T> out(tokens * rows), sampled(s.host.nnz()), w(rows * cols);
  cuda::transpose<T>(x, tokens, cols, out, tokens, nullptr);
  cuda::spmm<T>(x, tokens, tokens, s.csr, bias, 1, y, nullptr);
  for (int64_t few : {1, 4, 16}) cuda::spmm_few<T>(x, few, s.csr, bias, 0, out, nullptr);
  const Bytes workspace(cuda::sddmm_workspace_bytes<T>(rows, cols, s.host.nnz(), tokens));
  cuda::sddmm<T>(y, x, tokens, s.csr, sampled, workspace, nullptr);
  cuda::rebuild<T>(u, v, 32, 1, s.csr, w, nullptr);
  if constexpr (sizeof(T) >= 4) {
    const Buffer<T> sum(rows * cols);
    cuda::add_sparse<T>(s.csr, sum, nullptr);
  }
}

// Sums that are split, and what runs where a tile does not fit in shared memory.
template <class T>
void sddmm() {
  const int64_t rows = 32, cols = 64, k = 2048;
  const Sparse<T> s(rows, cols, 0.2);
  const Buffer<T> a(rows * k), b(cols * k);
  const Output<T> out(s.host.nnz());
  for (int shared : {simt::config.max_shared_bytes, 48 << 10}) {
    const int before = std::exchange(simt::config.max_shared_bytes, shared);
    const Bytes workspace(cuda::sddmm_workspace_bytes<T>(rows, cols, s.host.nnz(), k));
    cuda::sddmm<T>(a, b, k, s.csr, out, workspace, nullptr);
    simt::config.max_shared_bytes = before;
  }
}

template <class T>
void threshold() {
  const int64_t m = 64, n = 256, nnz = m * n / 10;
  const Buffer<T> a(m * n);
  const Output<T> values(nnz);
  const Output<int32_t> row_ptr(m + 1), col_idx(nnz);
  const Bytes workspace(cuda::topk_workspace_bytes(1, m, n));
  for (int64_t kept : {nnz, int64_t(0)})
    cuda::topk_csr<T>(a, 1, m, n, kept, values, row_ptr, col_idx, workspace, nullptr);
  if constexpr (sizeof(T) >= 4) {
    const Buffer<T> u(m * 32), v(32 * n);
    const Output<T> residual(m * n);
    cuda::residual_topk_csr<T>(a, u, v, 1, 1, m, n, 32, nnz, residual, values, row_ptr, col_idx, workspace, nullptr);
  }
}

template <class T>
void conv2d(int64_t outs, double density) {
  const cuda::ConvShape shape{4, 1, 8, 16, 16, outs, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1};
  const Sparse<T> s(outs, 8 * 9, density);
  const Buffer<T> x(4 * 8 * 256), y(4 * outs * 256);
  const Output<T> out(4 * outs * 256), values(s.host.nnz());
  cuda::sparse_conv2d<T>(x, s.csr, nullptr, 0, out, shape, nullptr);
  const Bytes reordered(cuda::sparse_conv2d_grad_input_workspace_bytes<T>(s.host.nnz()));
  cuda::sparse_conv2d_grad_input<T>(y, s.csr, s.col_ptr, s.row_idx, s.perm, 0, out, shape, reordered, nullptr);
  const Bytes partial(cuda::sparse_conv2d_grad_values_workspace_bytes<T>(s.host.nnz(), shape));
  cuda::sparse_conv2d_grad_values<T>(y, x, s.csr, values, shape, partial, nullptr);
}

template <class T>
void gemm() {
  const int channels = 64;
  const int64_t pixels = 256;
  for (int outs : {64, 128}) {
    const Sparse<T> s(outs, channels * 9, 0.1);
    const Buffer<T> x(pixels * channels), z(pixels * 64), u(outs * 64), v(64 * channels * 9), bias(outs);
    const Output<T> y(pixels * outs);
    cuda::GemmShape shape{1, 1, outs, 16, 16, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1, false};
    const cuda::GemmOperand<T> image{x, channels, channels, true}, dense{z, 64, 64, false};
    const cuda::GemmSparse<T> sparse{s.values, s.col_ptr, s.row_idx, s.perm, outs, channels};
    cuda::gemm_onepass<T>(shape, image, v, u, 64, sparse, bias, y, nullptr);
    for (int splits : {1, 2}) {
      shape.splits = splits;
      const Device<float> partial(splits * pixels * outs);
      cuda::gemm<T>(shape, image, sparse, dense, u, bias, y, splits > 1 ? partial.get() : nullptr, nullptr);
    }
  }
}

template <class T>
void svd() {
  const int64_t m = 256, n = 64, s = 32, r = 24;
  const Buffer<T> y(m * s), u(m * r), vh(r * n);
  const Output<double> normalized(m * s), r_inverse(s * s);
  std::vector<double> gram(s * s);
  for (int64_t i = 0; i < s; ++i)
    for (int64_t k = 0; k < s; ++k) gram[i * s + k] = i == k ? 1 : 1.0 / double(i + k + 2);
  const Device<double> gram_device(gram);
  cuda::normalize_columns<T>(y, 1, m, s, 1e-7, normalized, nullptr);
  cuda::cholesky_inverse(gram_device, 1, s, 1e-9, r_inverse, nullptr);
  const Output<T> h(r * s), sigma(r), z(r * s);
  for (int shared : {simt::config.max_shared_bytes, 8 << 10}) {  // staged in shared memory and not
    const int before = std::exchange(simt::config.max_shared_bytes, shared);
    const Bytes workspace(cuda::jacobi_svd_workspace_bytes<T>(1, s));
    cuda::jacobi_svd<T>(gram_device, 1, s, r, h, sigma, z, workspace, nullptr);
    simt::config.max_shared_bytes = before;
  }
  cuda::fix_signs<T>(u, vh, 1, m, r, n, nullptr);
}

template <class... T, class Run>
void for_types(const Run& run) {
  (run(T()), ...);
}

}  // namespace

int main() {
  simt::config.metrics = true;
  for_types<float, double, half, bf16>([](auto t) {
    linear<decltype(t)>();
    threshold<decltype(t)>();
    sddmm<decltype(t)>();
    for (double density : {0.2, 0.01}) conv2d<decltype(t)>(32, density);  // tiled and direct
    const int before = std::exchange(simt::config.multiprocessors, 1);
    conv2d<decltype(t)>(64, 0.2);  // more rows a warp
    simt::config.multiprocessors = before;
  });
  for_types<float, half, bf16>([](auto t) { gemm<decltype(t)>(); });
  for_types<float, double>([](auto t) { svd<decltype(t)>(); });
  return simt::n_errors != 0;
}

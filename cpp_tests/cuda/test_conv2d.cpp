// The kernels of conv2d.cuh against seven nested loops in long double: awkward shapes, every type, every number of rows
// a warp, tiled and direct.
#include <array>
#include <set>

#include "conv2d_tile.cuh"
#include "testing_cuda.h"

namespace {

namespace cuda = cmd_ext::cuda;
using testing::as_double;
using testing::bf16;
using testing::Device;
using testing::half;
using testing::RandomCsr;
using testing::Sum;

struct Case {
  int64_t batch, channels, height, width, out_channels;
  std::array<int64_t, 2> kernel, stride, pad, dilation;
  int64_t groups;
  double density;

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t columns() const { return channels / groups * taps(); }
  int64_t out(int axis) const {
    const int64_t size = axis == 0 ? height : width;
    return (size + 2 * pad[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }
  int64_t in_size() const { return batch * channels * height * width; }
  int64_t out_size() const { return batch * out_channels * out(0) * out(1); }
  cuda::ConvShape shape() const {
    return {batch,     groups,    channels,  height,    width,  out_channels, out(0),      out(1),
            kernel[0], kernel[1], stride[0], stride[1], pad[0], pad[1],       dilation[0], dilation[1]};
  }
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  out << "x [" << c.batch << ", " << c.channels << ", " << c.height << ", " << c.width << "] m " << c.out_channels;
  const std::pair<const char*, const std::array<int64_t, 2>&> pairs[] = {
      {" kernel ", c.kernel}, {" stride ", c.stride}, {" pad ", c.pad}, {" dilation ", c.dilation}};
  for (const auto& [name, pair] : pairs) out << name << pair[0] << ',' << pair[1];
  return out << " groups " << c.groups << " density " << c.density;
}

// Calls visit(nonzero, index in y, index in x) for every product of the convolution.
template <class Visit>
void for_each_product(const Case& c, const RandomCsr<float>& s, const Visit& visit) {
  const int64_t group_rows = c.out_channels / c.groups, group_channels = c.channels / c.groups;
  for (int64_t i = 0; i < s.rows; ++i)
    for (int64_t k = s.row_ptr[i]; k < s.row_ptr[i + 1]; ++k) {
      const int64_t channel = i / group_rows * group_channels + s.col_idx[k] / c.taps(), tap = s.col_idx[k] % c.taps();
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t oh = 0; oh < c.out(0); ++oh)
          for (int64_t ow = 0; ow < c.out(1); ++ow) {
            const int64_t h = oh * c.stride[0] + tap / c.kernel[1] * c.dilation[0] - c.pad[0];
            const int64_t w = ow * c.stride[1] + tap % c.kernel[1] * c.dilation[1] - c.pad[1];
            if (h >= 0 && h < c.height && w >= 0 && w < c.width)
              visit(k, ((b * c.out_channels + i) * c.out(0) + oh) * c.out(1) + ow,
                    ((b * c.channels + channel) * c.height + h) * c.width + w);
          }
    }
}

// The transposed pattern: a row per column of a row group.
struct Transposed {
  std::vector<int32_t> col_ptr{0}, row_idx, perm;

  Transposed(const RandomCsr<float>& s, int64_t groups) {
    std::vector<std::vector<std::pair<int32_t, int32_t>>> lists(groups * s.cols);
    for (int64_t i = 0; i < s.rows; ++i)
      for (int32_t k = s.row_ptr[i]; k < s.row_ptr[i + 1]; ++k)
        lists[i * groups / s.rows * s.cols + s.col_idx[k]].emplace_back(int32_t(i), k);
    for (const auto& list : lists) {
      for (const auto& [row, k] : list) row_idx.push_back(row), perm.push_back(k);
      col_ptr.push_back(int32_t(row_idx.size()));
    }
  }
};

template <class T>
std::string name_of(const char* kernel) {
  return std::string(kernel) + (std::is_same_v<T, bf16> ? " bf16" : " float" + std::to_string(8 * sizeof(T)));
}

template <class T>
void check_near(const std::string& name, const Case& c, const std::vector<T>& got, const std::vector<Sum>& want) {
  size_t at = 0;
  while (at < got.size() && at < want.size() && testing::near(got[at], want[at])) ++at;
  CHECK(got.size() == want.size() && at == got.size(), name, c, "at", at, "got",
        at < got.size() ? as_double(got[at]) : 0, "want", at < want.size() ? double(want[at].value) : 0);
}

// Runs a kernel that adds to `before` (beta = 1) or overwrites NaN (beta = 0).
template <class T, class Run>
void check_output(const char* kernel, const Case& c, int beta, const std::vector<T>& before, std::vector<Sum> want,
                  const Run& run) {
  for (size_t i = 0; i < want.size() && beta; ++i) want[i].add(as_double(before[i]));
  const std::string name = name_of<T>(kernel);
  const auto got = testing::for_all_schedules(
      [&] {
        const Device<T> poison(before.size()), filled(before);
        const Device<T>& out = beta ? filled : poison;
        CHECK(run(out.get()) == cudaSuccess, name, c);
        return out.host();
      },
      name);
  check_near(name, c, got, want);
}

template <class T>
void check_case(const Case& c, int beta) {
  const RandomCsr<float> s(c.out_channels, c.columns(), c.density);
  const Transposed st(s, c.groups);
  const auto values = testing::random_values<T>(s.nnz()), x = testing::random_values<T>(c.in_size()),
             dy = testing::random_values<T>(c.out_size()), bias = testing::random_values<T>(c.out_channels);
  std::vector<Sum> want_y(dy.size()), want_dx(x.size()), want_dvalues(s.nnz());
  for_each_product(c, s, [&](int64_t k, int64_t at_y, int64_t at_x) {
    const long double value = as_double(values[k]), input = as_double(x[at_x]), grad = as_double(dy[at_y]);
    want_y[at_y].add(value * input);
    want_dx[at_x].add(value * grad);
    want_dvalues[k].add(grad * input);
  });
  const int64_t pixels = c.out(0) * c.out(1);
  for (size_t i = 0; i < want_y.size() && !beta; ++i) want_y[i].add(as_double(bias[i / pixels % c.out_channels]));

  const Device<T> values_device(values), x_device(x), dy_device(dy), bias_device(bias);
  const Device<int32_t> row_ptr(s.row_ptr), col_idx(s.col_idx);
  const Device<int32_t> col_ptr(st.col_ptr), row_idx(st.row_idx), perm(st.perm);
  const int64_t nnz = s.nnz();
  check_output<T>("sparse_conv2d", c, beta, dy, want_y, [&](T* y) {
    const cuda::Csr<T> csr{s.rows, s.cols, nnz, values_device, row_ptr, col_idx};
    return cuda::sparse_conv2d<T>(x_device, csr, beta ? nullptr : bias_device.get(), beta, y, c.shape(), nullptr);
  });
  check_output<T>("sparse_conv2d_grad_input", c, beta, x, want_dx, [&](T* dx) {
    const Device<unsigned char> workspace(cuda::sparse_conv2d_grad_input_workspace_bytes<T>(nnz));
    const cuda::Csr<T> csr{s.rows, s.cols, nnz, values_device, nullptr, nullptr};
    return cuda::sparse_conv2d_grad_input<T>(dy_device, csr, col_ptr, row_idx, perm, beta, dx, c.shape(), workspace,
                                             nullptr);
  });
  check_output<T>("sparse_conv2d_grad_values", c, 0, values, want_dvalues, [&](T* dvalues) {
    const Device<unsigned char> workspace(cuda::sparse_conv2d_grad_values_workspace_bytes<T>(nnz, c.shape()));
    const cuda::Csr<T> pattern{s.rows, s.cols, nnz, nullptr, row_ptr, col_idx};
    return cuda::sparse_conv2d_grad_values<T>(dy_device, x_device, pattern, dvalues, c.shape(), workspace, nullptr);
  });
}

const Case kCases[] = {
    // batch, channels, height, width, m, kernel, stride, pad, dilation, groups, density
    {5, 6, 1, 1, 5, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1, 0.5},      // a linear layer
    {1, 1, 1, 1, 1, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1},        // one pixel, one channel
    {17, 8, 4, 4, 20, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 0.3},    // several images in a tile
    {3, 12, 7, 7, 12, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 0.3},    // a map per tile
    {2, 18, 13, 11, 8, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 2, 1},     // pointwise, overlapping tiles
    {3, 3, 21, 22, 5, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 0.5},    // several packs of tiles in a split
    {2, 4, 9, 12, 6, {1, 1}, {2, 3}, {0, 0}, {1, 1}, 1, 1},       // stride > kernel, some pixels unread
    {2, 10, 12, 9, 12, {2, 2}, {3, 4}, {1, 2}, {1, 1}, 2, 1},     // the same with padding and groups
    {2, 6, 23, 17, 6, {3, 2}, {2, 1}, {1, 0}, {2, 1}, 2, 0.8},    // asymmetric everything
    {1, 6, 15, 14, 12, {5, 5}, {1, 2}, {2, 2}, {1, 1}, 6, 1},     // depthwise
    {2, 3, 5, 17, 4, {1, 7}, {1, 1}, {0, 3}, {1, 1}, 1, 0.5},     // row kernel
    {2, 3, 17, 5, 4, {7, 1}, {2, 1}, {3, 0}, {1, 1}, 1, 0.5},     // column kernel
    {2, 3, 2, 2, 4, {5, 5}, {1, 1}, {2, 2}, {1, 1}, 1, 0.5},      // kernel larger than the image
    {2, 3, 6, 7, 8, {3, 3}, {2, 2}, {4, 5}, {3, 2}, 1, 1},        // padding beyond the kernel's reach
    {2, 3, 8, 9, 4, {3, 3}, {3, 2}, {1, 1}, {2, 3}, 1, 1},        // stride and dilation without a common factor
    {2, 20, 5, 6, 20, {3, 2}, {4, 4}, {2, 1}, {2, 2}, 1, 1},      // phases of x that no tap reads
    {1, 2, 2, 3, 3, {1, 1}, {5, 7}, {0, 0}, {1, 1}, 1, 1},        // stride > image
    {0, 4, 6, 6, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 0.5},      // no images
    {2, 4, 6, 6, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 2, 0},        // no nonzeros
    {2, 40, 6, 6, 35, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 0.002},  // few nonzeros: direct
    {1, 120, 8, 9, 40, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 0.05},  // several blocks of channels
    {3, 20, 6, 11, 18, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 1, 0.2},   // a downsampling layer
    {1, 2, 40, 60, 2, {3, 3}, {1, 1}, {40, 40}, {20, 25}, 1, 1},  // a reach too large for shared memory: direct
    {40, 1, 5, 11, 2, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 0.2},    // a few nonzeros, several direct splits
    {2, 20, 8, 9, 20, {3, 3}, {3, 2}, {1, 1}, {2, 3}, 2, 0.02},   // few nonzeros, strided
};

// Together the cases take every way of the launchers: direct (0) and tiled with each number of rows a warp.
template <class T>
void check_all() {
  std::set<int> forward, transposed;
  int index = 0;
  for (const Case& c : kCases) {
    simt::config.multiprocessors = c.batch % 2 ? 1 : 8;
    const auto chosen = [&](bool grad_input) {
      const int64_t nnz = RandomCsr<float>(c.out_channels, c.columns(), c.density).nnz();
      const cuda::conv::Plan plan = cuda::conv::make_plan<T>(c.shape(), grad_input, nnz);
      return plan.tiled ? plan.warp_rows : 0;
    };
    forward.insert(chosen(false));
    transposed.insert(chosen(true));
    check_case<T>(c, index++ % 2);
  }
  const std::set<int> all = sizeof(T) == 8 ? std::set<int>{0, 1, 2, 4} : std::set<int>{0, 1, 2, 4, 8};
  CHECK(forward == all && transposed == all, name_of<T>("the cases miss a kernel"), forward.size(), transposed.size());
}

// NaN and infinity in the last row and column of x stay within the outputs whose taps read them, also where a tile
// would leave the map or has idle lanes.
void check_not_finite(const Case& c) {
  const RandomCsr<float> s(c.out_channels, c.columns(), c.density);
  auto x = testing::random_values<float>(c.in_size());
  const auto dy = testing::random_values<float>(c.out_size());
  for (int64_t i = 0; i < c.in_size(); ++i) {
    const bool last = i % c.width == c.width - 1 || i / c.width % c.height == c.height - 1;
    if (last) x[i] = i % 2 ? std::numeric_limits<float>::infinity() : std::nanf("");
  }
  std::vector<Sum> want_y(dy.size()), want_dvalues(s.nnz());
  for_each_product(c, s, [&](int64_t k, int64_t at_y, int64_t at_x) {
    want_y[at_y].add((long double)(s.values[k]) * x[at_x]);
    want_dvalues[k].add((long double)(dy[at_y]) * x[at_x]);
  });
  const auto as_wanted = [](const std::vector<float>& got, const std::vector<Sum>& want) {
    for (size_t i = 0; i < got.size(); ++i)
      if (std::isfinite(want[i].value) ? !testing::near(got[i], want[i]) : std::isfinite(got[i])) return false;
    return std::any_of(want.begin(), want.end(), [](const Sum& sum) { return std::isfinite(sum.value); });
  };
  const Device<float> values(s.values), x_device(x), dy_device(dy), y(c.out_size()), dvalues(s.nnz());
  const Device<int32_t> row_ptr(s.row_ptr), col_idx(s.col_idx);
  const Device<unsigned char> workspace(cuda::sparse_conv2d_grad_values_workspace_bytes<float>(s.nnz(), c.shape()));
  const cuda::Csr<float> csr{s.rows, s.cols, s.nnz(), values, row_ptr, col_idx};
  CHECK(cuda::sparse_conv2d<float>(x_device, csr, nullptr, 0, y, c.shape(), nullptr) == cudaSuccess, c);
  CHECK(as_wanted(y.host(), want_y), "sparse_conv2d with NaN", c);
  CHECK(cuda::sparse_conv2d_grad_values<float>(dy_device, x_device, csr, dvalues, c.shape(), workspace, nullptr) ==
            cudaSuccess,
        c);
  CHECK(as_wanted(dvalues.host(), want_dvalues), "sparse_conv2d_grad_values with NaN", c);
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  check_all<half>();
  check_all<bf16>();
  check_not_finite({1, 9, 15, 11, 4, {3, 3}, {1, 1}, {0, 0}, {1, 1}, 1, 1});
  check_not_finite({3, 9, 7, 27, 4, {3, 3}, {1, 1}, {0, 0}, {1, 1}, 1, 1});
  check_not_finite({3, 9, 6, 12, 4, {2, 3}, {2, 3}, {0, 0}, {1, 1}, 1, 0.7});
  return testing::finish();
}

// The convolution with U V + S and its gradients against nested loops, in several memory layouts.
#include <array>

#include "testing_cpu.h"

namespace {

using cmd_ext::cpu::ConvShape;
using cmd_ext::cpu::ConvWeights;
using cmd_ext::cpu::Csr;
using cmd_ext::cpu::Image;
using testing::RandomCsr;
using testing::Sum;

// Strides of [batch, channels, height, width] in elements; `spaced` leaves gaps between pixels and between rows.
enum class Layout { contiguous, channels_last, spaced };

struct Strided {
  int64_t batch, channels, height, width;
  std::array<int64_t, 4> stride;

  Strided(Layout layout, int64_t batch, int64_t channels, int64_t height, int64_t width)
      : batch(batch), channels(channels), height(height), width(width) {
    if (layout == Layout::contiguous) stride = {channels * height * width, height * width, width, 1};
    if (layout == Layout::channels_last) stride = {channels * height * width, 1, width * channels, channels};
    if (layout == Layout::spaced) {
      const int64_t row = 2 * width + 1;
      stride = {height * row, batch * height * row, row, 2};
    }
  }
  int64_t at(int64_t b, int64_t c, int64_t h, int64_t w) const {
    return b * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
  }
  int64_t size() const {
    return batch * channels * height * width == 0 ? 0 : at(batch - 1, channels - 1, height - 1, width - 1) + 1;
  }
  template <class T>
  Image<T> image(T* data) const {
    return {data, channels, height, width, stride[0], stride[1], stride[2], stride[3]};
  }
};

struct Case {
  int64_t batch, channels, height, width, out_channels;
  std::array<int64_t, 2> kernel, stride, pad, dilation;
  int64_t groups;
  double density;
  int64_t rank = 0;

  int64_t group_channels() const { return channels / groups; }
  int64_t columns() const { return group_channels() * kernel[0] * kernel[1]; }
  int64_t out(int axis) const {
    const int64_t size = axis == 0 ? height : width;
    return (size + 2 * pad[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }
  ConvShape shape() const {
    return {batch, groups, kernel[0], kernel[1], stride[0], stride[1], pad[0], pad[1], dilation[0], dilation[1]};
  }
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  out << "x [" << c.batch << ", " << c.channels << ", " << c.height << ", " << c.width << "] m " << c.out_channels;
  const std::pair<const char*, const std::array<int64_t, 2>&> pairs[] = {
      {" kernel ", c.kernel}, {" stride ", c.stride}, {" pad ", c.pad}, {" dilation ", c.dilation}};
  for (const auto& [name, pair] : pairs) out << name << pair[0] << ',' << pair[1];
  return out << " groups " << c.groups << " density " << c.density << " rank " << c.rank;
}

// Calls visit(nonzero, b, out_channel, out_h, out_w, in_channel, h, w) for every product of a convolution with s.
template <class T, class Visit>
void for_each_product(const Case& c, const RandomCsr<T>& s, const Visit& visit) {
  const int64_t taps = c.kernel[0] * c.kernel[1], group_rows = c.out_channels / c.groups;
  for (int64_t i = 0; i < s.rows; ++i)
    for (int64_t k = s.row_ptr[i]; k < s.row_ptr[i + 1]; ++k) {
      const int64_t channel = i / group_rows * c.group_channels() + s.col_idx[k] / taps, tap = s.col_idx[k] % taps;
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t oh = 0; oh < c.out(0); ++oh)
          for (int64_t ow = 0; ow < c.out(1); ++ow) {
            const int64_t h = oh * c.stride[0] + tap / c.kernel[1] * c.dilation[0] - c.pad[0];
            const int64_t w = ow * c.stride[1] + tap % c.kernel[1] * c.dilation[1] - c.pad[1];
            if (h >= 0 && h < c.height && w >= 0 && w < c.width) visit(k, b, i, oh, ow, channel, h, w);
          }
    }
}

// S^T over [groups * columns] rows, as the gradient for x takes it.
template <class T>
struct Transposed {
  std::vector<int32_t> row_ptr, col_idx;
  std::vector<T> values;
  int64_t rows, cols;

  Transposed(const RandomCsr<T>& s, int64_t groups) : rows(groups * s.cols), cols(s.rows) {
    std::vector<std::vector<std::pair<int32_t, T>>> lists(rows);
    for (int64_t i = 0; i < s.rows; ++i)
      for (int64_t k = s.row_ptr[i]; k < s.row_ptr[i + 1]; ++k)
        lists[i * groups / s.rows * s.cols + s.col_idx[k]].emplace_back(int32_t(i), s.values[k]);
    row_ptr.assign(rows + 1, 0);
    for (int64_t r = 0; r < rows; ++r) {
      for (const auto& [row, value] : lists[r]) col_idx.push_back(row), values.push_back(value);
      row_ptr[r + 1] = int32_t(col_idx.size());
    }
    col_idx.shrink_to_fit();
    values.shrink_to_fit();
  }
  Csr<T> csr() const { return {rows, cols, values.data(), row_ptr.data(), col_idx.data()}; }
};

// Runs one kernel under every split; `out` starts as `before` and must end as `want`.
template <class T, class Run>
void check_kernel(const char* kernel, const Case& c, Layout layout, const std::vector<T>& before,
                  const std::vector<Sum>& want, const Run& run) {
  std::vector<T> first;
  for (const auto& [split, parallel_for] : testing::splits()) {
    std::vector<T> out = before;
    run(out.data(), parallel_for);
    if (first.empty()) first = out;
    CHECK(testing::close(out, want) && testing::same_bits(out, first), kernel, "float", 8 * sizeof(T), c, "layout",
          int(layout), split);
  }
}

// Where nothing is to be written, both start and end with the values of `old`.
template <class T>
void keep_gaps(const std::vector<char>& written, const std::vector<T>& old, std::vector<T>& before,
               std::vector<Sum>& want) {
  for (size_t i = 0; i < written.size(); ++i)
    if (!written[i]) before[i] = old[i], want[i].add(old[i]);
}

template <class T>
void check_case(const Case& c, Layout layout) {
  const RandomCsr<T> s(c.out_channels, c.columns(), c.density), all(c.out_channels, c.columns(), 1);
  const Transposed<T> st(s, c.groups);
  const Strided in(layout, c.batch, c.channels, c.height, c.width);
  const Strided out(layout, c.batch, c.out_channels, c.out(0), c.out(1));
  const auto x = testing::random_vector<T>(in.size()), dy = testing::random_vector<T>(out.size());
  const auto u = testing::random_vector<T>(c.out_channels * c.rank), bias = testing::random_vector<T>(c.out_channels);
  const auto v = testing::random_vector<T>(c.groups * c.rank * c.columns());

  // The gaps of a spaced layout are compared too: they must keep their values, all others are overwritten.
  auto before_y = testing::poison<T>(out.size()), before_dx = testing::poison<T>(in.size());
  // The gradients of the weights in one array: du, dv, dvalues.
  const int64_t dv_at = int64_t(u.size()), dvalues_at = dv_at + int64_t(v.size());
  std::vector<Sum> want_y(out.size()), want_dx(in.size()), want_dweights(dvalues_at + s.nnz());
  std::vector<char> written_y(out.size()), written_dx(in.size());
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t i = 0; i < c.out_channels; ++i)
      for (int64_t h = 0; h < c.out(0); ++h)
        for (int64_t w = 0; w < c.out(1); ++w) {
          want_y[out.at(b, i, h, w)].add(bias[i]);
          written_y[out.at(b, i, h, w)] = 1;
        }
    for (int64_t j = 0; j < c.channels; ++j)
      for (int64_t h = 0; h < c.height; ++h)
        for (int64_t w = 0; w < c.width; ++w) written_dx[in.at(b, j, h, w)] = 1;
  }
  keep_gaps(written_y, dy, before_y, want_y);
  keep_gaps(written_dx, x, before_dx, want_dx);
  for_each_product(c, s, [&](int64_t k, int64_t b, int64_t i, int64_t oh, int64_t ow, int64_t j, int64_t h, int64_t w) {
    const long double value = s.values[k], input = x[in.at(b, j, h, w)], grad = dy[out.at(b, i, oh, ow)];
    want_y[out.at(b, i, oh, ow)].add(value * input);
    want_dx[in.at(b, j, h, w)].add(value * grad);
    want_dweights[dvalues_at + k].add(grad * input);
  });
  if (c.rank > 0)
    for_each_product(c, all,
                     [&](int64_t k, int64_t b, int64_t i, int64_t oh, int64_t ow, int64_t j, int64_t h, int64_t w) {
                       const int64_t column = k % c.columns(), group = i / (c.out_channels / c.groups);
                       const long double input = x[in.at(b, j, h, w)], grad = dy[out.at(b, i, oh, ow)];
                       for (int64_t q = 0; q < c.rank; ++q) {
                         const int64_t u_at = i * c.rank + q, v_at = (group * c.rank + q) * c.columns() + column;
                         const long double left = u[u_at], right = v[v_at];
                         want_y[out.at(b, i, oh, ow)].add(left * right * input);
                         want_dx[in.at(b, j, h, w)].add(left * right * grad);
                         want_dweights[u_at].add(grad * right * input);
                         want_dweights[dv_at + v_at].add(grad * left * input);
                       }
                     });

  const Image<const T> x_image = in.image(x.data()), dy_image = out.image(dy.data());
  check_kernel<T>("lrs_conv2d", c, layout, before_y, want_y, [&](T* y, const auto& parallel_for) {
    cmd_ext::cpu::lrs_conv2d(x_image, {testing::csr_of(s), u.data(), v.data(), c.rank}, bias.data(), out.image(y),
                             c.shape(), parallel_for);
  });
  check_kernel<T>("lrs_conv2d_grad_input", c, layout, before_dx, want_dx, [&](T* dx, const auto& parallel_for) {
    cmd_ext::cpu::lrs_conv2d_grad_input(dy_image, {st.csr(), u.data(), v.data(), c.rank}, in.image(dx), c.shape(),
                                        parallel_for);
  });
  const ConvWeights<T> weights{
      {s.rows, s.cols, nullptr, s.row_ptr.data(), s.col_idx.data()}, u.data(), v.data(), c.rank};
  check_kernel<T>("lrs_conv2d_grad_weights", c, layout, testing::poison<T>(want_dweights.size()), want_dweights,
                  [&](T* out, const auto& parallel_for) {
                    cmd_ext::cpu::lrs_conv2d_grad_weights(x_image, dy_image, weights, out, out + dv_at,
                                                          out + dvalues_at, c.shape(), parallel_for);
                  });
}

const Case kCases[] = {
    // batch, channels, height, width, m, kernel, stride, pad, dilation, groups, density, rank
    {2, 6, 1, 1, 5, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1, 0.5, 2},        // a linear layer
    {1, 1, 1, 1, 1, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1, 1},          // one pixel, one channel
    {33, 8, 4, 4, 20, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 0.3, 5},      // lanes are images, the last item has one
    {3, 8, 7, 7, 17, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 0.2, 3},       // lanes of two kinds
    {2, 4, 13, 11, 6, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1, 1, 4},        // pointwise
    {2, 4, 9, 12, 6, {1, 1}, {2, 3}, {0, 0}, {1, 1}, 1, 1, 2},         // stride > kernel, some pixels unread
    {2, 4, 12, 9, 6, {2, 2}, {3, 4}, {1, 2}, {1, 1}, 2, 0.7, 1},       // the same with padding and groups
    {2, 6, 57, 33, 6, {3, 2}, {2, 1}, {1, 0}, {2, 1}, 2, 0.4, 2},      // asymmetric everything
    {1, 6, 15, 14, 12, {5, 5}, {1, 2}, {2, 2}, {1, 1}, 6, 0.5, 1},     // depthwise
    {2, 3, 5, 17, 4, {1, 7}, {1, 1}, {0, 3}, {1, 1}, 1, 0.5, 2},       // row kernel
    {2, 3, 17, 5, 4, {7, 1}, {2, 1}, {3, 0}, {1, 1}, 1, 0.5, 2},       // column kernel
    {2, 3, 2, 2, 4, {5, 5}, {1, 1}, {2, 2}, {1, 1}, 1, 0.5, 2},        // kernel larger than the image
    {2, 3, 6, 7, 4, {3, 3}, {2, 2}, {4, 5}, {3, 2}, 1, 0.5, 1},        // padding beyond the kernel's reach
    {2, 3, 8, 9, 4, {3, 3}, {3, 2}, {1, 1}, {2, 3}, 1, 0.5, 1},        // stride and dilation without a common factor
    {0, 4, 6, 6, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 0.5, 1},        // no images
    {2, 4, 6, 6, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 0, 0},          // no nonzeros, no rank
    {3, 6, 9, 7, 9, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 3, 0, 0},          // the same, with stride and groups
    {2, 4, 6, 6, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 0, 3},          // no nonzeros
    {20, 64, 14, 14, 5, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 0.02, 0},   // several channel blocks
    {2, 64, 41, 40, 5, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 0.02, 2},    // many items
    {1, 64, 43, 50, 4, {3, 3}, {2, 2}, {1, 0}, {2, 1}, 2, 0.03, 1},    // many items of a strided layer
    {1, 200, 11, 70, 19, {5, 1}, {1, 1}, {2, 0}, {1, 1}, 1, 0.01, 9},  // few items, rows dealt to threads
    {1, 72, 7, 7, 80, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 2, 0.05, 8},     // the same with groups
};

// Small random geometries: any kernel, stride, padding and dilation whose kernel fits into the padded image.
Case random_case() {
  const auto draw = [](int64_t low, int64_t high) { return low + int64_t(testing::engine()() % (high - low + 1)); };
  const int64_t groups = draw(1, 3);
  Case c{draw(1, 9), groups * draw(1, 3), draw(1, 12), draw(1, 12), groups * draw(1, 3), {}, {}, {}, {}, groups,
         0.5,        draw(0, 3)};
  for (int axis = 0; axis < 2; ++axis) {
    c.kernel[axis] = draw(1, 4);
    c.stride[axis] = draw(1, 4);
    c.dilation[axis] = draw(1, 3);
    const int64_t missing = c.dilation[axis] * (c.kernel[axis] - 1) + 1 - (axis == 0 ? c.height : c.width);
    c.pad[axis] = std::max<int64_t>(draw(0, 3), (missing + 1) / 2);
  }
  return c;
}

template <class T>
void check_all() {
  for (Layout layout : {Layout::contiguous, Layout::channels_last, Layout::spaced}) {
    for (const Case& c : kCases) check_case<T>(c, layout);
    for (int i = 0; i < 100; ++i) check_case<T>(random_case(), layout);
  }
}

// A plan changes no bit; memory that holds none, or one for vectors of another size, is refused.
template <class T>
void check_plan() {
  const int64_t channels = 8, size = 7, m = 12;
  const RandomCsr<T> s(m, channels * 9, 0.3);
  const auto u = testing::random_vector<T>(m * 2), v = testing::random_vector<T>(2 * channels * 9);
  const Strided in(Layout::channels_last, 3, channels, size, size), out(Layout::channels_last, 3, m, size, size);
  const auto data = testing::random_vector<T>(in.size());
  std::vector<T> want(out.size()), got(out.size());
  const Image<const T> x = in.image(data.data());
  const ConvWeights<T> w{testing::csr_of(s), u.data(), v.data(), 2};
  const ConvShape shape{3, 1, 3, 3, 1, 1, 1, 1, 1, 1};
  const auto& parallel_for = testing::splits().front().second;
  cmd_ext::cpu::lrs_conv2d<T>(x, w, nullptr, out.image(want.data()), shape, parallel_for);

  const auto fill = [&](void* memory) {
    return cmd_ext::cpu::plan_conv2d(x, w, out.image(got.data()), shape, memory, parallel_for);
  };
  struct alignas(64) Line {
    char bytes[64];
  };
  const int64_t bytes = fill(nullptr);
  std::vector<Line> plan((bytes + 63) / 64);
  CHECK(fill(plan.data()) == bytes, "bytes", bytes);
  cmd_ext::cpu::PlannedConv sizes{};
  CHECK(cmd_ext::cpu::read_plan(plan.data(), bytes, sizes), "bytes", bytes);
  CHECK(sizes.element == sizeof(T) && sizes.channels == channels && sizes.out_channels == m, "sizes of the plan");
  cmd_ext::cpu::run_plan<T>(plan.data(), x, nullptr, false, out.image(got.data()), parallel_for);
  CHECK(testing::same_bits(got, want), "planned, float", 8 * sizeof(T));
  for (T& y : want) y = std::max(y, T(0));
  cmd_ext::cpu::run_plan<T>(plan.data(), x, nullptr, true, out.image(got.data()), parallel_for);
  CHECK(testing::same_bits(got, want), "planned with ReLU, float", 8 * sizeof(T));
  CHECK(!cmd_ext::cpu::read_plan(plan.data(), bytes - 64, sizes), "a part of a plan");
  plan[0].bytes[0] ^= 32 ^ 64;  // the bytes of a vector
  CHECK(!cmd_ext::cpu::read_plan(plan.data(), bytes, sizes), "a plan for other vectors");
}

}  // namespace

int main() {
  check_plan<float>();
  check_plan<double>();
  check_all<float>();
  check_all<double>();
  return testing::finish_cpu();
}

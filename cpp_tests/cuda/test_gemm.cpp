// The tensor-core kernels of gemm.cuh against sums in long double over the operands as the hardware rounds them.
#include <sstream>

#include "testing_cuda.h"

namespace {

namespace cuda = cmd_ext::cuda;
using testing::as_double;
using testing::Device;
using testing::RandomCsr;
using testing::Sum;

struct Case {
  int batch, groups, channels, outs, rank;  // channels, outs and rank per group
  int in_h, in_w, kernel_h, kernel_w, stride, pad, dilation;
  double density;

  int taps() const { return kernel_h * kernel_w; }
  int out(int size, int kernel) const { return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1; }
  int out_h() const { return out(in_h, kernel_h); }
  int out_w() const { return out(in_w, kernel_w); }
  std::string name(const char* kernel, size_t bytes) const {
    std::ostringstream text;
    text << kernel << ' ' << bytes << " bytes, batch " << batch << ", groups " << groups << ", channels " << channels
         << " to " << outs << ", rank " << rank << ", map " << in_h << 'x' << in_w << ", kernel " << kernel_h << 'x'
         << kernel_w << ", stride " << stride << ", pad " << pad << ", dilation " << dilation << ", density "
         << density;
    return text.str();
  }
  cuda::GemmShape shape(bool transposed) const {
    cuda::GemmShape shape{batch,     groups,   transposed ? channels : outs,
                          out_h(),   out_w(),  in_h,
                          in_w,      kernel_h, kernel_w,
                          stride,    stride,   pad,
                          pad,       dilation, dilation,
                          transposed};
    if (transposed) {
      std::swap(shape.out_h, shape.in_h);
      std::swap(shape.out_w, shape.in_w);
    }
    return shape;
  }
};

// What the tensor cores see of a value.
double operand(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = simt::to_tf32(bits);
  std::memcpy(&x, &bits, 4);
  return x;
}
double operand(testing::half x) { return as_double(x); }
double operand(testing::bf16 x) { return as_double(x); }

// Roundoff of an operand that the kernel itself produces (Z of the one-pass kernel).
template <class T>
double operand_roundoff() {
  return sizeof(T) == 4 ? 1.0 / (1 << 11) : testing::roundoff<T>();
}

// S of a layer: outs * groups rows of channels * taps columns, with its transposed pattern per group.
template <class T>
struct Weights {
  RandomCsr<float> support;
  std::vector<T> values;
  std::vector<int32_t> col_ptr, row_idx, perm;

  explicit Weights(const Case& c)
      : support(int64_t(c.groups) * c.outs, int64_t(c.channels) * c.taps(), c.density),
        values(testing::random_values<T>(support.nnz())) {
    const int64_t n = support.cols;
    col_ptr.push_back(0);
    for (int64_t j = 0; j < c.groups * n; ++j) {
      for (int64_t i = j / n * c.outs; i < (j / n + 1) * c.outs; ++i)
        for (int at = support.row_ptr[i]; at < support.row_ptr[i + 1]; ++at)
          if (support.col_idx[at] == j % n) {
            row_idx.push_back(int32_t(i));
            perm.push_back(at);
          }
      col_ptr.push_back(int32_t(row_idx.size()));
    }
  }
};

template <class T>
void expect_near(const std::vector<T>& got, const std::vector<Sum>& want, const std::vector<double>& slack,
                 const std::string& name) {
  for (size_t i = 0; i < got.size(); ++i) {
    const long double bound = (want[i].terms + 1) * want[i].magnitude / (1 << 23) +
                              1.01L * testing::roundoff<T>() * std::abs(want[i].value) + slack[i];
    if (!(std::abs(as_double(got[i]) - want[i].value) <= bound)) {
      CHECK(false, name, "at", i, "got", as_double(got[i]), "want", double(want[i].value));
      return;
    }
  }
  CHECK(true, name);
}

// Calls visit(output pixel, tap, input pixel) for every pair that a tap connects.
template <class Visit>
void for_all_taps(const Case& c, const Visit& visit) {
  for (int n = 0; n < c.batch; ++n)
    for (int oh = 0; oh < c.out_h(); ++oh)
      for (int ow = 0; ow < c.out_w(); ++ow)
        for (int tap = 0; tap < c.taps(); ++tap) {
          const int h = oh * c.stride - c.pad + tap / c.kernel_w * c.dilation;
          const int w = ow * c.stride - c.pad + tap % c.kernel_w * c.dilation;
          if (h < 0 || h >= c.in_h || w < 0 || w >= c.in_w) continue;
          visit((int64_t(n) * c.out_h() + oh) * c.out_w() + ow, tap, (int64_t(n) * c.in_h + h) * c.in_w + w);
        }
}

// One call of `gemm`: y = x . S + z . U^T (forward), or dx = dy . S^T + g . V (transposed).
template <class T>
void check_gemm(const Case& c, bool transposed, bool with_bias, int splits) {
  const std::string name =
      c.name(transposed ? "gemm transposed" : "gemm", sizeof(T)) + ", splits " + std::to_string(splits);
  const Weights<T> s(c);
  const int64_t pixels_in = int64_t(c.batch) * c.in_h * c.in_w, pixels_out = int64_t(c.batch) * c.out_h() * c.out_w();
  const int k_channels = transposed ? c.outs : c.channels, outs = transposed ? c.channels : c.outs;
  const auto x = testing::random_values<T>((transposed ? pixels_out : pixels_in) * c.groups * k_channels);
  // The dense operand lies on the output's pixels (Z) or is reached through the taps (G).
  const auto z = testing::random_values<T>(pixels_out * c.groups * c.rank);
  const int factor_taps = transposed ? c.taps() : 1;
  const auto factor = testing::random_values<T>(int64_t(c.groups) * outs * factor_taps * c.rank);
  const auto bias = testing::random_values<T>(c.groups * outs);
  const int64_t pixels = transposed ? pixels_in : pixels_out, size = pixels * c.groups * outs;

  const Device<T> x_device(x), z_device(z), factor_device(factor), bias_device(bias), values(s.values);
  const Device<int32_t> col_ptr(s.col_ptr), row_idx(s.row_idx), perm(s.perm);
  cuda::GemmShape shape = c.shape(transposed);
  shape.splits = splits;
  const cuda::GemmOperand<T> image{x_device, int64_t(c.groups) * k_channels, k_channels, true};
  const cuda::GemmOperand<T> dense{z_device, int64_t(c.groups) * c.rank, c.rank, transposed};
  const cuda::GemmSparse<T> sparse{
      s.support.nnz() ? values.get() : nullptr, col_ptr, row_idx, perm, c.outs, c.channels};
  const auto y = testing::for_all_schedules(
      [&] {
        const Device<T> out(size);
        const Device<float> partial(splits > 1 ? splits * size : 0);
        CHECK(cuda::gemm<T>(shape, image, sparse, dense, c.rank ? factor_device.get() : nullptr,
                            with_bias ? bias_device.get() : nullptr, out, splits > 1 ? partial.get() : nullptr,
                            nullptr) == cudaSuccess,
              name);
        return out.host();
      },
      name);

  std::vector<Sum> want(size);
  for_all_taps(c, [&](int64_t out, int tap, int64_t in) {
    for (int m = 0; m < c.groups * c.outs; ++m) {
      const int group = m / c.outs;
      for (int at = s.support.row_ptr[m]; at < s.support.row_ptr[m + 1]; ++at) {
        const int channel = s.support.col_idx[at] / c.taps();
        if (s.support.col_idx[at] % c.taps() != tap) continue;
        const long double value = operand(s.values[at]);
        if (transposed)
          want[(in * c.groups + group) * c.channels + channel].add(value * operand(x[out * c.groups * c.outs + m]));
        else
          want[out * c.groups * c.outs + m].add(value * operand(x[(in * c.groups + group) * c.channels + channel]));
      }
    }
    if (transposed)
      for (int i = 0; i < c.groups * c.channels; ++i)
        for (int q = 0; q < c.rank; ++q)
          want[in * c.groups * c.channels + i].add(
              (long double)(operand(factor[(int64_t(i) * c.taps() + tap) * c.rank + q])) *
              operand(z[(out * c.groups + i / c.channels) * c.rank + q]));
  });
  for (int64_t p = 0; p < pixels; ++p)
    for (int m = 0; m < c.groups * outs; ++m) {
      for (int q = 0; !transposed && q < c.rank; ++q)
        want[p * c.groups * outs + m].add((long double)(operand(factor[int64_t(m) * c.rank + q])) *
                                          operand(z[(p * c.groups + m / outs) * c.rank + q]));
      if (with_bias) want[p * c.groups * outs + m].add(as_double(bias[m]));
    }
  expect_near(y, want, std::vector<double>(size), name);
}

template <class T>
void check_onepass(const Case& c, bool with_bias) {
  const std::string name = c.name("gemm_onepass", sizeof(T));
  const Weights<T> s(c);
  const int64_t pixels_in = int64_t(c.batch) * c.in_h * c.in_w, pixels = int64_t(c.batch) * c.out_h() * c.out_w();
  const int m_all = c.groups * c.outs, k = c.taps() * c.channels;
  const auto x = testing::random_values<T>(pixels_in * c.groups * c.channels);
  const auto v = testing::random_values<T>(int64_t(c.groups) * c.rank * k);
  const auto u = testing::random_values<T>(int64_t(m_all) * c.rank), bias = testing::random_values<T>(m_all);
  const Device<T> x_device(x), v_device(v), u_device(u), bias_device(bias), values(s.values);
  const Device<int32_t> col_ptr(s.col_ptr), row_idx(s.row_idx), perm(s.perm);
  const cuda::GemmOperand<T> image{x_device, int64_t(c.groups) * c.channels, c.channels, true};
  const cuda::GemmSparse<T> sparse{
      s.support.nnz() ? values.get() : nullptr, col_ptr, row_idx, perm, c.outs, c.channels};
  const auto y = testing::for_all_schedules(
      [&] {
        const Device<T> out(pixels * m_all);
        CHECK(cuda::gemm_onepass<T>(c.shape(false), image, v_device, u_device, c.rank, sparse,
                                    with_bias ? bias_device.get() : nullptr, out, nullptr) == cudaSuccess,
              name);
        return out.host();
      },
      name);

  std::vector<Sum> z(pixels * c.groups * c.rank), want(pixels * m_all);
  for_all_taps(c, [&](int64_t out, int tap, int64_t in) {
    for (int group = 0; group < c.groups; ++group)
      for (int channel = 0; channel < c.channels; ++channel) {
        const long double pixel = operand(x[(in * c.groups + group) * c.channels + channel]);
        for (int q = 0; q < c.rank; ++q)
          z[(out * c.groups + group) * c.rank + q].add(
              pixel * operand(v[(int64_t(group) * c.rank + q) * k + tap * c.channels + channel]));
      }
    for (int m = 0; m < m_all; ++m)
      for (int at = s.support.row_ptr[m]; at < s.support.row_ptr[m + 1]; ++at)
        if (s.support.col_idx[at] % c.taps() == tap)
          want[out * m_all + m].add(
              (long double)(operand(s.values[at])) *
              operand(x[(in * c.groups + m / c.outs) * c.channels + s.support.col_idx[at] / c.taps()]));
  });
  std::vector<double> slack(want.size());
  for (int64_t p = 0; p < pixels; ++p)
    for (int m = 0; m < m_all; ++m) {
      Sum& sum = want[p * m_all + m];
      for (int q = 0; q < c.rank; ++q) {
        const Sum& rank = z[(p * c.groups + m / c.outs) * c.rank + q];
        const long double factor = operand(u[int64_t(m) * c.rank + q]);
        sum.add(factor * rank.value);
        // Z is rounded to an operand, after a sum of its own.
        slack[p * m_all + m] += double(std::abs(factor) * (1.01 * operand_roundoff<T>() * std::abs(rank.value) +
                                                           (rank.terms + 1) * rank.magnitude / (1 << 23)));
      }
      if (with_bias) sum.add(as_double(bias[m]));
    }
  expect_near(y, want, slack, name);
}

template <class T>
void check_all() {
  const int chunk = 16 / int(sizeof(T));
  const Case cases[] = {
      // batch, groups, channels, outs, rank, in_h, in_w, kernel, stride, pad, dilation, density
      {5, 1, 4 * chunk, 37, chunk, 1, 1, 1, 1, 1, 0, 1, 0.2},          // a linear layer, odd outputs
      {130, 1, 9 * chunk, 136, 2 * chunk, 1, 1, 1, 1, 1, 0, 1, 0.05},  // two tiles of pixels and outputs
      {2, 1, chunk, 8, chunk, 7, 5, 3, 3, 1, 1, 1, 0.3},               // a convolution
      {1, 2, 2 * chunk, 24, chunk, 9, 8, 3, 2, 2, 2, 2, 0.3},          // groups, stride, dilation
      {1, 1, chunk, 2 * chunk, 0, 4, 4, 3, 3, 1, 3, 1, 1.0},           // no rank, padding >= kernel, S full
      {1, 1, chunk, 2 * chunk, chunk, 5, 3, 1, 1, 3, 0, 1, 0.0},       // no S, stride > kernel
  };
  for (const Case& c : cases) {
    check_gemm<T>(c, false, true, 1);
    check_gemm<T>(c, false, false, 3);
    if (c.outs % chunk == 0) check_gemm<T>(c, true, false, 1);
    if (c.outs % chunk == 0) check_gemm<T>(c, true, true, 2);
    if (c.rank > 0) check_onepass<T>(c, true);
  }
  Case deep = cases[1];
  deep.rank = 64;
  check_onepass<T>(deep, false);
  check_gemm<T>(deep, false, false, 1);
}

}  // namespace

int main() {
  check_all<float>();
  check_all<testing::half>();
  check_all<testing::bf16>();
  return testing::finish();
}

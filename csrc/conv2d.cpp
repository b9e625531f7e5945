// Entry points of lrs_conv2d and its gradients. The CPU kernels and the tensor-core ones compute both branches; beside
// the sparse kernels of a GPU, the low-rank branch runs on torch's convolutions.
#include "gemm.h"
#include "ops.h"

namespace cmd_ext {
namespace {

struct Conv {
  const char* op;
  Sizes kernel, stride, padding, dilation;
  int64_t groups;
  Sizes none{0, 0}, one{1, 1};

  Conv(const char* op, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation, int64_t groups)
      : op(op), kernel(kernel), stride(stride), padding(padding), dilation(dilation), groups(groups) {
    for (auto [name, value, low] : {std::tuple{"kernel_size", &this->kernel, 1},
                                    {"stride", &this->stride, 1},
                                    {"padding", &this->padding, 0},
                                    {"dilation", &this->dilation, 1}}) {
      check(value->size() == 2, op, ": ", name, " must be two integers, got ", *value);
      check((*value)[0] >= low && (*value)[1] >= low, op, ": ", name, " must be >= ", low, ", got ", *value);
    }
    check(groups >= 1, op, ": groups must be >= 1, got ", groups);
  }

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t span(int i) const { return dilation[i] * (kernel[i] - 1) + 1; }
  Sizes output_size(int64_t height, int64_t width) const {
    const Sizes size{height, width};
    Sizes out(2);
    for (int i = 0; i < 2; ++i) {
      check(size[i] + 2 * padding[i] >= span(i), op, ": padded input ", size[i] + 2 * padding[i],
            " is smaller than the kernel's span ", span(i));
      out[i] = (size[i] + 2 * padding[i] - span(i)) / stride[i] + 1;
    }
    return out;
  }
  cpu::ConvShape shape(int64_t batch) const {
    return {batch,     groups,     kernel[0],  kernel[1],   stride[0],
            stride[1], padding[0], padding[1], dilation[0], dilation[1]};
  }
#ifdef CMD_EXT_GPU
  // Geometry for the tensor-core kernels; transposed: of the gradient for x, whose output is x's grid.
  cuda::GemmShape gemm_shape(const Sizes& x, const Sizes& y, bool transposed) const {
    const Sizes &out = transposed ? x : y, &in = transposed ? y : x;
    return {x[0],           int(groups),     int(out[1] / groups), int(out[2]),      int(out[3]),
            int(in[2]),     int(in[3]),      int(kernel[0]),       int(kernel[1]),   int(stride[0]),
            int(stride[1]), int(padding[0]), int(padding[1]),      int(dilation[0]), int(dilation[1]),
            transposed};
  }
  // Of the layer with input sizes x [batch, channels, height, width] and output sizes y.
  cuda::ConvShape device_shape(const Sizes& x, const Sizes& y) const {
    return {x[0],      groups,    x[1],      x[2],      x[3],       y[1],       y[2],        y[3],
            kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
  }
#endif
};

// Checks u [m, r], v [groups * r, n] and values [nnz] against each other and returns the number of input channels.
int64_t check_weights(const Conv& conv, const Tensor& x, const Tensor& u, const Tensor& v, const Tensor& values) {
  for (auto [name, t] : {std::pair{"u", &u}, {"v", &v}, {"values", &values}}) check_same_dtype(conv.op, name, *t, x);
  check_dim(conv.op, "u", u, 2, "[m, r]");
  check_dim(conv.op, "v", v, 2, "[groups * r, n]");
  check_dim(conv.op, "values", values, 1, "[nnz]");
  const int64_t m = u.size(0), r = u.size(1), n = v.size(1);
  check(m % conv.groups == 0, conv.op, ": groups must divide m = u.size(0) = ", m, ", got ", conv.groups);
  check(v.size(0) == conv.groups * r, conv.op, ": v must be [groups * r, n] with groups * r = ", conv.groups * r,
        ", got ", sizes_of(v));
  check(n % conv.taps() == 0, conv.op, ": v.size(1) must be a multiple of the kernel's ", conv.taps(), " taps, got ",
        n);
  return n / conv.taps() * conv.groups;
}

// True where torch's own convolution would return channels_last.
bool is_channels_last(const Tensor& x) {
  if (x.numel() == 0 || x.is_contiguous()) return false;
  const Sizes size = sizes_of(x);
  int64_t expected = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (size[dim] == 1) continue;
    if (x.stride(dim) != expected) return false;
    expected *= size[dim];
  }
  return true;
}

Tensor empty_image(const Tensor& like, const Sizes& size, bool channels_last) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

template <class T>
cpu::Image<const T> image_of(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.size(1), t.size(2), t.size(3), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}
// Without data, for a plan.
template <class T>
cpu::Image<T> image_of_size(int64_t channels, int64_t height, int64_t width, bool channels_last) {
  const int64_t pixel = channels_last ? channels : 1, channel = channels_last ? 1 : height * width;
  return {nullptr, channels, height, width, channels * height * width, channel, width * pixel, pixel};
}
template <class T>
cpu::Image<T> output_of(Tensor& t) {
  return {t.mutable_data_ptr<T>(), t.size(1), t.size(2), t.size(3), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

template <class T>
cpu::ConvWeights<T> weights_of(const Pattern& pattern, const Tensor& values, const Tensor& u, const Tensor& v) {
  return {pattern.with<T>(values), u.const_data_ptr<T>(), v.const_data_ptr<T>(), u.size(1)};
}

// The type that a branch computes in: on the CPU halves are widened, a GPU has instructions for them.
ScalarType branch_type(const Tensor& t) { return on_gpu(t) ? t.scalar_type() : compute_type(t); }

#ifdef CMD_EXT_GPU
// The tensor cores compute S densely, so they pay for channels_last images once the density exceeds what the sparse
// kernel does in the same time (about a thirtieth of the multiply-adds of a dense 16-bit layer), or without an S.
bool wants_tensor_cores(const Conv& conv, const Tensor& image, int64_t channels, double density, bool channels_last) {
  const std::string path = forced_path();
  if (path == "csr" || !fits_tensor_cores(image, channels / conv.groups)) return false;
  return path == "mma" || (channels_last && (density == 0 || density > 1.0 / 30));
}

MemoryFormat format_of(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

Tensor conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Sizes& stride,
              const Sizes& padding, const Sizes& dilation, int64_t groups) {
  return call("aten::conv2d", "", x, weight, bias, stride, padding, dilation, groups);
}

// v [groups * r, n] as a convolution weight.
Tensor v_kernel(const Conv& conv, const Tensor& v) {
  return torch::stable::reshape(v, {v.size(0), v.size(1) / conv.taps(), conv.kernel[0], conv.kernel[1]});
}

// bias + U * (V * x) by torch's convolutions, for kernels that add S; NCHW.
Tensor low_rank_layer(const Conv& conv, const Tensor& x, const Tensor& u, const Tensor& v,
                      const std::optional<Tensor>& bias, const Sizes& out_sizes) {
  const int64_t m = u.size(0), r = u.size(1);
  if (r == 0) {
    Tensor y = empty_image(x, out_sizes, false);
    return bias ? torch::stable::copy_(y, torch::stable::reshape(*bias, {m, 1, 1})) : torch::stable::zero_(y);
  }
  const Tensor z = conv2d(x, v_kernel(conv, v), std::nullopt, conv.stride, conv.padding, conv.dilation, conv.groups);
  return torch::stable::contiguous(
      conv2d(z, torch::stable::reshape(u, {m, r, 1, 1}), bias, conv.one, conv.none, conv.one, conv.groups));
}

// Its gradient for x.
Tensor low_rank_grad_input(const Conv& conv, const Tensor& dy, const Tensor& u, const Tensor& v,
                           const Sizes& dx_sizes) {
  const int64_t m = u.size(0), r = u.size(1), groups = conv.groups;
  if (r == 0) {
    Tensor dx = empty_image(dy, dx_sizes, false);
    return torch::stable::zero_(dx);
  }
  const Tensor u_groups = torch::stable::reshape(u, {groups, m / groups, r});
  const Tensor u_kernel =
      torch::stable::reshape(torch::stable::transpose(u_groups, 1, 2), {groups * r, m / groups, 1, 1});
  const Tensor dz = conv2d(dy, u_kernel, std::nullopt, conv.one, conv.none, conv.one, groups);
  Sizes output_padding(2);
  for (int i = 0; i < 2; ++i)
    output_padding[i] = dx_sizes[2 + i] - ((dy.size(2 + i) - 1) * conv.stride[i] - 2 * conv.padding[i] + conv.span(i));
  return torch::stable::contiguous(call("aten::conv_transpose2d", "input", dz, v_kernel(conv, v),
                                        std::optional<Tensor>(), conv.stride, conv.padding, output_padding, groups,
                                        conv.dilation));
}
#endif

}  // namespace

Tensor lrs_conv2d(const Tensor& x, const Tensor& u, const Tensor& v, const Tensor& values, const Tensor& row_ptr,
                  const Tensor& col_idx, const Tensor& col_ptr, const Tensor& row_idx, const Tensor& perm,
                  const std::optional<Tensor>& bias, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation,
                  int64_t groups) {
  const Conv conv("lrs_conv2d", kernel_size, stride, padding, dilation, groups);
  check_float(conv.op, "x", x);
  check_dim(conv.op, "x", x, 4, "[batch, channels, height, width]");
  const int64_t channels = check_weights(conv, x, u, v, values);
  const int64_t batch = x.size(0), m = u.size(0);
  check(x.size(1) == channels, conv.op, ": x must have v.size(1) / kernel taps * groups = ", channels,
        " channels, got ", sizes_of(x));
  if (bias) {
    check_same_dtype(conv.op, "bias", *bias, x);
    check_sizes(conv.op, "bias", *bias, {m}, "[m]");
  }
  const Sizes out = conv.output_size(x.size(2), x.size(3)), out_sizes{batch, m, out[0], out[1]};
  const Pattern pattern(conv.op, "row_ptr", "col_idx", row_ptr, col_idx, m, v.size(1), values.numel(), x);
  const bool channels_last = is_channels_last(x);
  if (batch == 0) return empty_image(x, out_sizes, false);

  const ScalarType type = branch_type(x);
  const Tensor input = as_type(x, type);
  [[maybe_unused]] const double density = m * v.size(1) > 0 ? double(values.numel()) / double(m * v.size(1)) : 0;
#ifdef CMD_EXT_GPU
  if (on_gpu(x) && wants_tensor_cores(conv, input, channels, density, channels_last)) {
    check_sizes(conv.op, "perm", perm, {values.numel()}, "[nnz]");
    const Pattern transposed(conv.op, "col_ptr", "row_idx", col_ptr, row_idx, groups * v.size(1), m, values.numel(), x);
    const Tensor order = torch::stable::contiguous(perm);
    const std::optional<Tensor> b = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
    const Tensor result = gemm_layer(conv.gemm_shape(sizes_of(x), out_sizes, false),
                                     torch::stable::contiguous(input, MemoryFormat::ChannelsLast),
                                     {u, v, values, transposed.row_ptr, transposed.col_idx, order, groups}, b);
    return torch::stable::contiguous(result, format_of(channels_last));
  }
#endif
  const Tensor dense_values = dense_as(values, type), left = dense_as(u, type), right = dense_as(v, type);
  const std::optional<Tensor> wide_bias = bias ? std::optional(dense_as(*bias, type)) : std::nullopt;
#ifdef CMD_EXT_GPU
  if (on_gpu(x)) {
    Tensor y = low_rank_layer(conv, input, left, right, wide_bias, out_sizes);
    const Gpu gpu(x);
    const Tensor planes = torch::stable::contiguous(input);
    const auto shape = conv.device_shape(sizes_of(x), out_sizes);
    if (values.numel() > 0)
      dispatch_gpu(type, [&](auto tag) {
        using T = decltype(tag);
        check_cuda(conv.op, cuda::sparse_conv2d<T>(data<T>(planes), pattern.on_device<T>(dense_values), nullptr, 1,
                                                   mutable_data<T>(y), shape, gpu.stream()));
      });
    return torch::stable::contiguous(y, format_of(channels_last));
  }
#endif
  Tensor y = empty_image(input, out_sizes, channels_last);
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    cpu::lrs_conv2d(image_of<T>(input), weights_of<T>(pattern, dense_values, left, right),
                    wide_bias ? wide_bias->const_data_ptr<T>() : nullptr, output_of<T>(y), conv.shape(batch),
                    threads());
  });
  return as_type(y, x.scalar_type());
}

Tensor plan_lrs_conv2d(const Tensor& u, const Tensor& v, const Tensor& values, const Tensor& row_ptr,
                       const Tensor& col_idx, Sizes x_size, bool channels_last, Sizes kernel_size, Sizes stride,
                       Sizes padding, Sizes dilation, int64_t groups) {
  const Conv conv("_plan_lrs_conv2d", kernel_size, stride, padding, dilation, groups);
  check_float(conv.op, "u", u);
  check(u.is_cpu(), conv.op, ": u must be on the cpu");
  check(x_size.size() == 4, conv.op, ": x_size must be four integers, got ", x_size);
  const int64_t channels = check_weights(conv, u, u, v, values);
  check(x_size[0] > 0 && x_size[1] == channels, conv.op, ": x_size must be [batch > 0, ", channels,
        ", height, width], got ", x_size);
  const Sizes out = conv.output_size(x_size[2], x_size[3]);
  const Pattern pattern(conv.op, "row_ptr", "col_idx", row_ptr, col_idx, u.size(0), v.size(1), values.numel(), u);
  const ScalarType type = compute_type(u);
  const Tensor dense_values = dense_as(values, type), left = dense_as(u, type), right = dense_as(v, type);
  Tensor plan;
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    const auto x = image_of_size<const T>(channels, x_size[2], x_size[3], channels_last);
    const auto y = image_of_size<T>(u.size(0), out[0], out[1], channels_last);
    const auto weights = weights_of<T>(pattern, dense_values, left, right);
    const auto fill = [&](void* memory) {
      return cpu::plan_conv2d(x, weights, y, conv.shape(x_size[0]), memory, threads());
    };
    plan = torch::stable::empty({fill(nullptr)}, ScalarType::Byte, std::nullopt, u.device());
    fill(plan.mutable_data_ptr());
  });
  return plan;
}

Tensor planned_lrs_conv2d(const Tensor& x, const Tensor& plan, const std::optional<Tensor>& bias, bool relu) {
  const char* op = "_planned_lrs_conv2d";
  check_float(op, "x", x);
  check_dim(op, "x", x, 4, "[batch, channels, height, width]");
  const ScalarType type = compute_type(x);
  cpu::PlannedConv sizes{};
  check(plan.is_cpu() && plan.is_contiguous() && plan.scalar_type() == ScalarType::Byte &&
            cpu::read_plan(plan.const_data_ptr(), plan.numel(), sizes),
        op, ": plan must be what _plan_lrs_conv2d returns where kernels run as ", cpu::simd::isa_name());
  check_sizes(op, "x", x, {sizes.batch, sizes.channels, sizes.height, sizes.width}, "of the plan's sizes");
  check(sizes.element == (type == ScalarType::Double ? 8 : 4), op, ": x must have the plan's precision");
  const int64_t m = sizes.out_channels;
  if (bias) {
    check_same_dtype(op, "bias", *bias, x);
    check_sizes(op, "bias", *bias, {m}, "[m]");
  }
  const Tensor input = as_type(x, type);
  const std::optional<Tensor> wide_bias = bias ? std::optional(dense_as(*bias, type)) : std::nullopt;
  Tensor y = empty_image(input, {sizes.batch, m, sizes.out_height, sizes.out_width}, is_channels_last(x));
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    cpu::run_plan(plan.const_data_ptr(), image_of<T>(input), wide_bias ? wide_bias->const_data_ptr<T>() : nullptr, relu,
                  output_of<T>(y), threads());
  });
  return as_type(y, x.scalar_type());
}

Tensor lrs_conv2d_grad_input(const Tensor& grad, const Tensor& u, const Tensor& v, const Tensor& values,
                             const Tensor& row_ptr, const Tensor& col_idx, const Tensor& col_ptr, const Tensor& row_idx,
                             const Tensor& perm, Sizes input_size, Sizes kernel_size, Sizes stride, Sizes padding,
                             Sizes dilation, int64_t groups) {
  const Conv conv("_lrs_conv2d_grad_input", kernel_size, stride, padding, dilation, groups);
  check_float(conv.op, "grad", grad);
  check_dim(conv.op, "grad", grad, 4, "[batch, m, out_height, out_width]");
  const int64_t channels = check_weights(conv, grad, u, v, values);
  const int64_t batch = grad.size(0), m = u.size(0), nnz = values.numel();
  check(input_size.size() == 2, conv.op, ": input_size must be two integers, got ", input_size);
  const Sizes out = conv.output_size(input_size[0], input_size[1]);
  check_sizes(conv.op, "grad", grad, {batch, m, out[0], out[1]}, "[batch, m, out_height, out_width]");
  check_sizes(conv.op, "perm", perm, {nnz}, "[nnz]");
  check_same_device(conv.op, "perm", perm, grad);
  const Pattern transposed(conv.op, "col_ptr", "row_idx", col_ptr, row_idx, groups * v.size(1), m, nnz, grad);
  const bool channels_last = is_channels_last(grad);
  const Sizes dx_sizes{batch, channels, input_size[0], input_size[1]};
  if (batch == 0) return empty_image(grad, dx_sizes, false);

  const ScalarType type = branch_type(grad);
  const Tensor dy = as_type(grad, type);
#ifdef CMD_EXT_GPU
  const double density = m * v.size(1) > 0 ? double(nnz) / double(m * v.size(1)) : 0;
  if (on_gpu(grad) && wants_tensor_cores(conv, dy, m, density, channels_last)) {
    const Tensor order = torch::stable::contiguous(perm);
    const Tensor result = gemm_grad_input(conv.gemm_shape(dx_sizes, sizes_of(grad), true),
                                          torch::stable::contiguous(dy, MemoryFormat::ChannelsLast),
                                          {u, v, values, transposed.row_ptr, transposed.col_idx, order, groups});
    return torch::stable::contiguous(result, format_of(channels_last));
  }
#endif
  const Tensor dense_values = dense_as(values, type), left = dense_as(u, type), right = dense_as(v, type);
#ifdef CMD_EXT_GPU
  if (on_gpu(grad)) {
    Tensor dx = low_rank_grad_input(conv, dy, left, right, dx_sizes);
    const Gpu gpu(grad);
    const Tensor planes = torch::stable::contiguous(dy), order = torch::stable::contiguous(perm);
    const auto shape = conv.device_shape(dx_sizes, sizes_of(grad));
    if (nnz > 0)
      dispatch_gpu(type, [&](auto tag) {
        using T = decltype(tag);
        const cuda::Csr<T> s{m, v.size(1), nnz, data<T>(dense_values), nullptr, nullptr};
        Tensor scratch = workspace(grad, cuda::sparse_conv2d_grad_input_workspace_bytes<T>(nnz));
        check_cuda(conv.op, cuda::sparse_conv2d_grad_input<T>(data<T>(planes), s, data<int32_t>(transposed.row_ptr),
                                                              data<int32_t>(transposed.col_idx), data<int32_t>(order),
                                                              1, mutable_data<T>(dx), shape, scratch.mutable_data_ptr(),
                                                              gpu.stream()));
      });
    return torch::stable::contiguous(dx, format_of(channels_last));
  }
#endif
  const Tensor values_t = call("aten::index_select", "", dense_values, int64_t(0), perm);
  Tensor dx = empty_image(dy, dx_sizes, channels_last);
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    cpu::lrs_conv2d_grad_input(image_of<T>(dy), weights_of<T>(transposed, values_t, left, right), output_of<T>(dx),
                               conv.shape(batch), threads());
  });
  return as_type(dx, grad.scalar_type());
}

Tensor lrs_conv2d_grad_values(const Tensor& grad, const Tensor& x, const Tensor& row_ptr, const Tensor& col_idx,
                              Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation, int64_t groups) {
  const Conv conv("_lrs_conv2d_grad_values", kernel_size, stride, padding, dilation, groups);
  check_float(conv.op, "grad", grad);
  check_same_dtype(conv.op, "x", x, grad);
  check_dim(conv.op, "grad", grad, 4, "[batch, m, out_height, out_width]");
  check_dim(conv.op, "x", x, 4, "[batch, channels, height, width]");
  const int64_t batch = grad.size(0), m = grad.size(1), channels = x.size(1), nnz = col_idx.numel();
  check(m % groups == 0 && channels % groups == 0, conv.op, ": groups must divide ", m, " and ", channels, ", got ",
        groups);
  const Sizes out = conv.output_size(x.size(2), x.size(3));
  check_sizes(conv.op, "grad", grad, {x.size(0), m, out[0], out[1]}, "[batch, m, out_height, out_width]");
  const Pattern pattern(conv.op, "row_ptr", "col_idx", row_ptr, col_idx, m, channels / groups * conv.taps(), nnz, grad);

#ifdef CMD_EXT_GPU
  if (on_gpu(grad)) {
    const Gpu gpu(grad);
    const Tensor dy_planes = torch::stable::contiguous(grad), x_planes = torch::stable::contiguous(x);
    const auto shape = conv.device_shape(sizes_of(x), sizes_of(grad));
    Tensor dvalues = torch::stable::new_empty(grad, {nnz});
    if (batch == 0) return torch::stable::zero_(dvalues);
    dispatch_gpu(grad.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      Tensor partial = workspace(grad, cuda::sparse_conv2d_grad_values_workspace_bytes<T>(nnz, shape));
      check_cuda(conv.op, cuda::sparse_conv2d_grad_values<T>(data<T>(dy_planes), data<T>(x_planes),
                                                             pattern.on_device<T>(dvalues), mutable_data<T>(dvalues),
                                                             shape, partial.mutable_data_ptr(), gpu.stream()));
    });
    return dvalues;
  }
#endif
  const ScalarType type = compute_type(grad);
  const Tensor dy = as_type(grad, type), input = as_type(x, type);
  Tensor dvalues = torch::stable::new_empty(dy, {nnz});
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    const cpu::ConvWeights<T> weights{pattern.with<T>(dvalues), nullptr, nullptr, 0};
    cpu::lrs_conv2d_grad_weights<T>(image_of<T>(input), image_of<T>(dy), weights, nullptr, nullptr,
                                    dvalues.mutable_data_ptr<T>(), conv.shape(batch), threads());
  });
  return as_type(dvalues, grad.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> lrs_conv2d_grad_weights(const Tensor& grad, const Tensor& x, const Tensor& u,
                                                           const Tensor& v, const Tensor& row_ptr,
                                                           const Tensor& col_idx, Sizes kernel_size, Sizes stride,
                                                           Sizes padding, Sizes dilation, int64_t groups) {
  const Conv conv("_lrs_conv2d_grad_weights", kernel_size, stride, padding, dilation, groups);
  check_float(conv.op, "grad", grad);
  check(grad.is_cpu(), conv.op, ": grad must be on the cpu");
  check_same_dtype(conv.op, "x", x, grad);
  check_dim(conv.op, "x", x, 4, "[batch, channels, height, width]");
  const ScalarType type = compute_type(grad);
  const Tensor dy = as_type(grad, type), input = as_type(x, type), left = dense_as(u, type), right = dense_as(v, type);
  const int64_t batch = x.size(0);
  Tensor dvalues = torch::stable::new_empty(dy, {col_idx.numel()});
  const int64_t channels = check_weights(conv, dy, left, right, dvalues);
  check(x.size(1) == channels, conv.op, ": x must have v.size(1) / kernel taps * groups = ", channels,
        " channels, got ", sizes_of(x));
  const Sizes out = conv.output_size(x.size(2), x.size(3));
  check_sizes(conv.op, "grad", grad, {batch, u.size(0), out[0], out[1]}, "[batch, m, out_height, out_width]");
  const Pattern pattern(conv.op, "row_ptr", "col_idx", row_ptr, col_idx, u.size(0), v.size(1), dvalues.numel(), grad);
  Tensor du = torch::stable::empty_like(left), dv = torch::stable::empty_like(right);
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    cpu::lrs_conv2d_grad_weights(image_of<T>(input), image_of<T>(dy), weights_of<T>(pattern, dvalues, left, right),
                                 du.mutable_data_ptr<T>(), dv.mutable_data_ptr<T>(), dvalues.mutable_data_ptr<T>(),
                                 conv.shape(batch), threads());
  });
  const ScalarType result = grad.scalar_type();
  return {as_type(du, result), as_type(dv, result), as_type(dvalues, result)};
}

}  // namespace cmd_ext

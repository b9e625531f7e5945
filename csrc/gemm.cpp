// The tensor-core path: packs the factors (tap-major, rank padded to whole chunks with zeros, which is exact), splits K
// where few tiles would leave the GPU idle, and launches one kernel (thin layers) or two (Z = X V^T, then [S | U]).
#include "gemm.h"

#ifdef CMD_EXT_GPU

#include <cstdlib>

namespace cmd_ext {
namespace {

using torch::stable::contiguous;
using torch::stable::reshape;
using torch::stable::transpose;

template <class Body>
void dispatch_tensor_cores(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Half:
      return body(__half{});
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    default:
      return body(float{});
  }
}

int64_t chunk_of(const Tensor& t) { return 16 / int64_t(t.element_size()); }
int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Pads dimension `dim` of t (0 = the last) with zeros to `size`.
Tensor padded(const Tensor& t, int64_t dim, int64_t size) {
  const int64_t missing = size - t.size(t.dim() - 1 - dim);
  if (missing == 0) return contiguous(t);
  Sizes pad(2 * dim + 2, 0);
  pad.back() = missing;
  return contiguous(torch::stable::pad(t, pad));
}

Tensor empty_channels_last(const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return torch::stable::empty({batch, channels, height, width}, like.scalar_type(), std::nullopt, like.device(),
                              std::nullopt, MemoryFormat::ChannelsLast);
}

template <class T>
cuda::GemmSparse<T> sparse_of(const LayerTensors& layer, const Tensor& values, int64_t taps) {
  if (values.numel() == 0) return {};
  return {data<T>(values),           data<int32_t>(layer.col_ptr),        data<int32_t>(layer.row_idx),
          data<int32_t>(layer.perm), int(layer.u.size(0) / layer.groups), int(layer.v.size(1) / taps)};
}

// One launch of the two-operand kernel with as many splits of K as the shape wants.
template <class T>
void run_gemm(const char* op, cuda::GemmShape shape, const cuda::GemmOperand<T>& sparse_operand,
              const cuda::GemmSparse<T>& s, const cuda::GemmOperand<T>& dense_operand, const T* weights, const T* bias,
              Tensor& y, cudaStream_t stream) {
  const int64_t taps_dense = dense_operand.taps && weights ? dense_operand.channels : 0;
  shape.splits = int(cuda::gemm_splits<T>(shape, (s.values ? sparse_operand.channels : 0) + taps_dense,
                                          weights && !dense_operand.taps ? dense_operand.channels : 0));
  Tensor partial = workspace(y, shape.splits > 1 ? shape.splits * y.numel() * 4 : 0);
  check_cuda(op, cuda::gemm<T>(shape, sparse_operand, s, dense_operand, weights, bias, mutable_data<T>(y),
                               shape.splits > 1 ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr, stream));
}

}  // namespace

std::string forced_path() {
  const char* path = std::getenv("CMD_EXT_CUDA_PATH");
  return path ? path : "";
}

bool fits_tensor_cores(const Tensor& image, int64_t channels_per_group) {
  const char* tf32 = std::getenv("CMD_EXT_TF32");
  const bool typed =
      is_half(image.scalar_type()) || (image.scalar_type() == ScalarType::Float && tf32 && std::string(tf32) == "1");
  return typed && channels_per_group % chunk_of(image) == 0 && channels_per_group > 0 &&
         reinterpret_cast<uintptr_t>(image.const_data_ptr()) % 16 == 0 && image.size(2) < 32768 &&
         image.size(3) < 32768 && image.size(0) <= INT32_MAX;
}

Tensor gemm_layer(const cuda::GemmShape& shape, const Tensor& x, const LayerTensors& layer,
                  const std::optional<Tensor>& bias) {
  const char* op = "gemm_layer";
  const Gpu gpu(x);
  const int64_t g = layer.groups, r = layer.u.size(1), channels = x.size(1) / g, m = layer.u.size(0);
  const int64_t taps = int64_t(shape.kernel_h) * shape.kernel_w, rank = round_up(r, chunk_of(x));
  Tensor y = empty_channels_last(x, x.size(0), m, shape.out_h, shape.out_w);
  const Tensor values = contiguous(layer.values);
  // [g, r, channels, taps] -> [g, r, taps, channels], rank padded.
  const Tensor v =
      padded(reshape(transpose(reshape(contiguous(layer.v), {g * r, channels, taps}), 1, 2), {g, r, taps * channels}),
             1, rank);
  const Tensor u = padded(layer.u, 0, rank);
  dispatch_tensor_cores(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto s = sparse_of<T>(layer, values, taps);
    const T* b = bias ? data<T>(*bias) : nullptr;
    const cuda::GemmOperand<T> image{data<T>(x), x.size(1), int(channels), true};
    // Beyond two tiles of outputs the one-pass kernel computes Z too often.
    if (rank > 0 && rank <= cuda::gemm_onepass_rank && shape.outs <= 256)
      return check_cuda(op, cuda::gemm_onepass<T>(shape, image, data<T>(v), data<T>(u), rank, s, b, mutable_data<T>(y),
                                                  gpu.stream()));
    Tensor z = torch::stable::new_empty(x, {x.size(0) * shape.out_h * shape.out_w, g * rank});
    if (rank > 0) {
      cuda::GemmShape first = shape;
      first.outs = int(rank);
      run_gemm<T>(op, first, {}, {}, image, data<T>(v), nullptr, z, gpu.stream());
    }
    const cuda::GemmOperand<T> projected{data<T>(z), g * rank, int(rank), false};
    run_gemm<T>(op, shape, image, s, projected, rank > 0 ? data<T>(u) : nullptr, b, y, gpu.stream());
  });
  return y;
}

Tensor gemm_grad_input(const cuda::GemmShape& shape, const Tensor& dy, const LayerTensors& layer) {
  const char* op = "gemm_grad_input";
  const Gpu gpu(dy);
  const int64_t g = layer.groups, r = layer.u.size(1), m = layer.u.size(0),
                taps = int64_t(shape.kernel_h) * shape.kernel_w;
  const int64_t channels = layer.v.size(1) / taps, rank = round_up(r, chunk_of(dy));
  Tensor dx = empty_channels_last(dy, dy.size(0), g * channels, shape.out_h, shape.out_w);
  const Tensor values = contiguous(layer.values);
  const Tensor ut = padded(transpose(reshape(contiguous(layer.u), {g, m / g, r}), 1, 2), 1, rank);
  // [g, r, channels, taps] -> [g, channels, taps, r], rank padded.
  const Tensor v4 = reshape(contiguous(layer.v), {g, r, channels, taps});
  const Tensor vt = padded(transpose(transpose(v4, 1, 2), 2, 3), 0, rank);
  dispatch_tensor_cores(dy.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    Tensor z = torch::stable::new_empty(dy, {dy.size(0) * shape.in_h * shape.in_w, g * rank});
    if (rank > 0) {
      cuda::GemmShape first = shape;
      first.outs = int(rank);
      first.out_h = shape.in_h;
      first.out_w = shape.in_w;
      const cuda::GemmOperand<T> image{data<T>(dy), m, int(m / g), false};
      run_gemm<T>(op, first, {}, {}, image, data<T>(ut), nullptr, z, gpu.stream());
    }
    const cuda::GemmOperand<T> image{data<T>(dy), m, int(m / g), true};
    const cuda::GemmOperand<T> projected{data<T>(z), g * rank, int(rank), true};
    run_gemm<T>(op, shape, image, sparse_of<T>(layer, values, taps), projected, rank > 0 ? data<T>(vt) : nullptr,
                nullptr, dx, gpu.stream());
  });
  return dx;
}

}  // namespace cmd_ext

#endif

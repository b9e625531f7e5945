// The tensor-core path of both layers (a linear layer is a 1x1 convolution of one pixel), used by linear.cpp and
// conv2d.cpp on a GPU.
#pragma once

#include "check.h"

#ifdef CMD_EXT_GPU

namespace cmd_ext {

// The parameters of a layer in `groups` groups: u [m, r], v [groups * r, n], S as values and transposed pattern.
struct LayerTensors {
  const Tensor &u, &v, &values, &col_ptr, &row_idx, &perm;
  int64_t groups;
};

// Whether the tensor-core kernels take these operands: 16-bit types (float as tf32 where CMD_EXT_TF32=1), channels of a
// group in whole 16-byte chunks, maps below 32768 pixels a side.
bool fits_tensor_cores(const Tensor& image, int64_t channels_per_group);

// What CMD_EXT_CUDA_PATH asks for: "csr" or "mma" forces a path, for tests and measurements; empty: no wish.
std::string forced_path();

// y [N, m, OH, OW] (channels_last) of x [N, C, H, W] (channels_last). `shape` is the forward geometry.
Tensor gemm_layer(const cuda::GemmShape& shape, const Tensor& x, const LayerTensors& layer,
                  const std::optional<Tensor>& bias);

// dx [N, C, H, W] (channels_last) of dy [N, m, OH, OW] (channels_last). `shape` is the transposed geometry.
Tensor gemm_grad_input(const cuda::GemmShape& shape, const Tensor& dy, const LayerTensors& layer);

}  // namespace cmd_ext

#endif

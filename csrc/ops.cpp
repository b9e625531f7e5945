// Every op of cmd_ext: its schema and its kernels. Fake kernels and autograd formulas are in cmd_ext/ops.py.
//
// The support of S comes in both orientations, so that gradients gather instead of scatter and need no atomics:
//   row_ptr [m + 1], col_idx [nnz]                 CSR of S [m, n]
//   col_ptr [groups * n + 1], row_idx [nnz]        CSR of S^T, column c of group g at row g * n + c
//   perm [nnz]                                     values of S^T = values[perm]
#include "ops.h"

#define PATTERN "Tensor row_ptr, Tensor col_idx, Tensor col_ptr, Tensor row_idx, Tensor perm"
#define CONV "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups"

#ifdef CMD_EXT_SIMT
#define CMD_EXT_LIBRARY cmd_ext_simt
#else
#define CMD_EXT_LIBRARY cmd_ext
#endif
#define DEFINE(name, m) STABLE_TORCH_LIBRARY(name, m)
#define IMPLEMENT(name, device, m) STABLE_TORCH_LIBRARY_IMPL(name, device, m)

DEFINE(CMD_EXT_LIBRARY, m) {
  m.def("truncated_svd(Tensor a, Tensor basis, int rank, int n_iter) -> (Tensor u, Tensor s, Tensor vh)");
  m.def("topk_csr(Tensor a, int nnz) -> (Tensor values, Tensor row_ptr, Tensor col_idx)");
  m.def(
      "residual_topk_csr(Tensor w, Tensor u, Tensor v, int nnz) -> (Tensor residual, Tensor values, Tensor row_ptr, "
      "Tensor col_idx)");
  m.def(
      "csr_transpose(Tensor row_ptr, Tensor col_idx, int n, int groups) -> (Tensor col_ptr, Tensor row_idx, Tensor "
      "perm)");
  m.def("lrs_linear(Tensor x, Tensor u, Tensor v, Tensor values, " PATTERN ", Tensor? bias) -> Tensor");
  m.def("dense_weight(Tensor u, Tensor v, Tensor values, Tensor row_ptr, Tensor col_idx, int groups) -> Tensor");
  m.def("sddmm(Tensor a, Tensor b, Tensor row_ptr, Tensor col_idx) -> Tensor");
  m.def("lrs_conv2d(Tensor x, Tensor u, Tensor v, Tensor values, " PATTERN ", Tensor? bias, " CONV ") -> Tensor");
  m.def("_lrs_conv2d_grad_input(Tensor grad, Tensor u, Tensor v, Tensor values, " PATTERN ", int[2] input_size, " CONV
        ") -> Tensor");
  m.def("_lrs_conv2d_grad_values(Tensor grad, Tensor x, Tensor row_ptr, Tensor col_idx, " CONV ") -> Tensor");
#ifndef CMD_EXT_SIMT
  // On the CPU alone: all gradients of the weights in one pass, and the parts of the layers that inference need not
  // repeat for every call.
  m.def("_lrs_conv2d_grad_weights(Tensor grad, Tensor x, Tensor u, Tensor v, Tensor row_ptr, Tensor col_idx, " CONV
        ") -> (Tensor du, Tensor dv, Tensor dvalues)");
  m.def("_plan_lrs_linear(Tensor values, Tensor row_ptr, Tensor col_idx, int n, bool few) -> Tensor");
  m.def("_planned_lrs_linear(Tensor x, Tensor u, Tensor v, Tensor plan, Tensor? bias) -> Tensor");
  m.def(
      "_plan_lrs_conv2d(Tensor u, Tensor v, Tensor values, Tensor row_ptr, Tensor col_idx, int[4] x_size, "
      "bool channels_last, " CONV ") -> Tensor");
  m.def("_planned_lrs_conv2d(Tensor x, Tensor plan, Tensor? bias, bool relu) -> Tensor");
#endif
}

// The entry points look at the device of their arguments, so every key gets the same ones.
static void implement_all(torch::stable::detail::StableLibrary& m) {
  m.impl("truncated_svd", TORCH_BOX(&cmd_ext::truncated_svd));
  m.impl("topk_csr", TORCH_BOX(&cmd_ext::topk_csr));
  m.impl("residual_topk_csr", TORCH_BOX(&cmd_ext::residual_topk_csr));
  m.impl("csr_transpose", TORCH_BOX(&cmd_ext::csr_transpose));
  m.impl("lrs_linear", TORCH_BOX(&cmd_ext::lrs_linear));
  m.impl("dense_weight", TORCH_BOX(&cmd_ext::dense_weight));
  m.impl("sddmm", TORCH_BOX(&cmd_ext::sddmm));
  m.impl("lrs_conv2d", TORCH_BOX(&cmd_ext::lrs_conv2d));
  m.impl("_lrs_conv2d_grad_input", TORCH_BOX(&cmd_ext::lrs_conv2d_grad_input));
  m.impl("_lrs_conv2d_grad_values", TORCH_BOX(&cmd_ext::lrs_conv2d_grad_values));
}

IMPLEMENT(CMD_EXT_LIBRARY, CPU, m) {
  implement_all(m);
#ifndef CMD_EXT_SIMT
  m.impl("_lrs_conv2d_grad_weights", TORCH_BOX(&cmd_ext::lrs_conv2d_grad_weights));
  m.impl("_plan_lrs_linear", TORCH_BOX(&cmd_ext::plan_lrs_linear));
  m.impl("_planned_lrs_linear", TORCH_BOX(&cmd_ext::planned_lrs_linear));
  m.impl("_plan_lrs_conv2d", TORCH_BOX(&cmd_ext::plan_lrs_conv2d));
  m.impl("_planned_lrs_conv2d", TORCH_BOX(&cmd_ext::planned_lrs_conv2d));
#endif
}
#ifdef CMD_EXT_CUDA
IMPLEMENT(CMD_EXT_LIBRARY, CUDA, m) { implement_all(m); }
#endif

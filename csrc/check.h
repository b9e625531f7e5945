// Argument checks, dtype dispatch and calls into torch shared by the op entry points.
// Messages say: op, what, wanted, got. A bad value throws std::invalid_argument, which Python sees as ValueError;
// mixed dtypes are a TypeError, raised by cmd_ext/ops.py before the call (the stable ABI has no such exception).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "device.h"

namespace cmd_ext {

using torch::headeronly::MemoryFormat;
using Sizes = std::vector<int64_t>;

template <class Part>
void put(std::ostream& out, const Part& part) {
  out << part;
}
inline void put(std::ostream& out, const Sizes& sizes) {
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
}

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (put(message, parts), ...);
  throw std::invalid_argument(message.str());
}

inline Sizes sizes_of(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end()); }

inline void check_sizes(const char* op, const char* name, const Tensor& t, const Sizes& want, const char* why) {
  const Sizes got = sizes_of(t);
  check(got == want, op, ": ", name, " must be ", why, " = ", want, ", got ", got);
}
inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* why) {
  check(t.dim() == dim, op, ": ", name, " must be ", why, ", got ", t.dim(), "-dimensional ", sizes_of(t));
}

inline bool is_half(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }
inline void check_float(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double || is_half(type), op, ": ", name,
        " must be float32, float64, bfloat16 or float16");
  check(t.is_cpu() || on_gpu(t), op, ": ", name, " must be on the cpu like the other arguments");
}
inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  if (on_gpu(like))
    check(on_gpu(t) && t.get_device_index() == like.get_device_index(), op, ": ", name,
          " must be on the device of the ", "first argument, cuda:", int(like.get_device_index()));
  else
    check(t.is_cpu(), op, ": ", name, " must be on the cpu like the first argument");
}
inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check(t.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of the first argument");
  check_same_device(op, name, t, like);
}

// The arithmetic type: halves are widened to float, so products accumulate in float.
inline ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}
inline Tensor dense_as(const Tensor& t, ScalarType type) { return torch::stable::contiguous(as_type(t, type)); }

// Calls body(T{}) with T = float or double.
template <class Body>
void dispatch(ScalarType type, const Body& body) {
  type == ScalarType::Double ? body(double{}) : body(float{});
}

// Calls an ATen operator through the dispatcher and returns its first result.
template <class... Args>
Tensor call(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// torch's thread pool, for the CPU kernels.
inline cpu::ParallelFor threads() {
  cpu::simd::isa();  // a wrong CMD_EXT_CPU is an error here, before any other thread meets it
  const auto run = [](int64_t count, int64_t grain, const cpu::ForBody& body) {
    if (count > 0) torch::stable::parallel_for(0, count, grain, body);
  };
  return {run, int(torch::stable::get_num_threads())};
}

// One orientation of the support of S: row_ptr [rows + 1] and col_idx [nnz], int32, contiguous, on the device of
// `like`. On the CPU every index is checked on every call. On a GPU that would have to wait for the device: there the
// indices are those that Pattern.from_csr has checked.
struct Pattern {
  Tensor row_ptr, col_idx;
  int64_t rows, cols;

  Pattern(const char* op, const char* ptr_name, const char* idx_name, const Tensor& ptr, const Tensor& idx,
          int64_t rows, int64_t cols, int64_t nnz, const Tensor& like)
      : rows(rows), cols(cols) {
    for (auto [name, t] : {std::pair{ptr_name, &ptr}, {idx_name, &idx}}) {
      check(t->scalar_type() == ScalarType::Int, op, ": ", name, " must be int32");
      check_same_device(op, name, *t, like);
    }
    check(cols <= INT32_MAX, op, ": ", idx_name, " must reach every column, got ", cols, " columns for int32");
    check_sizes(op, ptr_name, ptr, {rows + 1}, "[rows + 1]");
    check_sizes(op, idx_name, idx, {nnz}, "[nnz]");
    row_ptr = torch::stable::contiguous(ptr);
    col_idx = torch::stable::contiguous(idx);
    if (!on_gpu(like)) check_indices(op, ptr_name, idx_name, nnz);
  }

  template <class T>
  cpu::Csr<T> with(const Tensor& values) const {
    return {rows, cols, values.const_data_ptr<T>(), row_ptr.const_data_ptr<int32_t>(),
            col_idx.const_data_ptr<int32_t>()};
  }
#ifdef CMD_EXT_GPU
  template <class T>
  cuda::Csr<T> on_device(const Tensor& values) const {
    return {rows, cols, values.numel(), data<T>(values), data<int32_t>(row_ptr), data<int32_t>(col_idx)};
  }
#endif

 private:
  void check_indices(const char* op, const char* ptr_name, const char* idx_name, int64_t nnz) const {
    const int32_t* p = row_ptr.const_data_ptr<int32_t>();
    check(p[0] == 0 && p[rows] == nnz, op, ": ", ptr_name, " must run from 0 to nnz = ", nnz, ", got ", p[0], " to ",
          p[rows]);
    for (int64_t i = 0; i < rows; ++i)
      check(p[i] <= p[i + 1], op, ": ", ptr_name, " must not decrease, got ", p[i], " then ", p[i + 1], " at row ", i);
    const int32_t* c = col_idx.const_data_ptr<int32_t>();
    uint32_t outside = 0;  // one comparison an index, negative ones included: this runs on every call
    for (int64_t k = 0; k < nnz; ++k) outside |= uint32_t(c[k]) >= uint32_t(cols);
    for (int64_t k = 0; outside && k < nnz; ++k)
      check(c[k] >= 0 && c[k] < cols, op, ": ", idx_name, " must lie in [0, ", cols, "), got ", c[k]);
  }
};

}  // namespace cmd_ext

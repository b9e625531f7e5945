// The kernels of the convolution (conv2d_kernels.h) for vectors of 32 bytes, and the choice between them and those for
// AVX-512 (conv2d_avx512.cpp).
#include "conv2d_kernels.h"

namespace cmd_ext::cpu {

namespace bytes64 {
template <class T>
const ConvKernels<T>& conv2d_kernels();
}

namespace {

template <class T>
const ConvKernels<T>& kernels() {
#if defined(__x86_64__)
  if (simd::isa() == simd::Isa::avx512) return bytes64::conv2d_kernels<T>();
#endif
  return bytes32::conv2d_kernels<T>();
}

}  // namespace

template <class T>
int64_t plan_conv2d(const Image<const T>& x, const ConvWeights<T>& w, const Image<T>& y, const ConvShape& shape,
                    void* memory, const ParallelFor& parallel_for) {
  return kernels<T>().plan_conv2d(x, w, y, shape, memory, parallel_for);
}

bool read_plan(const void* memory, int64_t bytes, PlannedConv& sizes) {
  return kernels<float>().read_plan(memory, bytes, sizes);
}

template <class T>
void run_plan(const void* memory, const Image<const T>& x, const T* bias, bool relu, const Image<T>& y,
              const ParallelFor& parallel_for) {
  kernels<T>().run_plan(memory, x, bias, relu, y, parallel_for);
}

template <class T>
void lrs_conv2d(const Image<const T>& x, const ConvWeights<T>& w, const T* bias, const Image<T>& y,
                const ConvShape& shape, const ParallelFor& parallel_for) {
  kernels<T>().lrs_conv2d(x, w, bias, y, shape, parallel_for);
}

template <class T>
void lrs_conv2d_grad_input(const Image<const T>& dy, const ConvWeights<T>& w, const Image<T>& dx,
                           const ConvShape& shape, const ParallelFor& parallel_for) {
  kernels<T>().lrs_conv2d_grad_input(dy, w, dx, shape, parallel_for);
}

template <class T>
void lrs_conv2d_grad_weights(const Image<const T>& x, const Image<const T>& dy, const ConvWeights<T>& w, T* du, T* dv,
                             T* dvalues, const ConvShape& shape, const ParallelFor& parallel_for) {
  kernels<T>().lrs_conv2d_grad_weights(x, dy, w, du, dv, dvalues, shape, parallel_for);
}

#define INSTANTIATE(T)                                                                                                 \
  template int64_t plan_conv2d(const Image<const T>&, const ConvWeights<T>&, const Image<T>&, const ConvShape&, void*, \
                               const ParallelFor&);                                                                    \
  template void run_plan(const void*, const Image<const T>&, const T*, bool, const Image<T>&, const ParallelFor&);     \
  template void lrs_conv2d(const Image<const T>&, const ConvWeights<T>&, const T*, const Image<T>&, const ConvShape&,  \
                           const ParallelFor&);                                                                        \
  template void lrs_conv2d_grad_input(const Image<const T>&, const ConvWeights<T>&, const Image<T>&, const ConvShape&, \
                                      const ParallelFor&);                                                             \
  template void lrs_conv2d_grad_weights(const Image<const T>&, const Image<const T>&, const ConvWeights<T>&, T*, T*,   \
                                        T*, const ConvShape&, const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace cmd_ext::cpu

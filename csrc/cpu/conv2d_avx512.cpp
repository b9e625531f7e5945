// The kernels of the convolution for AVX-512: 16 floats or 8 doubles a vector, tiles of up to 28 registers.
#define CMD_EXT_VECTOR_BYTES 64
#if defined(__x86_64__)
#include "conv2d_kernels.h"
#endif

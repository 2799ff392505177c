// The convolution kernels for any processor of the target architecture.
#include "conv2d_kernel.h"

#define SNF_ISA baseline
#define SNF_VECTOR_BYTES 16
#if defined(__aarch64__)
#define SNF_ACCUMULATORS 24
#else
#define SNF_ACCUMULATORS 12
#endif

#include "conv2d_vector.inl"
#include "conv2d_pixels.inl"
#include "conv2d_channels.inl"
#include "conv2d_choose.inl"

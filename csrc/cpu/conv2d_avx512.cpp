// The convolution kernels for AVX512.
#if defined(__x86_64__)

#include "conv2d_kernel.h"

#include "begin_avx512.inl"
#include "conv2d_vector.inl"
#include "conv2d_pixels.inl"
#include "conv2d_channels.inl"
#include "conv2d_choose.inl"
#include "end_isa.inl"

#endif

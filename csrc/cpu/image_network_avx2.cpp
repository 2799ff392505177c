// The kernels of a coupling's network for AVX2.
#if defined(__x86_64__)

#include "image_network_kernel.h"

#include "begin_avx2.inl"
#include "conv2d_vector.inl"
#include "image_network.inl"
#include "end_isa.inl"

#endif

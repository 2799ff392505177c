// The kernels of a coupling's network for AVX2.
#if defined(__x86_64__)

#include "image_network_kernel.h"

#define SNF_ISA avx2
#define SNF_VECTOR_BYTES 32
#define SNF_ACCUMULATORS 12

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#include "conv2d_vector.inl"
#include "image_network.inl"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "conv2d_vector.inl"
#include "image_network.inl"
#pragma GCC pop_options
#endif

#endif

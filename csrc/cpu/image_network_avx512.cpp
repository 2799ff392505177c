// The kernels of a coupling's network for AVX512.
#if defined(__x86_64__)

#include "image_network_kernel.h"

#define SNF_ISA avx512
#define SNF_VECTOR_BYTES 64
#define SNF_ACCUMULATORS 24

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), apply_to = function)
#include "conv2d_vector.inl"
#include "image_network.inl"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")
#include "conv2d_vector.inl"
#include "image_network.inl"
#pragma GCC pop_options
#endif

#endif

// The element-wise operators for AVX512.
#if defined(__x86_64__)

#include "../elementwise.h"
#include "../elementwise_math.h"

#define SNF_ISA avx512

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), apply_to = function)
#include "elementwise.inl"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")
#pragma GCC optimize("no-tree-pre")  // it splits paths in `solve`, which then is not vectorized
#include "elementwise.inl"
#pragma GCC pop_options
#endif

#endif

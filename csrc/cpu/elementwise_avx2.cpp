// The element-wise operators for AVX2.
#if defined(__x86_64__)

#include "../elementwise.h"
#include "../elementwise_math.h"

#define SNF_ISA avx2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#include "elementwise.inl"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#pragma GCC optimize("no-tree-pre")  // it splits paths in `solve`, which then is not vectorized
#include "elementwise.inl"
#pragma GCC pop_options
#endif

#endif

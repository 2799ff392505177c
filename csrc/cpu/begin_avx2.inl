// What follows, up to end_isa.inl, is compiled for AVX2.
#define SNF_ISA avx2
#define SNF_VECTOR_BYTES 32
#define SNF_ACCUMULATORS 12

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

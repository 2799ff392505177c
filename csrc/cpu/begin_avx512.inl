// What follows, up to end_isa.inl, is compiled for AVX512.
#define SNF_ISA avx512
#define SNF_VECTOR_BYTES 64
#define SNF_ACCUMULATORS 24

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")
#endif

// What follows, up to end_isa.inl, is compiled for any processor of the target architecture.
#define SNF_ISA baseline
#define SNF_VECTOR_BYTES 16
#if defined(__aarch64__)
#define SNF_ACCUMULATORS 24
#else
#define SNF_ACCUMULATORS 12
#endif

#if defined(__clang__)
#pragma clang attribute push
#else
#pragma GCC push_options
#endif

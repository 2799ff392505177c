// The kernels of a coupling's network for any processor of the target architecture.
#include "image_network_kernel.h"

#define SNF_ISA baseline
#define SNF_VECTOR_BYTES 16
#if defined(__aarch64__)
#define SNF_ACCUMULATORS 24
#else
#define SNF_ACCUMULATORS 12
#endif

#include "conv2d_vector.inl"
#include "image_network.inl"

// The spline's kernels for any processor of the target architecture.
#include "rq_spline_kernel.h"

#define SNF_ISA baseline
#define SNF_VECTOR_BYTES 16

#include "conv2d_vector.inl"
#include "rq_spline.inl"

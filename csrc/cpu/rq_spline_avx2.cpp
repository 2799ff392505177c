// The spline's kernels for AVX2.
#if defined(__x86_64__)

#include "rq_spline_kernel.h"

#include "begin_avx2.inl"
#include "conv2d_vector.inl"
#include "rq_spline.inl"
#include "end_isa.inl"

#endif

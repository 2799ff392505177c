// The spline's kernels for any processor of the target architecture.
#include "rq_spline_kernel.h"

#include "begin_baseline.inl"
#include "conv2d_vector.inl"
#include "rq_spline.inl"
#include "end_isa.inl"

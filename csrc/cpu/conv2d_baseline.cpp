// The convolution kernels for any processor of the target architecture.
#include "conv2d_kernel.h"

#include "begin_baseline.inl"
#include "conv2d_vector.inl"
#include "conv2d_pixels.inl"
#include "conv2d_channels.inl"
#include "conv2d_choose.inl"
#include "end_isa.inl"

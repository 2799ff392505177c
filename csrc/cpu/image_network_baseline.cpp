// The kernels of a coupling's network for any processor of the target architecture.
#include "image_network_kernel.h"

#include "begin_baseline.inl"
#include "conv2d_vector.inl"
#include "image_network.inl"
#include "end_isa.inl"

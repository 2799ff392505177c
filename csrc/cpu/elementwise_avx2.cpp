// The element-wise operators for AVX2.
#if defined(__x86_64__)

#include "../elementwise.h"
#include "../elementwise_math.h"

#include "begin_avx2.inl"
#include "elementwise.inl"
#include "end_isa.inl"

#endif

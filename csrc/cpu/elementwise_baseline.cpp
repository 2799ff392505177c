// The element-wise operators for any processor of the target architecture.
#include "../elementwise.h"
#include "../elementwise_math.h"

#include "begin_baseline.inl"
#include "elementwise.inl"
#include "end_isa.inl"

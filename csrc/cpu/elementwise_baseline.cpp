// The element-wise operators for any processor of the target architecture.
#include "../elementwise.h"
#include "../elementwise_math.h"

#define SNF_ISA baseline

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("no-tree-pre")  // it splits paths in `solve`, which then is not vectorized
#include "elementwise.inl"
#pragma GCC pop_options
#else
#include "elementwise.inl"
#endif

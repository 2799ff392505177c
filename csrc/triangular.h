// What CPU and CUDA share of triangular_conv2d_solve.
#pragma once

#include <ATen/core/Tensor.h>

#include "precision.h"

namespace snf {

// Upper is lower with pixels, taps and channels all in reverse order: kernels solve the lower
// system only, and take element n - 1 - i of an image of n elements for element i.
//
// The weight in the wide type as they read it: [tap][input channel][output channel], the pixel's
// own tap last.
inline at::Tensor packed_lower(const at::Tensor& weight, bool upper) {
  const at::Tensor lower = upper ? weight.flip({0, 1, 2, 3}) : weight;
  return wide(lower.permute({2, 3, 1, 0}));
}

}  // namespace snf

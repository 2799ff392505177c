// Sum over the batch of the gradients of log_det: a number, which on a GPU would have to be waited
// for.
#pragma once

#include <ATen/Dispatch.h>

#include "../check.h"

namespace snf {

inline double total(const OptionalTensor& grad_log_det) {
  if (!grad_log_det) return 0.0;
  const at::Tensor& g = *grad_log_det;
  const auto type = g.scalar_type();
  if (g.dim() != 1 || (type != at::kFloat && type != at::kDouble))
    return g.sum(at::kDouble).item<double>();
  double sum = 0;  // torch's takes longer than all products of a small layer
  AT_DISPATCH_FLOATING_TYPES(type, "total", [&] {
    const scalar_t* values = g.const_data_ptr<scalar_t>();
    for (int64_t i = 0, step = g.stride(0); i < g.size(0); ++i) sum += values[i * step];
  });
  return sum;
}

}  // namespace snf

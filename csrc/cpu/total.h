// Sum over the batch of the gradients of log_det: a number, which on a GPU would have to be waited
// for.
#pragma once

#include "../check.h"

namespace snf {

inline double total(const OptionalTensor& grad_log_det) {
  return grad_log_det ? grad_log_det->sum(at::kDouble).item<double>() : 0.0;
}

}  // namespace snf

// What the spline's bindings share on all devices.
#pragma once

#include <ATen/core/Tensor.h>

namespace snf {

// Unlike wide(), dispatches nothing where there is nothing to do.
inline at::Tensor dense_as(const at::Tensor& t, at::ScalarType type) {
  return t.scalar_type() == type && t.is_contiguous() ? t : t.to(type).contiguous();
}

// Whether all samples have the same parameters.
inline bool is_shared(const at::Tensor& x, const at::Tensor& widths) {
  return widths.dim() == x.dim() || widths.size(0) == 1;
}

}  // namespace snf

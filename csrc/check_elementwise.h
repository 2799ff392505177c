// Argument checks of the element-wise operators; see check.h.
#pragma once

#include <ATen/core/Tensor.h>

namespace snf {

// x is a floating-point [B, ...].
void check_batch(const at::Tensor& x, const char* name);

// alpha is in (0, 1], or in [low, high).
void check_alpha(double alpha);
void check_alpha(double alpha, double low, double high);

void check_actnorm(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& log_scale);

void check_affine_coupling(const at::Tensor& x, const at::Tensor& params);

}  // namespace snf

// What every device's convolution step needs around its kernels, in torch.
#pragma once

#include <ATen/core/Tensor.h>

#include "check.h"

namespace snf {

struct Geometry {
  int64_t dilation, groups;
  bool circular;
};

// For images of x's size: a dilation that comes to the same, and is no larger than they need.
Geometry geometry_of(const at::Tensor& x, int64_t dilation, int64_t groups, bool circular);

// The taps of a kernel that can reach a pixel: zero padding alone would meet the others.
at::Tensor reaching(const at::Tensor& kernel, const at::Tensor& x, const Geometry& geometry);

// The gradient of reaching(kernel) as one of the whole kernel: zero at the other taps.
at::Tensor filled_up(
    const at::Tensor& gradient, const at::Tensor& kernel, const at::Tensor& x,
    const Geometry& geometry);

// The kernel of the transposed convolution: channels swap within their group (SNF 26).
at::Tensor flipped(const at::Tensor& kernel, const Geometry& geometry);

// Torch's own convolution of the same size; `exact` rules out TF32 whatever the user's setting.
at::Tensor convolve(
    const at::Tensor& x, const at::Tensor& kernel, const Geometry& geometry, bool exact = false);

// delta * x for every tap of the kernel, by torch's own convolution; the same bits every time.
at::Tensor weight_gradient(
    const at::Tensor& delta, const at::Tensor& x, const at::Tensor& kernel,
    const Geometry& geometry);

}  // namespace snf

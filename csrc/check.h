// Argument checks of the operators, in the same words as snf_ext/reference/checks.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

namespace snf {

using OptionalTensor = std::optional<at::Tensor>;

void check_linear(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_inv,
    const OptionalTensor& bias);

void check_conv2d(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_inv,
    const OptionalTensor& bias, int64_t dilation, int64_t groups);

// Of the gradient of the reconstruction penalty, which the forward weight takes.
void check_penalty_share(double share);

void check_triangular(const at::Tensor& z, const at::Tensor& weight);

void check_rq_spline(
    const at::Tensor& x, const at::Tensor& widths, const at::Tensor& heights,
    const at::Tensor& derivatives, double tail_bound);

}  // namespace snf

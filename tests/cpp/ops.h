// The operators as a C++ program calls them: by name, through torch's dispatcher.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>

namespace ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Step = std::tuple<Tensor, Tensor, Tensor>;  // z, log_det, recon

inline Step snf_linear(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    bool reconstruct = true, double penalty_share = 1) {
  using Signature =
      Step(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, bool, double);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("snf_ext::snf_linear", "").typed<Signature>();
  return op.call(x, weight, weight_inv, bias, reconstruct, penalty_share);
}

inline Step snf_conv2d(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    int64_t dilation, int64_t groups, bool circular, bool reconstruct = true,
    double penalty_share = 1) {
  using Signature = Step(
      const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t, bool,
      bool, double);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("snf_ext::snf_conv2d", "").typed<Signature>();
  return op.call(
      x, weight, weight_inv, bias, dilation, groups, circular, reconstruct, penalty_share);
}

}  // namespace ops

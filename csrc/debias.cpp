// What the learned inverse lacks, estimated on probes, and how it reaches the weight's gradient; on
// every device, in torch and the layers' own operators.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "debias.h"
#include "precision.h"

namespace snf {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Estimate = std::tuple<Tensor, Tensor>;  // the gradient, and how the last term grew

using Step = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // z, log_det, recon, residual
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;
template <typename... Geometry>
using Forward =
    Step(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, Geometry..., bool);
template <typename... Geometry>
using Backward = Gradients(
    const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
    const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
    const OptionalTensor&, Geometry..., double, std::array<bool, 4>);

// By the layer's own operators, with W and R in each other's place: of p its forward gives R p, the
// residual W R p - p = -E p, and the square of that. Its backward without a reconstruction is a
// weight gradient alone.
template <typename... Geometry>
Estimate estimate(
    const char* forward_name, const char* backward_name, const Tensor& probes, const Tensor& weight,
    const Tensor& weight_inv, Geometry... geometry, at::ArrayRef<double> scales, double share) {
  auto& dispatcher = c10::Dispatcher::singleton();
  static const auto forward =
      dispatcher.findSchemaOrThrow(forward_name, "").template typed<Forward<Geometry...>>();
  static const auto backward =
      dispatcher.findSchemaOrThrow(backward_name, "").template typed<Backward<Geometry...>>();
  const WithoutAutocast full_precision;
  const Tensor v = wide(probes), w = wide(weight), r = wide(weight_inv);

  Tensor power = v, before, after, u;  // power: E^k v, but for the sign
  double sign = 1;
  for (size_t k = 0; k <= scales.size(); ++k, sign = -sign) {
    const bool last = k == scales.size();
    const auto [image, _, size, residual] =
        forward.call(power, r, w, std::nullopt, geometry..., !last);
    if (k == 1)
      u = image.mul(sign * scales[0]);
    else if (k > 1)
      u.add_(image, sign * scales[k - 1]);
    if (last) break;
    before = after.defined() ? after : v.square().sum();
    after = size.sum();
    power = residual;
  }
  const Tensor growth = (after / before.clamp_min(1e-37)).sqrt();
  const Tensor gradient = std::get<1>(backward.call(
      v, std::nullopt, std::nullopt, u, std::nullopt, std::nullopt, w, w, std::nullopt, geometry...,
      0.0, {false, true, false, false}));
  return {at::where(growth < 1, gradient * (share / static_cast<double>(v.size(0))), 0), growth};
}

void check_rest(const Tensor& v, at::ArrayRef<double> scales) {
  TORCH_CHECK_VALUE(v.size(0) > 0, "v must have at least one probe; got ", v.sizes());
  TORCH_CHECK_VALUE(!scales.empty(), "scales must have a number for each term; got none");
}

Estimate debias_linear(
    const Tensor& v, const Tensor& weight, const Tensor& weight_inv, at::ArrayRef<double> scales,
    double share) {
  TORCH_CHECK_VALUE(v.dim() == 2, "v must have shape [P, D]; got ", v.sizes());
  check_linear(v, weight, weight_inv, std::nullopt);
  check_rest(v, scales);
  return estimate<>(
      "snf_ext::snf_linear_forward", "snf_ext::snf_linear_backward", v, weight, weight_inv, scales,
      share);
}

// log_det itself, which also gives `weight` `gradient` for each of its elements.
struct WithGradient : torch::autograd::Function<WithGradient> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& log_det, const Tensor& weight, const Tensor& gradient) {
    ctx->save_for_backward({gradient});
    ctx->saved_data["dtype"] = static_cast<int64_t>(weight.scalar_type());
    at::AutoDispatchBelowADInplaceOrView below;
    return log_det.clone();
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor gradient = ctx->get_saved_variables()[0];
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    Tensor of_weight;
    if (ctx->needs_input_grad(1)) of_weight = (gradient * grads[0].sum()).to(dtype);
    return {grads[0], of_weight, Tensor()};
  }
};

Tensor with_gradient(const Tensor& log_det, const Tensor& weight, const Tensor& gradient) {
  return WithGradient::apply(log_det, weight, gradient);
}

Tensor plain_with_gradient(const Tensor& log_det, const Tensor&, const Tensor&) {
  return log_det.clone();
}

}  // namespace

void check_debias(
    const Tensor& v, const Tensor& weight, const Tensor& weight_inv, int64_t dilation,
    int64_t groups, at::ArrayRef<double> scales) {
  check_conv2d(v, weight, weight_inv, std::nullopt, dilation, groups);
  check_rest(v, scales);
}

Estimate debias_conv2d(
    const Tensor& v, const Tensor& weight, const Tensor& weight_inv, int64_t dilation,
    int64_t groups, bool circular, at::ArrayRef<double> scales, double share) {
  check_debias(v, weight, weight_inv, dilation, groups, scales);
  return estimate<int64_t, int64_t, bool>(
      "snf_ext::snf_conv2d_forward", "snf_ext::snf_conv2d_backward", v, weight, weight_inv,
      dilation, groups, circular, scales, share);
}

TORCH_LIBRARY_IMPL(snf_ext, CompositeExplicitAutograd, m) {
  m.impl("debias_linear", debias_linear);
  m.impl("debias_conv2d", debias_conv2d);
  m.impl("with_gradient", plain_with_gradient);
}

TORCH_LIBRARY_IMPL(snf_ext, Autograd, m) { m.impl("with_gradient", with_gradient); }

}  // namespace snf

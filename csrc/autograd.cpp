// The public operators: autograd and autocast around the forward and backward operators.
//
// log_det's value is 0 and its gradient the learned inverse's; recon sends no gradient to x.
// Without reconstruct recon and weight_inv have no gradient, and neither z nor a residual is kept.
// Differentiating a gradient again is refused: it is an approximation with no derivative.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "check.h"

namespace snf {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Step = std::tuple<Tensor, Tensor, Tensor>;                 // z, log_det, recon
using ForwardStep = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // and the residual
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;    // of x, weight, weight_inv, bias

// The two layers differ in the operators they call and in the arguments after the tensors.
struct Linear {
  static constexpr const char* forward_name = "snf_ext::snf_linear_forward";
  static constexpr const char* backward_name = "snf_ext::snf_linear_backward";
};

struct Conv2d {
  static constexpr const char* forward_name = "snf_ext::snf_conv2d_forward";
  static constexpr const char* backward_name = "snf_ext::snf_conv2d_backward";
};

template <typename Layer, typename... Geometry>
ForwardStep forward_op(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    std::tuple<Geometry...> geometry, bool reconstruct) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(Layer::forward_name, "")
                             .template typed<ForwardStep(
                                 const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                 Geometry..., bool)>();
  return std::apply(
      [&](auto... rest) { return op.call(x, weight, weight_inv, bias, rest..., reconstruct); },
      geometry);
}

template <typename Layer, typename... Geometry>
Gradients backward_op(
    const Tensor& grad_z, const OptionalTensor& grad_log_det, const OptionalTensor& grad_recon,
    const Tensor& x, const OptionalTensor& z, const OptionalTensor& residual, const Tensor& weight,
    const Tensor& weight_inv, const OptionalTensor& bias, std::tuple<Geometry...> geometry,
    double penalty_share, std::array<bool, 4> mask) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow(Layer::backward_name, "")
          .template typed<Gradients(
              const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
              const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
              const OptionalTensor&, Geometry..., double, std::array<bool, 4>)>();
  return std::apply(
      [&](auto... rest) {
        return op.call(
            grad_z, grad_log_det, grad_recon, x, z, residual, weight, weight_inv, bias, rest...,
            penalty_share, mask);
      },
      geometry);
}

OptionalTensor if_defined(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// The backward operator, refusing to be differentiated.
template <typename Layer, typename... Geometry>
struct Backward : torch::autograd::Function<Backward<Layer, Geometry...>> {
  static variable_list forward(
      AutogradContext*, const Tensor& grad_z, const OptionalTensor& grad_log_det,
      const OptionalTensor& grad_recon, const Tensor& x, const OptionalTensor& z,
      const OptionalTensor& residual, const Tensor& weight, const Tensor& weight_inv,
      const OptionalTensor& bias, std::tuple<Geometry...> geometry, double penalty_share,
      std::array<bool, 4> mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dw, dr, dc] = backward_op<Layer, Geometry...>(
        grad_z, grad_log_det, grad_recon, x, z, residual, weight, weight_inv, bias, geometry,
        penalty_share, mask);
    return {dx, dw, dr, dc};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "double backward through a self-normalizing layer is not supported: its gradient is a "
        "learned approximation and has no derivative of its own");
  }
};

template <typename Layer, typename... Geometry>
struct Forward : torch::autograd::Function<Forward<Layer, Geometry...>> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& weight_inv,
      const OptionalTensor& bias, std::tuple<Geometry...> geometry, bool reconstruct,
      double penalty_share) {
    check_penalty_share(penalty_share);
    at::AutoDispatchBelowADInplaceOrView below;
    auto [z, log_det, recon, residual] =
        forward_op<Layer, Geometry...>(x, weight, weight_inv, bias, geometry, reconstruct);
    const auto kept = [&](const Tensor& t) { return reconstruct ? t : Tensor(); };
    ctx->save_for_backward(
        {x, kept(z), kept(residual), weight, weight_inv, bias.value_or(Tensor())});
    if (!reconstruct) ctx->mark_non_differentiable({recon});
    ctx->saved_data["geometry"] = c10::IValue(geometry);
    ctx->saved_data["penalty_share"] = penalty_share;
    ctx->set_materialize_grads(false);
    return {z, log_det, recon};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    const OptionalTensor z = if_defined(saved[1]), residual = if_defined(saved[2]),
                         bias = if_defined(saved[5]);
    const std::array<bool, 4> mask = {
        ctx->needs_input_grad(0), ctx->needs_input_grad(1),
        residual.has_value() && ctx->needs_input_grad(2),
        bias.has_value() && ctx->needs_input_grad(3)};
    const Tensor grad_z = grads[0].defined() ? grads[0] : at::zeros_like(x);
    const auto geometry = ctx->saved_data["geometry"].to<std::tuple<Geometry...>>();
    const auto run = [&](auto function) {
      return function(
          grad_z, if_defined(grads[1]), if_defined(grads[2]), x, z, residual, saved[3], saved[4],
          bias, geometry, ctx->saved_data["penalty_share"].toDouble(), mask);
    };
    using Node = Backward<Layer, Geometry...>;
    // Usually nothing can differentiate the result, and a node costs more than a small product.
    const variable_list out =
        at::GradMode::is_enabled()
            ? run([](const auto&... arguments) { return Node::apply(arguments...); })
            : run([](const auto&... arguments) { return Node::forward(nullptr, arguments...); });
    variable_list result(7);  // one for each argument of forward
    for (int i = 0; i < 4; ++i)
      if (mask[i]) result[i] = out[i];
    return result;
  }
};

Step as_step(const variable_list& outputs) { return {outputs[0], outputs[1], outputs[2]}; }

Step linear_autograd(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    bool reconstruct, double penalty_share) {
  return as_step(
      Forward<Linear>::apply(
          x, weight, weight_inv, bias, std::tuple<>(), reconstruct, penalty_share));
}

Step conv2d_autograd(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    int64_t dilation, int64_t groups, bool circular, bool reconstruct, double penalty_share) {
  return as_step(
      Forward<Conv2d, int64_t, int64_t, bool>::apply(
          x, weight, weight_inv, bias, std::tuple(dilation, groups, circular), reconstruct,
          penalty_share));
}

// Below autograd: the forward operator alone.
template <typename Layer, typename... Geometry>
Step plain(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    Geometry... geometry, bool reconstruct, double penalty_share) {
  check_penalty_share(penalty_share);
  auto [z, log_det, recon, residual] = forward_op<Layer, Geometry...>(
      x, weight, weight_inv, bias, std::tuple(geometry...), reconstruct);
  return {z, log_det, recon};
}

// Autocast widens to float32: the residual, weighted by lambda, is worth whole nats when rounded
// to bfloat16.
using at::autocast::cached_cast;

template <at::DeviceType device, c10::DispatchKey key>
Step linear_autocast(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    bool reconstruct, double penalty_share) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("snf_ext::snf_linear", "")
                             .typed<decltype(linear_autograd)>();
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return op.call(
      cached_cast(at::kFloat, x, device), cached_cast(at::kFloat, weight, device),
      cached_cast(at::kFloat, weight_inv, device), cached_cast(at::kFloat, bias, device),
      reconstruct, penalty_share);
}

template <at::DeviceType device, c10::DispatchKey key>
Step conv2d_autocast(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    int64_t dilation, int64_t groups, bool circular, bool reconstruct, double penalty_share) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("snf_ext::snf_conv2d", "")
                             .typed<decltype(conv2d_autograd)>();
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return op.call(
      cached_cast(at::kFloat, x, device), cached_cast(at::kFloat, weight, device),
      cached_cast(at::kFloat, weight_inv, device), cached_cast(at::kFloat, bias, device), dilation,
      groups, circular, reconstruct, penalty_share);
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, Autograd, m) {
  m.impl("snf_linear", linear_autograd);
  m.impl("snf_conv2d", conv2d_autograd);
}

TORCH_LIBRARY_IMPL(snf_ext, CompositeExplicitAutograd, m) {
  m.impl("snf_linear", plain<Linear>);
  m.impl("snf_conv2d", plain<Conv2d, int64_t, int64_t, bool>);
}

TORCH_LIBRARY_IMPL(snf_ext, AutocastCPU, m) {
  m.impl("snf_linear", linear_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
  m.impl("snf_conv2d", conv2d_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(snf_ext, AutocastCUDA, m) {
  m.impl("snf_linear", linear_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
  m.impl("snf_conv2d", conv2d_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace snf

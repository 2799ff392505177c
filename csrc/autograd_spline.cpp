// rq_spline: autograd and autocast. Backward keeps the inputs alone and computes the rest again.
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
using Output = std::tuple<Tensor, Tensor>;                     // y, log_abs_det
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of x, widths, heights, derivatives

Output forward_op(
    const Tensor& x, const Tensor& widths, const Tensor& heights, const Tensor& derivatives,
    double tail_bound, bool inverse) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("snf_ext::rq_spline", "")
          .typed<Output(
              const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, bool)>();
  return op.call(x, widths, heights, derivatives, tail_bound, inverse);
}

Gradients backward_op(
    const OptionalTensor& grad_y, const OptionalTensor& grad_log_abs_det, const Tensor& x,
    const Tensor& widths, const Tensor& heights, const Tensor& derivatives, double tail_bound,
    bool inverse, std::array<bool, 4> mask) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("snf_ext::rq_spline_backward", "")
          .typed<Gradients(
              const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
              const Tensor&, const Tensor&, double, bool, std::array<bool, 4>)>();
  return op.call(
      grad_y, grad_log_abs_det, x, widths, heights, derivatives, tail_bound, inverse, mask);
}

OptionalTensor if_defined(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// The backward operator, refusing to be differentiated.
struct Backward : torch::autograd::Function<Backward> {
  static variable_list forward(
      AutogradContext*, const OptionalTensor& grad_y, const OptionalTensor& grad_log_abs_det,
      const Tensor& x, const Tensor& widths, const Tensor& heights, const Tensor& derivatives,
      double tail_bound, bool inverse, std::array<bool, 4> mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dw, dh, dd] = backward_op(
        grad_y, grad_log_abs_det, x, widths, heights, derivatives, tail_bound, inverse, mask);
    return {dx, dw, dh, dd};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "double backward through rq_spline is not supported natively: its gradient is exact, but "
        "the compiled operator has no second derivative; snf_ext.use_backend('reference') has "
        "one");
  }
};

struct Forward : torch::autograd::Function<Forward> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& widths, const Tensor& heights,
      const Tensor& derivatives, double tail_bound, bool inverse) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, log_abs_det] = forward_op(x, widths, heights, derivatives, tail_bound, inverse);
    ctx->save_for_backward({x, widths, heights, derivatives});
    ctx->saved_data["tail_bound"] = tail_bound;
    ctx->saved_data["inverse"] = inverse;
    ctx->set_materialize_grads(false);
    return {y, log_abs_det};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    std::array<bool, 4> mask;
    for (int i = 0; i < 4; ++i) mask[i] = ctx->needs_input_grad(i);
    const variable_list out = Backward::apply(
        if_defined(grads[0]), if_defined(grads[1]), saved[0], saved[1], saved[2], saved[3],
        ctx->saved_data["tail_bound"].toDouble(), ctx->saved_data["inverse"].toBool(), mask);
    variable_list result(6);
    for (int i = 0; i < 4; ++i)
      if (mask[i]) result[i] = out[i];
    return result;
  }
};

Output autograd(
    const Tensor& x, const Tensor& widths, const Tensor& heights, const Tensor& derivatives,
    double tail_bound, bool inverse) {
  const variable_list out = Forward::apply(x, widths, heights, derivatives, tail_bound, inverse);
  return {out[0], out[1]};
}

// Autocast widens to float32: a place between knots is a difference of rounded numbers.
template <at::DeviceType device, c10::DispatchKey key>
Output autocast(
    const Tensor& x, const Tensor& widths, const Tensor& heights, const Tensor& derivatives,
    double tail_bound, bool inverse) {
  using at::autocast::cached_cast;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return forward_op(
      cached_cast(at::kFloat, x, device), cached_cast(at::kFloat, widths, device),
      cached_cast(at::kFloat, heights, device), cached_cast(at::kFloat, derivatives, device),
      tail_bound, inverse);
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, Autograd, m) { m.impl("rq_spline", autograd); }

TORCH_LIBRARY_IMPL(snf_ext, AutocastCPU, m) {
  m.impl("rq_spline", autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(snf_ext, AutocastCUDA, m) {
  m.impl("rq_spline", autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace snf

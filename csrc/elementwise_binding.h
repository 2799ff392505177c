// The element-wise operators' bindings, the same for every device: checks, shapes, outputs.
//
// A Device gives: Guard, made of x; read(t), the tensor as its driver reads it; empty(sizes,
// options); forward and backward, which run an operator of elementwise_math.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "check_elementwise.h"
#include "elementwise.h"
#include "elementwise_math.h"
#include "precision.h"

namespace snf {

// The tensors of an operator; undefined where there is none.
struct ElementwiseInputs {
  at::Tensor x, first, second;
};
struct ElementwiseOutputs {
  at::Tensor y, log_abs_det, iterations;
};
struct ElementwiseGradients {
  at::Tensor x, first, second;
};

inline int64_t product_after(const at::Tensor& t, int64_t dimensions) {
  return c10::multiply_integers(t.sizes().slice(dimensions));
}

// All elements alike.
inline ElementwiseShape plain_shape(const at::Tensor& x) {
  return {x.size(0), 0, 1, product_after(x, 1), {}, {}};
}

// A run is a channel, or, where a channel is one element, all channels together.
inline ElementwiseShape channel_shape(
    const at::Tensor& x, int64_t changed, int64_t parameters_apart, Places each) {
  const int64_t pixels = product_after(x, 2), kept = (x.size(1) - changed) * pixels;
  ElementwiseShape s = {x.size(0), kept, changed, pixels, each, {}};
  if (pixels == 1) {
    s.runs = 1;
    s.length = changed;
    s.parameters.stride = parameters_apart;
  }
  return s;
}

inline ElementwiseShape actnorm_shape(const at::Tensor& x) {
  ElementwiseShape s = channel_shape(x, x.size(1), 1, {.run = 1});
  s.gradients = s.parameters;
  s.gradients.sample = x.size(1);
  return s;
}

// params: raw, t, raw, t, ... along the channels
inline ElementwiseShape coupling_shape(const at::Tensor& x, const at::Tensor& params) {
  const int64_t pixels = product_after(x, 2);
  const Places each = {.sample = params.size(1) * pixels, .run = 2 * pixels, .stride = 1};
  ElementwiseShape s = channel_shape(x, params.size(1) / 2, 2, each);
  s.gradients = s.parameters;
  return s;
}

template <typename Device>
struct ElementwiseBinding {
  using Tensor = at::Tensor;
  using Pair = std::tuple<Tensor, Tensor>;
  using Triple = std::tuple<Tensor, Tensor, Tensor>;

  template <typename Op>
  static ElementwiseOutputs forward(
      const Op& op, const ElementwiseShape& shape, const ElementwiseInputs& in) {
    ElementwiseOutputs out;
    const auto sums = in.x.options().dtype(wide_type(in.x.scalar_type()));
    if (Op::kOutput) out.y = Device::empty(in.x.sizes(), in.x.options());
    out.log_abs_det = at::empty({shape.samples}, sums);
    if (Op::kSolves) out.iterations = at::empty({shape.samples}, sums.dtype(at::kLong));
    if (in.x.numel() > 0) {
      Device::forward(op, shape, in, out);
    } else {
      out.log_abs_det.zero_();
      if (Op::kSolves) out.iterations.zero_();
    }
    return out;
  }

  template <typename Op>
  static Pair transform(
      const Op& op, const ElementwiseShape& shape, const ElementwiseInputs& in, const Tensor& x) {
    const ElementwiseOutputs out = forward(op, shape, in);
    return {out.y.to(x.scalar_type()), out.log_abs_det};
  }

  // The gradient of x, of an operator without parameters. grad_y: undefined without an output.
  template <typename Op>
  static Tensor gradient(
      const Op& op, const Tensor& grad_y, const OptionalTensor& grad_log_abs_det, const Tensor& x) {
    const typename Device::Guard guard(x);
    const ElementwiseInputs in = {Device::read(x), {}, {}};
    const ElementwiseGradients out = {Device::empty(in.x.sizes(), in.x.options()), {}, {}};
    backward(op, plain_shape(x), in, grad_y, grad_log_abs_det, out);
    return out.x.to(x.scalar_type());
  }

  template <typename Op>
  static void backward(
      const Op& op, const ElementwiseShape& shape, const ElementwiseInputs& in,
      const Tensor& grad_y, const OptionalTensor& grad_log_abs_det,
      const ElementwiseGradients& out) {
    if (in.x.numel() == 0) {
      for (const Tensor& t : {out.first, out.second})
        if (t.defined()) t.zero_();
      return;
    }
    const Tensor dy = grad_y.defined() ? Device::read(grad_y) : Tensor();
    const OptionalTensor g = per_sample(grad_log_abs_det, wide_type(in.x.scalar_type()));
    Device::backward(op, shape, in, dy, g, out);
  }

  // ---- The operators ---------------------------------------------------------------------------

  static Pair smooth_leaky_relu(const Tensor& x, double alpha) {
    check_batch(x, "x");
    check_alpha(alpha);
    const typename Device::Guard guard(x);
    return transform(SmoothLeakyReLU(alpha), plain_shape(x), {Device::read(x), {}, {}}, x);
  }

  static Tensor smooth_leaky_relu_backward(
      const Tensor& grad_y, const OptionalTensor& grad_log_abs_det, const Tensor& x, double alpha) {
    return gradient(SmoothLeakyReLU(alpha), grad_y, grad_log_abs_det, x);
  }

  static Triple smooth_leaky_relu_inverse(const Tensor& z, double alpha) {
    check_batch(z, "z");
    check_alpha(alpha);
    const typename Device::Guard guard(z);
    const ElementwiseOutputs out =
        forward(SmoothLeakyReLUInverse(alpha), plain_shape(z), {Device::read(z), {}, {}});
    const Tensor most = z.size(0) > 0 ? out.iterations.amax() : out.iterations.sum();
    return {out.y.to(z.scalar_type()), out.log_abs_det, most};
  }

  // x: what forward gave. Solving again would cost more than keeping it.
  static Tensor smooth_leaky_relu_inverse_backward(
      const Tensor& grad_x, const OptionalTensor& grad_log_abs_det, const Tensor& x, double alpha) {
    return gradient(SmoothLeakyReLUInverse(alpha), grad_x, grad_log_abs_det, x);
  }

  static Pair logit(const Tensor& x, double alpha, bool inverse) {
    check_batch(x, "x");
    check_alpha(alpha, 0.0, 0.5);
    const typename Device::Guard guard(x);
    const ElementwiseInputs in = {Device::read(x), {}, {}};
    return inverse ? transform(LogitInverse(alpha), plain_shape(x), in, x)
                   : transform(Logit(alpha), plain_shape(x), in, x);
  }

  static Tensor logit_backward(
      const Tensor& grad_y, const OptionalTensor& grad_log_abs_det, const Tensor& x, double alpha,
      bool inverse) {
    return inverse ? gradient(LogitInverse(alpha), grad_y, grad_log_abs_det, x)
                   : gradient(Logit(alpha), grad_y, grad_log_abs_det, x);
  }

  static Tensor normal_log_prob(const Tensor& z) {
    check_batch(z, "z");
    const typename Device::Guard guard(z);
    return forward(NormalLogProb(), plain_shape(z), {Device::read(z), {}, {}}).log_abs_det;
  }

  static Tensor normal_log_prob_backward(const Tensor& grad_log_prob, const Tensor& z) {
    return gradient(NormalLogProb(), Tensor(), grad_log_prob, z);
  }

  static Pair actnorm(const Tensor& x, const Tensor& shift, const Tensor& log_scale, bool inverse) {
    check_actnorm(x, shift, log_scale);
    const typename Device::Guard guard(x);
    const ElementwiseInputs in = {Device::read(x), Device::read(shift), Device::read(log_scale)};
    return inverse ? transform(ActnormInverse(), actnorm_shape(x), in, x)
                   : transform(Actnorm(), actnorm_shape(x), in, x);
  }

  static Triple actnorm_backward(
      const Tensor& grad_y, const OptionalTensor& grad_log_abs_det, const Tensor& x,
      const Tensor& shift, const Tensor& log_scale, bool inverse, std::array<bool, 3> mask) {
    const typename Device::Guard guard(x);
    const ElementwiseInputs in = {Device::read(x), Device::read(shift), Device::read(log_scale)};
    ElementwiseGradients out;
    if (mask[0]) out.x = Device::empty(in.x.sizes(), in.x.options());
    const bool parameters = mask[1] || mask[2];
    if (parameters) {
      out.first = at::empty(shift.sizes(), in.x.options());
      out.second = at::empty(shift.sizes(), in.x.options());
    }
    const auto run = [&](const auto& op) {
      if (mask[0] || parameters) backward(op, actnorm_shape(x), in, grad_y, grad_log_abs_det, out);
    };
    inverse ? run(ActnormInverse()) : run(Actnorm());
    return {
        if_wanted(mask[0], out.x, x), if_wanted(mask[1], out.first, x),
        if_wanted(mask[2], out.second, x)};
  }

  static Pair affine_coupling(const Tensor& x, const Tensor& params, bool inverse) {
    check_affine_coupling(x, params);
    const typename Device::Guard guard(x);
    const ElementwiseInputs in = coupling_inputs(x, params);
    const ElementwiseShape shape = coupling_shape(x, params);
    return inverse ? transform(AffineCouplingInverse(), shape, in, x)
                   : transform(AffineCoupling(), shape, in, x);
  }

  static Pair affine_coupling_backward(
      const Tensor& grad_y, const OptionalTensor& grad_log_abs_det, const Tensor& x,
      const Tensor& params, bool inverse, std::array<bool, 2> mask) {
    const typename Device::Guard guard(x);
    const ElementwiseInputs in = coupling_inputs(x, params);
    ElementwiseGradients out;
    if (mask[0]) out.x = Device::empty(in.x.sizes(), in.x.options());
    if (mask[1]) {
      out.first = Device::empty(params.sizes(), in.x.options());
      out.second = second_half(out.first);
    }
    const auto run = [&](const auto& op) {
      if (mask[0] || mask[1])
        backward(op, coupling_shape(x, params), in, grad_y, grad_log_abs_det, out);
    };
    inverse ? run(AffineCouplingInverse()) : run(AffineCoupling());
    return {if_wanted(mask[0], out.x, x), if_wanted(mask[1], out.first, x)};
  }

  static void implement(torch::Library& m) {
    m.impl("smooth_leaky_relu", smooth_leaky_relu);
    m.impl("smooth_leaky_relu_backward", smooth_leaky_relu_backward);
    m.impl("smooth_leaky_relu_inverse", smooth_leaky_relu_inverse);
    m.impl("smooth_leaky_relu_inverse_backward", smooth_leaky_relu_inverse_backward);
    m.impl("actnorm", actnorm);
    m.impl("actnorm_backward", actnorm_backward);
    m.impl("affine_coupling", affine_coupling);
    m.impl("affine_coupling_backward", affine_coupling_backward);
    m.impl("logit", logit);
    m.impl("logit_backward", logit_backward);
    m.impl("normal_log_prob", normal_log_prob);
    m.impl("normal_log_prob_backward", normal_log_prob_backward);
  }

 private:
  // Of a contiguous params, what starts at the first t.
  static Tensor second_half(const Tensor& params) {
    return params.numel() == 0 ? params : params.slice(1, 1);
  }
  static ElementwiseInputs coupling_inputs(const Tensor& x, const Tensor& params) {
    const Tensor own = Device::read(params);
    return {Device::read(x), own, second_half(own)};
  }
  // No elements where it was not asked for, as outputs may share no memory.
  static Tensor if_wanted(bool wanted, const Tensor& t, const Tensor& x) {
    return wanted ? t.to(x.scalar_type()) : at::empty({0}, x.options());
  }
};

}  // namespace snf

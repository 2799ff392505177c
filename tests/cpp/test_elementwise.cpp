// The element-wise operators against float64 formulas differentiated by torch: values, gradients
// and an error message.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <tuple>

#include "expect.h"
#include "formula.h"

namespace {

using at::Tensor;
using formula::call;
using formula::compare;
using formula::list;
using formula::Pair;
using formula::per_sample;
using formula::Tensors;

void smooth_leaky_relu() {
  const auto slope = [](const Tensor& x) { return 0.3 + 0.7 * x.sigmoid(); };
  const auto value = [](const Tensor& x) { return 0.3 * x + 0.7 * at::softplus(x); };
  const Tensor x = 4 * at::randn({5, 3, 7}, at::kDouble);
  compare(
      "smooth_leaky_relu", {x},
      [](const Tensors& in) {
        return list(call<Pair, const Tensor&, double>("snf_ext::smooth_leaky_relu", in[0], 0.3));
      },
      [&](const Tensors& in) { return Tensors{value(in[0]), per_sample(slope(in[0]).log())}; });
  const auto [back, log_det, iterations] =
      call<std::tuple<Tensor, Tensor, Tensor>, const Tensor&, double>(
          "snf_ext::smooth_leaky_relu_inverse", value(x), 0.3);
  expect::close(back, x, 1e-10, "smooth_leaky_relu_inverse");
  expect::close(log_det, -per_sample(slope(x).log()), 1e-10, "its log_det");
  expect::that(iterations.item<int64_t>() > 0, "iterations are counted");
}

void actnorm() {
  compare(
      "actnorm",
      {at::randn({4, 3, 5, 2}, at::kDouble), at::randn({3}, at::kDouble),
       at::randn({3}, at::kDouble)},
      [](const Tensors& in) {
        return list(
            call<Pair, const Tensor&, const Tensor&, const Tensor&, bool>(
                "snf_ext::actnorm", in[0], in[1], in[2], false));
      },
      [](const Tensors& in) {
        const Tensor shift = in[1].view({1, 3, 1, 1}), scale = in[2].view({1, 3, 1, 1});
        return Tensors{(in[0] - shift) * (-scale).exp(), (-10 * in[2].sum()).expand({4})};
      });
}

void affine_coupling() {
  compare(
      "affine_coupling",
      {at::randn({3, 5, 2, 4}, at::kDouble), 3 * at::randn({3, 6, 2, 4}, at::kDouble)},
      [](const Tensors& in) {
        return list(
            call<Pair, const Tensor&, const Tensor&, bool>(
                "snf_ext::affine_coupling", in[0], in[1], false));
      },
      [](const Tensors& in) {
        const Tensor pairs = in[1].view({3, 3, 2, 2, 4});
        const Tensor scale = 2 * (pairs.select(2, 0) / 2).tanh(), shift = pairs.select(2, 1);
        const Tensor changed = in[0].narrow(1, 2, 3) * scale.exp() + shift;
        return Tensors{at::cat({in[0].narrow(1, 0, 2), changed}, 1), per_sample(scale)};
      });
}

void logit_and_normal() {
  const double alpha = 0.05, inner = 1 - 2 * alpha;
  compare(
      "logit", {at::rand({6, 11}, at::kDouble)},
      [&](const Tensors& in) {
        return list(call<Pair, const Tensor&, double, bool>("snf_ext::logit", in[0], alpha, false));
      },
      [&](const Tensors& in) {
        const Tensor s = alpha + inner * in[0];
        return Tensors{(s / (1 - s)).log(), per_sample((inner / (s * (1 - s))).log())};
      });
  compare(
      "normal_log_prob", {at::randn({4, 3, 2}, at::kDouble)},
      [](const Tensors& in) {
        return Tensors{call<Tensor, const Tensor&>("snf_ext::normal_log_prob", in[0])};
      },
      [](const Tensors& in) {
        return Tensors{-0.5 * per_sample(in[0].square() + std::log(2 * M_PI))};
      });
}

// With heights as widths and unit slopes at the knots the spline is the identity; elsewhere the
// slope that it reports is that of its values, and its inverse undoes it.
void rq_spline() {
  const auto spline = [](const Tensors& in, bool inverse) {
    return list(
        call<Pair, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, bool>(
            "snf_ext::rq_spline", in[0], in[1], in[2], in[3], 3.0, inverse));
  };
  const Tensor x = 2 * at::randn({50, 3}, at::kDouble), w = at::randn({3, 4}, at::kDouble);
  const Tensor flat = at::zeros({3, 3}, at::kDouble);
  const Tensors same = spline({x, w, w, flat}, false);
  expect::close(same[0], x, 1e-12, "rq_spline of equal widths and heights");
  expect::close(same[1], at::zeros({50}, at::kDouble), 1e-12, "its log_det");

  const Tensors parameters = {x, w, at::randn({3, 4}, at::kDouble), at::randn({3, 3}, at::kDouble)};
  Tensors in = parameters;
  in[0] = x.detach().clone().requires_grad_();
  const Tensors out = spline(in, false);
  const Tensor slope = torch::autograd::grad({out[0].sum()}, {in[0]})[0];
  expect::close(out[1].detach(), per_sample(slope.log()), 1e-10, "rq_spline log_det");
  in = parameters;
  in[0] = out[0].detach();
  const Tensors back = spline(in, true);
  expect::close(back[0], x, 1e-10, "rq_spline inverse");
  expect::close(back[1], -out[1].detach(), 1e-10, "rq_spline inverse log_det");
  expect::throws(
      [&] { spline({x, w, flat, flat}, false); }, "heights must have the shape of widths",
      "heights of another shape");
}

}  // namespace

int main() {
  at::manual_seed(0);
  smooth_leaky_relu();
  actnorm();
  affine_coupling();
  logit_and_normal();
  rq_spline();
  return expect::report("test_elementwise");
}

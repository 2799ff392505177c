// The debias operators against dense matrices in float64: the estimate, its growth, where it is
// zeros, how it reaches the weight, and error messages.
#include <ATen/ATen.h>

#include <vector>

#include "dense.h"
#include "expect.h"
#include "formula.h"

namespace {

using at::Tensor;
using formula::Pair;

// (share / P) sum_p v_p u_p' with u = R (scales[0] E + scales[1] E^2 + ...) v and E = I - W R; and
// how much the last power of E grew. Rows of v are probes.
Pair truth(
    const Tensor& v, const Tensor& W, const Tensor& R, const std::vector<double>& scales,
    double share) {
  const Tensor E = at::eye(v.size(1), at::kDouble) - W.mm(R);
  Tensor before, power = v, sum = at::zeros_like(v);
  for (double scale : scales) {
    before = power;
    power = power.mm(E.t());
    sum = sum + scale * power;
  }
  const Tensor u = sum.mm(R.t());
  return {share / v.size(0) * v.t().mm(u), power.norm() / before.norm()};
}

Tensor signs(at::IntArrayRef shape) { return at::randn(shape, at::kDouble).sign(); }

void compare(const std::string& name, const Pair& got, const Pair& want, double tolerance) {
  expect::close(std::get<0>(got), std::get<0>(want), tolerance, name + " estimate");
  expect::close(std::get<1>(got), std::get<1>(want), tolerance, name + " growth");
}

Pair linear(
    const Tensor& v, const Tensor& W, const Tensor& R, const std::vector<double>& scales,
    double share) {
  return formula::call<
      Pair, const Tensor&, const Tensor&, const Tensor&, at::ArrayRef<double>, double>(
      "snf_ext::debias_linear", v, W, R, scales, share);
}

void linear_layers() {
  for (const int64_t size : {1, 7, 40}) {
    const Tensor eye = at::eye(size, at::kDouble), spread = 0.3 / std::sqrt(1.0 * size) * eye;
    const Tensor W = eye + at::randn({size, size}, at::kDouble).mm(spread);
    const Tensor R = eye + at::randn({size, size}, at::kDouble).mm(spread);
    const Tensor v = signs({5, size});
    const std::vector<double> scales = {1, 0.5, 2};
    const auto name = "debias_linear " + std::to_string(size);
    compare(name, linear(v, W, R, scales, 0.5), truth(v, W, R, scales, 0.5), 1e-10);
    const auto narrow = [](const Tensor& t) { return t.to(at::kFloat); };
    compare(
        name + " float", linear(narrow(v), narrow(W), narrow(R), scales, 0.5),
        truth(v, W, R, scales, 0.5), 2e-4);
    // R = -W makes E grow the probes: nothing to be had.
    const auto [estimate, growth] = linear(v, eye, -eye, scales, 0.5);
    expect::close(estimate, at::zeros_like(estimate), 0, name + " where the series diverges");
    expect::close(growth, at::full({}, 2.0, at::kDouble), 1e-10, name + " growth there");
  }
}

struct Case {
  int64_t probes;
  dense::Image image;
  int64_t kernel, inverse_kernel, dilation, groups;
  bool circular;
};

void convolution(const Case& c) {
  const int64_t channels = c.image.channels, inputs = channels / c.groups;
  const auto kernel = [&](int64_t k) {  // near the identity
    Tensor w = at::randn({channels, inputs, k, k}, at::kDouble) * (0.2 / k / std::sqrt(inputs));
    for (int64_t o = 0; o < channels; ++o) w[o][o % inputs][k / 2][k / 2] += 1;
    return w;
  };
  const Tensor w = kernel(c.kernel), r = kernel(c.inverse_kernel);
  const Tensor v = signs({c.probes, channels, c.image.height, c.image.width});
  const std::vector<double> scales = {1, 1.5};
  const auto in_w = dense::places(w.sizes(), c.image, c.dilation, c.groups, c.circular);
  const auto in_r = dense::places(r.sizes(), c.image, c.dilation, c.groups, c.circular);
  const int64_t size = c.image.size();
  const auto [matrix, growth] = truth(
      v.view({c.probes, size}), dense::matrix(w, in_w, size), dense::matrix(r, in_r, size), scales,
      0.25);
  const Pair want = {dense::to_kernel(matrix, in_w, w.sizes()), growth};
  for (const auto& [type, tolerance] : {std::pair{at::kDouble, 1e-10}, {at::kFloat, 2e-4}}) {
    const auto got = formula::call<
        Pair, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, bool,
        at::ArrayRef<double>, double>(
        "snf_ext::debias_conv2d", v.to(type), w.to(type), r.to(type), c.dilation, c.groups,
        c.circular, scales, 0.25);
    const auto name = "debias_conv2d, " + std::to_string(channels) + " channels, kernels " +
                      std::to_string(c.kernel) + " and " + std::to_string(c.inverse_kernel);
    compare(name, got, want, tolerance);
  }
}

void reaches_the_weight() {
  const Tensor log_det = at::randn({3}, at::kDouble).requires_grad_();
  const Tensor weight = at::randn({2, 2}, at::kDouble).requires_grad_();
  const Tensor gradient = at::randn({2, 2}, at::kDouble), g = at::randn({3}, at::kDouble);
  const Tensor same = formula::call<Tensor, const Tensor&, const Tensor&, const Tensor&>(
      "snf_ext::with_gradient", log_det, weight, gradient);
  (same * g).sum().backward();
  expect::close(same.detach(), log_det.detach(), 0, "with_gradient");
  expect::close(log_det.grad(), g, 1e-12, "with_gradient grad log_det");
  expect::close(weight.grad(), gradient * g.sum(), 1e-12, "with_gradient grad weight");
}

void messages() {
  const Tensor v = at::ones({2, 4}), W = at::eye(4);
  expect::throws([&] { linear(v, W, W, {}, 1); }, "scales must have a number", "no scales");
  expect::throws([&] { linear(v[0], W, W, {1}, 1); }, "v must have shape [P, D]", "one vector");
}

}  // namespace

int main() {
  at::manual_seed(0);
  linear_layers();
  for (const Case& c :
       {Case{1, {1, 5, 5}, 3, 3, 1, 1, false},
        {3, {4, 6, 5}, 3, 3, 1, 1, false},
        {2, {4, 5, 7}, 3, 5, 1, 2, false},
        {2, {2, 7, 6}, 5, 3, 2, 1, false},
        {4, {3, 5, 6}, 1, 1, 1, 3, false},
        {3, {4, 6, 5}, 3, 3, 1, 2, true},
        {2, {12, 4, 5}, 3, 3, 1, 1, false},
        {2, {24, 8, 8}, 3, 3, 1, 1, false}})
    convolution(c);
  reaches_the_weight();
  messages();
  return expect::report("test_debias");
}

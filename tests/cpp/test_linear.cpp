// snf_linear against dense algebra in float64: values, gradients and error messages.
#include <ATen/ATen.h>

#include "dense.h"
#include "expect.h"
#include "ops.h"

namespace {

using at::Tensor;

void compare(int64_t batch, int64_t features, at::ScalarType type, double tolerance) {
  const std::string name = "snf_linear " + std::to_string(batch) + "x" + std::to_string(features);
  const auto random = [&](at::IntArrayRef shape) {
    return at::randn(shape, at::kDouble).to(type).requires_grad_();
  };
  const double scale = 1 / std::sqrt(static_cast<double>(features));
  const Tensor x = random({batch, features}), bias = random({features});
  const Tensor W = at::mul(random({features, features}), scale).detach().requires_grad_();
  const Tensor R = at::mul(random({features, features}), scale).detach().requires_grad_();
  const Tensor dz = random({batch, features}).detach();
  const Tensor g = random({batch}).detach(), q = random({batch}).detach();

  const auto [z, log_det, recon] = ops::snf_linear(x, W, R, bias);
  ((z * dz).sum() + (log_det * g).sum() + (recon * q).sum()).backward();

  const auto wide = [](const Tensor& t) { return t.detach().to(at::kDouble); };
  const auto truth = dense::step(wide(x), wide(W), wide(R), wide(dz), wide(g), wide(q));
  expect::close(z, truth.y + wide(bias), tolerance, name + " z");
  expect::close(recon, truth.recon, tolerance, name + " recon");
  expect::close(log_det, at::zeros({batch}, at::kDouble), 0, name + " log_det");
  expect::close(x.grad(), truth.dx, tolerance, name + " grad x");
  expect::close(W.grad(), truth.dW, tolerance, name + " grad weight");
  expect::close(R.grad(), truth.dR, tolerance, name + " grad weight_inv");
  expect::close(bias.grad(), wide(dz).sum(0), tolerance, name + " grad bias");
}

void messages() {
  const Tensor x = at::randn({2, 4}), W = at::randn({4, 4});
  expect::throws(
      [&] { ops::snf_linear(x, W, at::randn({4, 3}), std::nullopt); }, "weight_inv must have shape",
      "inverse of another shape");
}

}  // namespace

int main() {
  at::manual_seed(0);
  for (const auto& [batch, features] : {std::pair<int64_t, int64_t>{1, 1}, {3, 7}, {16, 33}}) {
    compare(batch, features, at::kDouble, 1e-10);
    compare(batch, features, at::kFloat, 2e-4);
  }
  messages();
  return expect::report("test_linear");
}

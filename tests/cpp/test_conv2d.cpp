// snf_conv2d against its dense matrix in float64: values, gradients and error messages.
#include <ATen/ATen.h>

#include <algorithm>
#include <random>
#include <sstream>
#include <vector>

#include "dense.h"
#include "expect.h"
#include "ops.h"

namespace {

using at::Tensor;

struct Case {
  int64_t batch;
  dense::Image image;
  int64_t kernel, inverse_kernel, dilation, groups;
  bool circular;
};

std::string name_of(const Case& c) {
  std::ostringstream name;
  name << "snf_conv2d " << c.batch << 'x' << c.image.channels << 'x' << c.image.height << 'x'
       << c.image.width << ", kernels " << c.kernel << " and " << c.inverse_kernel << ", dilation "
       << c.dilation << ", groups " << c.groups << (c.circular ? ", circular" : "");
  return name.str();
}

void compare(const Case& c, at::ScalarType type, double tolerance) {
  const std::string name = name_of(c);
  const auto& [channels, height, width] = c.image;
  const auto random = [&](at::IntArrayRef shape, double scale = 1) {
    return (scale * at::randn(shape, at::kDouble)).to(type).requires_grad_();
  };
  const auto rows = [&](const Tensor& t) {
    return t.detach().to(at::kDouble).reshape({c.batch, c.image.size()});
  };
  const Tensor x = random({c.batch, channels, height, width}), bias = random({channels});
  const int64_t inputs = channels / c.groups;
  const Tensor w = random({channels, inputs, c.kernel, c.kernel}, 0.5);
  const Tensor r = random({channels, inputs, c.inverse_kernel, c.inverse_kernel}, 0.5);
  const Tensor dz = random(x.sizes()).detach();
  const Tensor g = random({c.batch}).detach(), q = random({c.batch}).detach();

  const auto [z, log_det, recon] = ops::snf_conv2d(x, w, r, bias, c.dilation, c.groups, c.circular);
  ((z * dz).sum() + (log_det * g).sum() + (recon * q).sum()).backward();

  const auto in_w = dense::places(w.sizes(), c.image, c.dilation, c.groups, c.circular);
  const auto in_r = dense::places(r.sizes(), c.image, c.dilation, c.groups, c.circular);
  const auto truth = dense::step(
      rows(x), dense::matrix(w, in_w, c.image.size()), dense::matrix(r, in_r, c.image.size()),
      rows(dz), g.to(at::kDouble), q.to(at::kDouble));
  const Tensor shift = bias.detach().to(at::kDouble).view({1, channels, 1, 1});
  expect::close(z, truth.y.view(x.sizes()) + shift, tolerance, name + " z");
  expect::close(recon, truth.recon, tolerance, name + " recon");
  expect::close(log_det, at::zeros({c.batch}, at::kDouble), 0, name + " log_det");
  expect::close(x.grad(), truth.dx.view(x.sizes()), tolerance, name + " grad x");
  expect::close(
      w.grad(), dense::to_kernel(truth.dW, in_w, w.sizes()), tolerance, name + " grad weight");
  expect::close(
      r.grad(), dense::to_kernel(truth.dR, in_r, r.sizes()), tolerance, name + " grad weight_inv");
  expect::close(bias.grad(), dz.to(at::kDouble).sum({0, 2, 3}), tolerance, name + " grad bias");
}

// Shapes by chance, small images and up to 70 channels, so that both families of CPU kernels and
// their remainders are reached. The same on every machine: the engine's numbers are standardised.
std::vector<Case> drawn(int count) {
  std::mt19937 engine(7);
  const auto one_of = [&](std::vector<int64_t> choices) {
    return choices[engine() % choices.size()];
  };
  std::vector<Case> cases;
  for (int i = 0; i < count; ++i) {
    const int64_t groups = one_of({1, 1, 2, 3}),
                  width = one_of({1, 2, 5, 8, 15, 16, 17, 33, 48, 70});
    const int64_t channels = groups * std::min<int64_t>(width, 70 / groups);
    const int64_t most = channels > 20 ? 2 : 7;
    const int64_t height = 1 + engine() % most, columns = 1 + engine() % most;
    const int64_t kernel = one_of({1, 3, 5, 7}), inverse = one_of({1, 3, 5, 7});
    cases.push_back(
        {one_of({1, 2, 9}),
         {channels, height, columns},
         channels > 20 ? std::min<int64_t>(kernel, 3) : kernel,
         channels > 20 ? std::min<int64_t>(inverse, 3) : inverse,
         one_of({1, 1, 2}),
         groups,
         one_of({0, 1}) == 1});
  }
  return cases;
}

void messages() {
  const Tensor x = at::randn({2, 4, 6, 6}), w = at::randn({4, 4, 3, 3});
  expect::throws(
      [&] { ops::snf_conv2d(x, w, at::randn({4, 2, 3, 3}), std::nullopt, 1, 1, false); },
      "weight_inv must have shape", "inverse of another shape");
}

}  // namespace

int main() {
  at::manual_seed(0);
  std::vector<Case> cases = drawn(40);
  cases.insert(
      cases.end(), {
                       Case{1, {1, 5, 5}, 3, 3, 1, 1, false},
                       Case{3, {4, 6, 5}, 3, 3, 1, 1, false},
                       Case{2, {4, 5, 7}, 5, 5, 1, 2, false},
                       Case{2, {2, 7, 6}, 3, 3, 2, 1, false},
                       Case{2, {3, 5, 6}, 1, 1, 1, 3, false},
                       Case{2, {10, 7, 7}, 1, 1, 1, 1, false},
                       Case{2, {12, 9, 11}, 1, 1, 1, 2, true},
                       Case{2, {5, 3, 5}, 1, 1, 1, 1, false},
                       Case{2, {2, 8, 7}, 3, 7, 1, 1, false},
                       Case{3, {4, 6, 5}, 3, 3, 1, 2, true},
                       Case{2, {2, 7, 9}, 3, 5, 2, 1, true},
                       Case{2, {12, 4, 5}, 3, 3, 1, 1, false},
                   });
  for (const Case& c : cases) {
    compare(c, at::kDouble, 1e-10);
    compare(c, at::kFloat, 2e-4);
  }
  messages();
  return expect::report("test_conv2d");
}

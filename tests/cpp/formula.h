// An operator against a float64 formula that torch differentiates.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "expect.h"

namespace formula {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Pair = std::tuple<Tensor, Tensor>;
using Function = std::function<Tensors(const Tensors&)>;

// The operator of that name.
template <typename Result, typename... Arguments>
Result call(const char* name, Arguments... arguments) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .template typed<Result(Arguments...)>()
      .call(arguments...);
}

inline Tensors list(const Pair& pair) { return {std::get<0>(pair), std::get<1>(pair)}; }

inline Tensor per_sample(const Tensor& t) { return t.flatten(1).sum(1); }

// Outputs of both functions, and the gradients of all inputs from the same upstream gradients.
inline void compare(
    const std::string& name, const Tensors& inputs, const Function& op, const Function& formula) {
  for (const auto& [type, tolerance] : {std::pair{at::kDouble, 1e-10}, {at::kFloat, 2e-4}}) {
    Tensors ours, truth;
    for (const Tensor& t : inputs) {
      ours.push_back(t.detach().to(type).requires_grad_());
      truth.push_back(ours.back().detach().to(at::kDouble).requires_grad_());
    }
    const Tensors got = op(ours), want = formula(truth);
    Tensors upstream, upstream_wide;
    for (size_t i = 0; i < want.size(); ++i) {
      expect::close(got[i].detach(), want[i].detach(), tolerance, name + " output");
      upstream.push_back(at::randn_like(want[i].detach()).to(got[i].scalar_type()));
      upstream_wide.push_back(upstream.back().to(at::kDouble));
    }
    const auto grads = torch::autograd::grad(got, ours, upstream);
    const auto true_grads = torch::autograd::grad(want, truth, upstream_wide);
    for (size_t i = 0; i < grads.size(); ++i)
      expect::close(grads[i], true_grads[i], tolerance, name + " gradient " + std::to_string(i));
  }
}

}  // namespace formula

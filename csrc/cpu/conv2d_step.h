// The two ways of doing a convolution step on the CPU, on float or double contiguous tensors.
// Both leave out the inverse terms and the gradient of the bias.
#pragma once

#include <array>
#include <tuple>

#include "../convolution.h"

namespace snf {

// What the forward weight takes of the gradient through z, and of the penalty's.
struct Shares {
  double data, penalty;
};

using ForwardStep = std::tuple<at::Tensor, at::Tensor, at::Tensor>;   // z, recon, residual
using BackwardStep = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // dx, dW, dR

#define SNF_DECLARE_STEPS(name)                                                           \
  namespace name {                                                                        \
  ForwardStep forward(                                                                    \
      const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_inv,        \
      const OptionalTensor& bias, const Geometry& geometry, bool reconstruct);            \
  BackwardStep backward(                                                                  \
      const at::Tensor& grad_z, const OptionalTensor& grad_recon, const at::Tensor& x,    \
      const OptionalTensor& z, const OptionalTensor& residual, const at::Tensor& weight,  \
      const at::Tensor& weight_inv, const OptionalTensor& bias, const Geometry& geometry, \
      const Shares& shares, std::array<bool, 4> mask);                                    \
  }

SNF_DECLARE_STEPS(fused)  // own kernels, everything of an image while it is in the cache
SNF_DECLARE_STEPS(stock)  // torch's convolutions on merged deltas, for very many channels

// Whether the latter are faster.
bool prefers_stock(const at::Tensor& weight, const at::Tensor& weight_inv);

}  // namespace snf

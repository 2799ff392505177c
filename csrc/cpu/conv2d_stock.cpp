// The convolution step in torch's own convolutions on merged deltas: with very many channels their
// matrix kernels win over fusing.
#include <ATen/ATen.h>

#include "conv2d_step.h"

namespace snf {
namespace {

using at::Tensor;

Tensor per_image(const Tensor& numbers) { return numbers.view({-1, 1, 1, 1}); }

Tensor per_channel(const Tensor& numbers) { return numbers.view({1, -1, 1, 1}); }

}  // namespace

ForwardStep stock::forward(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    const Geometry& geometry, bool reconstruct) {
  Tensor z = convolve(x, weight, geometry);
  Tensor residual = at::empty({0}, x.options()), recon = at::zeros({x.size(0)}, x.options());
  if (reconstruct) {
    residual = convolve(z, weight_inv, geometry).sub_(x);
    recon = residual.square().sum({1, 2, 3});
  }
  if (bias) z.add_(per_channel(*bias));
  return {z, recon, residual};
}

BackwardStep stock::backward(
    const Tensor& grad_z, const OptionalTensor& grad_recon, const Tensor& x,
    const OptionalTensor& z, const OptionalTensor& residual, const Tensor& weight,
    const Tensor& weight_inv, const OptionalTensor& bias, const Geometry& geometry,
    const Shares& shares, std::array<bool, 4> mask) {
  Tensor dx, dw, dr, pull;
  if (grad_recon) pull = *residual * per_image(grad_recon->mul(2));
  if (mask[0] || mask[2]) dx = convolve(grad_z, flipped(weight, geometry), geometry);
  if (mask[1]) {
    Tensor delta = grad_z * shares.data;
    if (grad_recon && shares.penalty != 0)
      delta.add_(convolve(pull, flipped(weight_inv, geometry), geometry), shares.penalty);
    dw = weight_gradient(delta, x, weight, geometry);
  }
  if (mask[2]) {
    const Tensor delta = grad_recon ? pull.sub_(dx, 0.5) : dx * -0.5;
    dr = weight_gradient(delta, bias ? *z - per_channel(*bias) : *z, weight_inv, geometry);
  }
  return {dx, dw, dr};
}

}  // namespace snf

// The convolution step in torch's own convolutions on merged deltas: with very many channels their
// matrix kernels win over fusing.
#include <ATen/ATen.h>

#include "conv2d_step.h"

namespace snf {
namespace {

using at::Tensor;

// The image with a wrapped or zero margin as wide as the kernel reaches. By index rather than
// at::pad, which refuses a circular margin wider than the image.
Tensor padded(const Tensor& x, const Tensor& kernel, const Geometry& g) {
  const int64_t rows = kernel.size(2) / 2 * g.dilation, columns = kernel.size(3) / 2 * g.dilation;
  if (!g.circular) return at::constant_pad_nd(x, {columns, columns, rows, rows});
  const auto wrapped = [&](int64_t margin, int64_t extent) {
    return at::arange(-margin, extent + margin, at::kLong).remainder(extent);
  };
  return x.index_select(2, wrapped(rows, x.size(2))).index_select(3, wrapped(columns, x.size(3)));
}

Tensor convolve(const Tensor& x, const Tensor& kernel, const Geometry& g) {
  return at::conv2d(padded(x, kernel, g), kernel, {}, 1, at::IntArrayRef{0}, g.dilation, g.groups);
}

// The kernel of the transposed convolution: channels swap within their group (SNF 26).
Tensor flip(const Tensor& kernel, const Geometry& g) {
  const Tensor grouped = kernel.unflatten(0, {g.groups, kernel.size(0) / g.groups});
  return grouped.transpose(1, 2).flip({3, 4}).reshape(kernel.sizes());
}

Tensor weight_gradient(
    const Tensor& delta, const Tensor& x, const Tensor& kernel, const Geometry& g) {
  const auto gradients = at::convolution_backward(
      delta, padded(x, kernel, g), kernel, at::OptionalIntArrayRef{}, {1, 1}, {0, 0},
      {g.dilation, g.dilation}, false, {0, 0}, g.groups, {false, true, false});
  return std::get<1>(gradients);
}

Tensor per_image(const Tensor& numbers) { return numbers.view({-1, 1, 1, 1}); }

Tensor per_channel(const Tensor& numbers) { return numbers.view({1, -1, 1, 1}); }

}  // namespace

ForwardStep stock::forward(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    const Geometry& geometry) {
  Tensor z = convolve(x, weight, geometry);
  const Tensor residual = convolve(z, weight_inv, geometry).sub_(x);
  if (bias) z.add_(per_channel(*bias));
  return {z, residual.square().sum({1, 2, 3}), residual};
}

BackwardStep stock::backward(
    const Tensor& grad_z, const OptionalTensor& grad_recon, const Tensor& x, const Tensor& z,
    const Tensor& residual, const Tensor& weight, const Tensor& weight_inv,
    const OptionalTensor& bias, const Geometry& geometry, std::array<bool, 4> mask) {
  Tensor dx, dw, dr, pull;
  if (grad_recon) pull = residual * per_image(grad_recon->mul(2));
  if (mask[0] || mask[2]) dx = convolve(grad_z, flip(weight, geometry), geometry);
  if (mask[1]) {
    Tensor delta = grad_z * 0.5;
    if (grad_recon) delta.add_(convolve(pull, flip(weight_inv, geometry), geometry));
    dw = weight_gradient(delta, x, weight, geometry);
  }
  if (mask[2]) {
    const Tensor delta = grad_recon ? pull.sub_(dx, 0.5) : dx * -0.5;
    dr = weight_gradient(delta, bias ? z - per_channel(*bias) : z, weight_inv, geometry);
  }
  return {dx, dw, dr};
}

}  // namespace snf

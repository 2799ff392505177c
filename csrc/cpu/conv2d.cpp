// snf_conv2d on the CPU: what surrounds the convolutions, and which way of doing them is taken.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../multiplicity.h"
#include "../precision.h"
#include "conv2d_step.h"
#include "total.h"

namespace snf {

using at::Tensor;

// From how many channels a group on torch's own convolutions are taken (measured in float32).
bool prefers_stock(const Tensor& weight, const Tensor& weight_inv) {
  const bool one_tap =
      weight.size(2) * weight.size(3) == 1 && weight_inv.size(2) * weight_inv.size(3) == 1;
  return weight.size(1) > (one_tap ? 128 : 64);
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    int64_t dilation, int64_t groups, bool circular, bool reconstruct) {
  check_conv2d(x, weight, weight_inv, bias, dilation, groups);
  const WithoutAutocast full_precision;
  const Geometry geometry = geometry_of(x, dilation, groups, circular);
  const Tensor w = wide(reaching(weight, x, geometry));
  const Tensor r = reconstruct ? wide(reaching(weight_inv, x, geometry)) : w;  // w stands in
  const auto step = prefers_stock(w, r) ? stock::forward : fused::forward;
  const auto [z, recon, residual] = step(wide(x), w, r, wide(bias), geometry, reconstruct);
  return {z.to(x.scalar_type()), at::zeros_like(recon), recon, residual};
}

// grad += scale * flip(other) * m(own), cropped or padded to the shape of `own` (SNF 21-30).
void add_inverse_term(
    Tensor& grad, const Tensor& other, double scale, const Tensor& x, const Geometry& geometry) {
  struct Match {
    int64_t own, other;
    double multiple;
  };
  const auto matches = [&](int64_t axis) {
    const int64_t own = grad.size(axis), others = other.size(axis);
    std::vector<Match> found;
    for (int64_t a = 0; a < own; ++a)
      for (int64_t b = 0; b < others; ++b) {
        const int64_t m = multiplicity(
            (a - own / 2) * geometry.dilation, (b - others / 2) * geometry.dilation, x.size(axis),
            geometry.circular);
        if (m > 0) found.push_back({a, b, static_cast<double>(m)});
      }
    return found;
  };
  const auto in_rows = matches(2), in_columns = matches(3);
  const int64_t width = grad.size(1), columns = grad.size(3), other_columns = other.size(3);
  const int64_t taps = grad.size(2) * columns, other_taps = other.size(2) * other_columns;
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "snf_conv2d_backward", [&] {
    scalar_t* out = grad.mutable_data_ptr<scalar_t>();
    const scalar_t* from = other.const_data_ptr<scalar_t>();
    for (int64_t channel = 0; channel < grad.size(0); ++channel)
      for (int64_t i = 0; i < width; ++i, out += taps) {
        // Channels swap within their group.
        const int64_t start = channel / width * width, o = channel - start;
        const scalar_t* source = from + ((start + i) * width + o) * other_taps;
        for (const Match& row : in_rows)
          for (const Match& column : in_columns)
            out[row.own * columns + column.own] += static_cast<scalar_t>(
                scale * row.multiple * column.multiple *
                source[row.other * other_columns + column.other]);
      }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_z, const OptionalTensor& grad_log_det, const OptionalTensor& grad_recon,
    const Tensor& x, const OptionalTensor& z, const OptionalTensor& residual, const Tensor& weight,
    const Tensor& weight_inv, const OptionalTensor& bias, int64_t dilation, int64_t groups,
    bool circular, double penalty_share, std::array<bool, 4> mask) {
  const WithoutAutocast full_precision;
  const bool reconstructs = z && residual;
  mask[2] = mask[2] && reconstructs;
  const Geometry geometry = geometry_of(x, dilation, groups, circular);
  const Tensor dz = wide(grad_z);
  const Tensor w = wide(reaching(weight, x, geometry)), r = wide(reaching(weight_inv, x, geometry));
  Tensor dx, dw, dr, dc;
  // Two weights share the gradient through z and log_det, or the forward one has all of it.
  const Shares shares = {reconstructs ? 0.5 : 1.0, penalty_share};
  // Unless nobody asks for the penalty's gradient, or nobody takes it.
  const bool penalty = grad_recon && reconstructs && (mask[2] || penalty_share != 0);
  if (mask[0] || mask[1] || mask[2]) {
    const Tensor& inverse = reconstructs ? r : w;  // w stands in
    const auto step = prefers_stock(w, inverse) ? stock::backward : fused::backward;
    std::tie(dx, dw, dr) = step(
        dz, penalty ? per_sample(grad_recon, dz.scalar_type()) : std::nullopt, wide(x), wide(z),
        residual, w, inverse, wide(bias), geometry, shares, mask);
  }
  const double term = shares.data * total(grad_log_det);
  if (mask[1]) add_inverse_term(dw, r, term, x, geometry);
  if (mask[2]) add_inverse_term(dr, w, -term, x, geometry);
  if (mask[3]) dc = dz.sum({0, 2, 3});

  // What was not asked for has no elements.
  const auto output = [&](bool wanted, const Tensor& grad) {
    return wanted ? grad.to(x.scalar_type()) : at::empty({0}, x.options());
  };
  const auto kernel = [&](bool wanted, const Tensor& grad, const Tensor& like) {
    return output(wanted, wanted ? filled_up(grad, like, x, geometry) : grad);
  };
  return {
      output(mask[0], dx), kernel(mask[1], dw, weight), kernel(mask[2], dr, weight_inv),
      output(mask[3], dc)};
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, CPU, m) {
  m.impl("snf_conv2d_forward", forward);
  m.impl("snf_conv2d_backward", backward);
}

}  // namespace snf

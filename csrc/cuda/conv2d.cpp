// snf_conv2d on CUDA: the fused kernels, or, with many weights and in float64, torch's own
// convolutions on merged deltas with one element-wise kernel between them.
#include "conv2d.h"

#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "../check.h"
#include "../convolution.h"
#include "pointwise.h"
#include "tensors.h"

namespace snf {
namespace {

using at::Tensor;
using ForwardStep = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // z, log_det, recon, residual
using BackwardStep = std::tuple<Tensor, Tensor, Tensor>;         // dx, dW, dR

ConvShape shape_of(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const Geometry& g) {
  // What is too large for a number here is too large for the fused kernels anyway.
  const auto number = [](int64_t n) { return static_cast<int>(std::min<int64_t>(n, INT32_MAX)); };
  const auto size = [&](const Tensor& t) { return Size{number(t.size(2)), number(t.size(3))}; };
  return {x.size(0),    number(x.size(1)), number(weight.size(1)), size(x),
          size(weight), size(weight_inv),  number(g.dilation),     g.circular};
}

DeviceLimits limits() {
  const cudaDeviceProp& device = *at::cuda::getCurrentDeviceProperties();
  return {static_cast<int>(device.sharedMemPerBlockOptin), device.multiProcessorCount};
}

int row_size(const Tensor& x) {
  const int64_t columns = x.size(1) * x.size(2) * x.size(3);
  TORCH_CHECK_VALUE(
      columns <= INT32_MAX, "x must have less than 2^31 elements a sample; got ", columns);
  return static_cast<int>(columns);
}

ForwardStep vendor_forward(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    const Geometry& g, bool reconstruct) {
  const int columns = row_size(x);
  const Tensor y = convolve(wide(x), wide(weight), g, /*exact=*/true);
  const Tensor residual =
      reconstruct ? convolve(y, wide(weight_inv), g, /*exact=*/true).contiguous() : Tensor();
  const Tensor z = at::empty(x.sizes(), x.options(), at::MemoryFormat::Contiguous);
  const Tensor log_det = per_row(x, x.size(0)), recon = per_row(x, x.size(0));
  const Tensor work = at::empty({residual_workspace(x.size(0), columns)}, y.options());
  const Tensor own_y = y.contiguous();
  SNF_DISPATCH_KERNEL_TYPES(x.scalar_type(), "snf_conv2d_forward", [&] {
    using W = Wide<T>;
    snf::residual<T>(
        {in<W>(residual), in<W>(own_y), in<T>(x), in<T>(bias), out<T>(z), out<W>(residual),
         out<W>(log_det), out<W>(recon), out<W>(work), x.size(0), columns,
         columns / static_cast<int>(x.size(1))},
        at::cuda::getCurrentCUDAStream());
  });
  return {z, log_det, recon, reconstruct ? residual : at::empty({0}, y.options())};
}

BackwardStep vendor_backward(
    const Tensor& grad_z, const OptionalTensor& grad_log_det, const OptionalTensor& grad_recon,
    const Tensor& x, const OptionalTensor& z, const OptionalTensor& residual, const Tensor& weight,
    const Tensor& weight_inv, const OptionalTensor& bias, const Geometry& g, const ConvShape& shape,
    float data_share, double penalty_share, std::array<bool, 4> mask) {
  const int columns = row_size(x);
  const Tensor w = wide(weight), r = wide(weight_inv);
  const auto options = w.options();
  const Tensor dx =
      mask[0] || mask[2] ? convolve(wide(grad_z), flipped(w, g), g).contiguous() : Tensor();
  const bool halves = mask[1] && residual,
             pulls_weight = mask[1] && grad_recon && penalty_share != 0;
  Tensor delta_w = halves ? at::empty(x.sizes(), options) : wide(grad_z);
  const Tensor pull = empty_if(pulls_weight, x.sizes(), options);
  const Tensor delta = empty_if(mask[2], x.sizes(), options);
  const Tensor y = empty_if(mask[2], x.sizes(), options);
  SNF_DISPATCH_KERNEL_TYPES(x.scalar_type(), "snf_conv2d_backward", [&] {
    using W = Wide<T>;
    deltas<T>(
        {in<T>(grad_z),
         in<T>(z),
         in<T>(bias),
         in<W>(residual),
         in<W>(grad_recon),
         nullptr,
         in<W>(dx),
         halves ? out<W>(delta_w) : nullptr,
         out<W>(pull),
         out<W>(delta),
         out<W>(y),
         {},
         nullptr,
         x.size(0),
         columns,
         columns / static_cast<int>(x.size(1))},
        at::cuda::getCurrentCUDAStream());
  });
  // One row of partial gradients: both kernels', and room for the bias's.
  const Tensor sums = at::empty({w.numel() + r.numel() + w.size(0)}, options);
  if (mask[1]) {
    if (pulls_weight) delta_w.add_(convolve(pull, flipped(r, g), g), penalty_share);
    sums.narrow(0, 0, w.numel()).copy_(weight_gradient(delta_w, wide(x), w, g).flatten());
  }
  if (mask[2])
    sums.narrow(0, w.numel(), r.numel()).copy_(weight_gradient(delta, y, r, g).flatten());
  const Tensor dw = empty_if(mask[1], w.sizes(), x.options());
  const Tensor dr = empty_if(mask[2], r.sizes(), x.options());
  SNF_DISPATCH_KERNEL_TYPES(x.scalar_type(), "snf_conv2d_backward", [&] {
    using W = Wide<T>;
    conv2d_inverse_term<T>(
        shape,
        {in<T>(weight), in<T>(weight_inv), in<W>(grad_log_det), in<W>(sums), out<T>(dw), out<T>(dr),
         data_share},
        at::cuda::getCurrentCUDAStream());
  });
  return {dx, dw, dr};
}

ForwardStep forward(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    int64_t dilation, int64_t groups, bool circular, bool reconstruct) {
  check_conv2d(x, weight, weight_inv, bias, dilation, groups);
  const OnDeviceOf device(x);
  const WithoutAutocast full_precision;
  const Geometry g = geometry_of(x, dilation, groups, circular);
  const auto wide_options = x.options().dtype(wide_type(x.scalar_type()));
  const auto empty_residual = [&] {
    return reconstruct ? at::empty(x.sizes(), wide_options, at::MemoryFormat::Contiguous)
                       : at::empty({0}, wide_options);
  };
  if (x.numel() == 0)
    return {
        at::empty(x.sizes(), x.options()), per_row(x, x.size(0)), per_row(x, x.size(0)),
        empty_residual()};
  const Tensor own = x.contiguous();
  const Tensor w = reaching(weight, x, g).contiguous(), r = reaching(weight_inv, x, g).contiguous();
  const OptionalTensor c = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
  const ConvShape shape = shape_of(x, w, r, g);
  const ConvForwardPlan plan = plan_forward(reconstruct ? shape : without_inverse(shape), limits());
  if (!plan.fits || x.scalar_type() == at::kDouble)
    return vendor_forward(own, w, r, c, g, reconstruct);
  const Tensor z = at::empty(x.sizes(), x.options(), at::MemoryFormat::Contiguous);
  const Tensor residual = empty_residual();
  const Tensor log_det = per_row(x, x.size(0)), recon = per_row(x, x.size(0));
  const Tensor work = at::empty({forward_workspace(plan, shape)}, wide_options);
  AT_DISPATCH_SWITCH(
      x.scalar_type(), "snf_conv2d_forward", SNF_DISPATCH_FUSED_TYPES([&] {
        using T = typename KernelType<scalar_t>::type;
        conv2d_forward<T>(
            shape, plan,
            {in<T>(own), in<T>(w), in<T>(r), in<T>(c), out<T>(z), out<float>(residual),
             out<float>(log_det), out<float>(recon), out<float>(work)},
            at::cuda::getCurrentCUDAStream());
      }));
  return {z, log_det, recon, residual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_z, const OptionalTensor& grad_log_det, const OptionalTensor& grad_recon,
    const Tensor& x, const OptionalTensor& z, const OptionalTensor& residual, const Tensor& weight,
    const Tensor& weight_inv, const OptionalTensor& bias, int64_t dilation, int64_t groups,
    bool circular, double penalty_share, std::array<bool, 4> mask) {
  const OnDeviceOf device(x);
  const WithoutAutocast full_precision;
  const Geometry geometry = geometry_of(x, dilation, groups, circular);
  const bool reconstructs = z && residual;
  mask[2] = mask[2] && reconstructs;
  // Two weights share the gradient through z and log_det, or the forward one has all of it.
  const float data_share = reconstructs ? 0.5f : 1.0f;
  // Unless nobody asks for the penalty's gradient, or nobody takes it.
  const bool penalty = grad_recon && reconstructs && (mask[2] || penalty_share != 0);
  const auto type = wide_type(x.scalar_type());
  const Tensor w = reaching(weight, x, geometry).contiguous();
  const Tensor r = reaching(weight_inv, x, geometry).contiguous();
  const OptionalTensor c = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
  const Tensor dz = grad_z.contiguous(), own_x = x.contiguous();
  const auto contiguous = [&](const OptionalTensor& t) {
    return reconstructs ? OptionalTensor(t->contiguous()) : std::nullopt;
  };
  const OptionalTensor own_z = contiguous(z), e = contiguous(residual);
  const OptionalTensor g = per_sample(grad_log_det, type);
  const OptionalTensor q = per_sample(penalty ? grad_recon : std::nullopt, type);
  const ConvShape shape = shape_of(x, w, r, geometry);
  const ConvBackwardPlan plan =
      plan_backward(reconstructs ? shape : without_inverse(shape), limits());
  Tensor dx, dw, dr, dc;
  if (x.numel() == 0) {
    dx = at::empty(x.sizes(), x.options());
    dw = at::zeros(w.sizes(), x.options());
    dr = at::zeros(r.sizes(), x.options());
    dc = at::zeros({x.size(1)}, x.options());
  } else if (!plan.fits || x.scalar_type() == at::kDouble) {
    std::tie(dx, dw, dr) = vendor_backward(
        dz, g, q, own_x, own_z, e, w, r, c, geometry, shape, data_share, penalty_share, mask);
    if (mask[3]) dc = wide(dz).sum({0, 2, 3});
  } else {
    dx = empty_if(mask[0], x.sizes(), own_x.options());
    dw = empty_if(mask[1], w.sizes(), x.options());
    dr = empty_if(mask[2], r.sizes(), x.options());
    dc = empty_if(mask[3], {x.size(1)}, x.options());
    const Tensor work = at::empty({backward_workspace(plan, shape)}, x.options().dtype(type));
    AT_DISPATCH_SWITCH(
        x.scalar_type(), "snf_conv2d_backward", SNF_DISPATCH_FUSED_TYPES([&] {
          using T = typename KernelType<scalar_t>::type;
          conv2d_backward<T>(
              shape, plan,
              {in<T>(dz), in<T>(own_x), in<T>(own_z), in<T>(w), in<T>(r), in<T>(c), in<float>(g),
               in<float>(q), in<float>(e), out<T>(dx), out<T>(dw), out<T>(dr), out<T>(dc),
               out<float>(work), data_share, static_cast<float>(penalty_share)},
              at::cuda::getCurrentCUDAStream());
        }));
  }
  const auto kernel = [&](bool wanted, const Tensor& gradient, const Tensor& like) {
    return output(wanted, wanted ? filled_up(gradient, like, x, geometry) : gradient, x);
  };
  return {
      output(mask[0], dx, x), kernel(mask[1], dw, weight), kernel(mask[2], dr, weight_inv),
      output(mask[3], dc, x)};
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, SNF_CUDA_KEY, m) {
  m.impl("snf_conv2d_forward", forward);
  m.impl("snf_conv2d_backward", backward);
}

}  // namespace snf

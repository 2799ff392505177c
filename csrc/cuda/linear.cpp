// snf_linear on CUDA: six products by the vendor's library (three without a reconstruction), and
// one element-wise kernel in forward and one in backward.
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "../check.h"
#include "pointwise.h"
#include "tensors.h"

namespace snf {
namespace {

using at::Tensor;

Tensor rows(const Tensor& t, int64_t features) { return wide(t).view({-1, features}); }

int as_int(int64_t features) {
  TORCH_CHECK_VALUE(features <= INT32_MAX, "D must be less than 2^31; got ", features);
  return static_cast<int>(features);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    bool reconstruct) {
  check_linear(x, weight, weight_inv, bias);
  const OnDeviceOf device(x);
  const WithoutAutocast full_precision;
  const at::NoTF32Guard exact;  // z and the residual are never rounded to TF32
  const int features = as_int(weight.size(0));
  const Tensor own = x.contiguous(), flat = rows(own, features);
  const Tensor y = at::mm(flat, wide(weight).t());
  const Tensor residual = reconstruct ? at::mm(y, wide(weight_inv).t()) : Tensor();
  const Tensor z = y.scalar_type() == x.scalar_type() ? y : at::empty(flat.sizes(), x.options());
  const Tensor log_det = per_row(x, flat.size(0)), recon = per_row(x, flat.size(0));
  const OptionalTensor c = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
  const Tensor work = at::empty({residual_workspace(flat.size(0), features)}, y.options());
  SNF_DISPATCH_KERNEL_TYPES(x.scalar_type(), "snf_linear_forward", [&] {
    using W = Wide<T>;
    snf::residual<T>(
        {in<W>(residual), in<W>(y), in<T>(own), in<T>(c), out<T>(z), out<W>(residual),
         out<W>(log_det), out<W>(recon), out<W>(work), flat.size(0), features, 1},
        at::cuda::getCurrentCUDAStream());
  });
  const auto batch = x.sizes().slice(0, x.dim() - 1);
  return {
      z.view(x.sizes()), log_det.view(batch), recon.view(batch),
      reconstruct ? residual.view(x.sizes()) : at::empty({0}, y.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_z, const OptionalTensor& grad_log_det, const OptionalTensor& grad_recon,
    const Tensor& x, const OptionalTensor& z, const OptionalTensor& residual, const Tensor& weight,
    const Tensor& weight_inv, const OptionalTensor& bias, double penalty_share,
    std::array<bool, 4> mask) {
  const OnDeviceOf device(x);
  const WithoutAutocast full_precision;
  const int features = as_int(weight.size(0));
  const Tensor own_grad = grad_z.contiguous(), dz = rows(own_grad, features);
  const Tensor w = wide(weight), r = wide(weight_inv);
  const auto options = dz.options();
  const bool reconstructs = z && residual, term = grad_log_det.has_value();
  mask[2] = mask[2] && reconstructs;
  // Unless nobody asks for the penalty's gradient, or nobody takes it.
  const bool penalty = grad_recon && reconstructs && (mask[2] || penalty_share != 0);
  const bool pulls_weight = mask[1] && penalty && penalty_share != 0;
  // Two weights share the gradient through z and log_det, or the forward one has all of it.
  const float share = reconstructs ? 0.5f : 1.0f;
  const OptionalTensor g = per_sample(grad_log_det, dz.scalar_type());
  const OptionalTensor q = per_sample(penalty ? grad_recon : std::nullopt, dz.scalar_type());

  const Tensor dx = mask[0] || mask[2] ? at::mm(dz, w) : Tensor();
  // With neither bias nor half precision, z is y.
  const Tensor own_z = mask[2] ? z->contiguous() : Tensor();
  const bool z_is_y = mask[2] && !bias && own_z.scalar_type() == dz.scalar_type();
  const bool halves = mask[1] && reconstructs;
  Tensor delta_w = halves ? at::empty(dz.sizes(), options) : dz;
  const Tensor pull = empty_if(pulls_weight, dz.sizes(), options);
  const Tensor delta = empty_if(mask[2], dz.sizes(), options);
  const Tensor y = z_is_y ? own_z.view(dz.sizes()) : empty_if(mask[2], dz.sizes(), options);
  Tensor dw = empty_if(mask[1], w.sizes(), options), dr = empty_if(mask[2], r.sizes(), options);
  const Tensor dc = empty_if(mask[3], {features}, x.options());
  const Tensor own_w = weight.contiguous(), own_r = weight_inv.contiguous();
  const OptionalTensor e = penalty ? OptionalTensor(residual->contiguous()) : std::nullopt;
  const OptionalTensor c = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
  SNF_DISPATCH_KERNEL_TYPES(x.scalar_type(), "snf_linear_backward", [&] {
    using W = Wide<T>;
    deltas<T>(
        {in<T>(own_grad),
         in<T>(own_z),
         in<T>(c),
         in<W>(e),
         in<W>(q),
         in<W>(g),
         in<W>(dx),
         halves ? out<W>(delta_w) : nullptr,
         out<W>(pull),
         out<W>(delta),
         z_is_y ? nullptr : out<W>(y),
         {{in<T>(own_r), term ? out<W>(dw) : nullptr, share},
          {in<T>(own_w), term ? out<W>(dr) : nullptr, -share}},
         out<T>(dc),
         dz.size(0),
         features,
         1},
        at::cuda::getCurrentCUDAStream());
  });
  // The transposed weights lie where the products accumulate.
  const auto add_product = [&](Tensor& sum, const Tensor& left, const Tensor& right) {
    if (term)
      sum.addmm_(left.t(), right);
    else
      at::mm_out(sum, left.t(), right);
  };
  if (mask[1]) {
    if (pulls_weight) delta_w.addmm_(pull, r, /*beta=*/1, penalty_share);
    add_product(dw, delta_w, rows(x, features));
  }
  if (mask[2]) add_product(dr, delta, y);
  return {
      output(mask[0], mask[0] ? dx.view(x.sizes()) : dx, x), output(mask[1], dw, x),
      output(mask[2], dr, x), output(mask[3], dc, x)};
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, SNF_CUDA_KEY, m) {
  m.impl("snf_linear_forward", forward);
  m.impl("snf_linear_backward", backward);
}

}  // namespace snf

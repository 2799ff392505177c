// rq_spline on CUDA: device, stream and output memory.
#include "rq_spline.h"

#include <torch/library.h>

#include <array>
#include <tuple>

#include "../check.h"
#include "../spline_binding.h"
#include "tensors.h"

namespace snf {
namespace {

using at::Tensor;

SplineShape shape_of(const Tensor& x, const Tensor& widths, double tail_bound, bool inverse) {
  const int64_t event = x.numel() / x.size(0);
  TORCH_CHECK_VALUE(event <= INT32_MAX, "a sample must have less than 2^31 elements; got ", event);
  return {x.size(0), static_cast<int>(event), static_cast<int>(widths.size(-1)), tail_bound,
          inverse,   is_shared(x, widths)};
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& widths, const Tensor& heights, const Tensor& derivatives,
    double tail_bound, bool inverse) {
  check_rq_spline(x, widths, heights, derivatives, tail_bound);
  const OnDeviceOf device(x);
  const auto type = x.scalar_type();
  const Tensor v = dense_as(x, type), w = dense_as(widths, type), h = dense_as(heights, type),
               d = dense_as(derivatives, type);
  const Tensor y = at::empty(x.sizes(), x.options()), log_abs_det = per_row(x, x.size(0));
  if (x.numel() == 0) return {y, log_abs_det};
  const SplineShape shape = shape_of(x, widths, tail_bound, inverse);
  const Tensor work = at::empty({spline_forward_workspace(shape)}, log_abs_det.options());
  SNF_DISPATCH_KERNEL_TYPES(type, "rq_spline", [&] {
    using W = Wide<T>;
    spline_forward<T>(
        shape, {in<T>(v), in<T>(w), in<T>(h), in<T>(d)}, out<T>(y), out<W>(log_abs_det),
        out<W>(work), at::cuda::getCurrentCUDAStream());
  });
  return {y, log_abs_det};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_log_abs_det, const Tensor& x,
    const Tensor& widths, const Tensor& heights, const Tensor& derivatives, double tail_bound,
    bool inverse, std::array<bool, 4> mask) {
  check_rq_spline(x, widths, heights, derivatives, tail_bound);
  const OnDeviceOf device(x);
  const auto type = x.scalar_type(), wide = wide_type(type);
  const std::array<Tensor, 4> inputs = {
      dense_as(x, type), dense_as(widths, type), dense_as(heights, type),
      dense_as(derivatives, type)};
  std::array<Tensor, 4> grads;
  // What was not asked for has no elements.
  for (int i = 0; i < 4; ++i)
    grads[i] = !mask[i]         ? at::empty({0}, x.options())
               : x.numel() == 0 ? at::zeros(inputs[i].sizes(), x.options())
                                : at::empty(inputs[i].sizes(), x.options());
  if (x.numel() > 0) {
    const OptionalTensor gy = grad_y ? OptionalTensor(dense_as(*grad_y, type)) : std::nullopt;
    const OptionalTensor gl =
        grad_log_abs_det ? OptionalTensor(dense_as(*grad_log_abs_det, wide)) : std::nullopt;
    const SplineShape shape = shape_of(x, widths, tail_bound, inverse);
    const int64_t count = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
    const Tensor work =
        at::empty({spline_backward_workspace(shape, count)}, x.options().dtype(wide));
    SNF_DISPATCH_KERNEL_TYPES(type, "rq_spline_backward", [&] {
      using W = Wide<T>;
      spline_backward<T>(
          shape, {in<T>(inputs[0]), in<T>(inputs[1]), in<T>(inputs[2]), in<T>(inputs[3])},
          {in<T>(gy), in<W>(gl), out<T>(grads[0]), out<T>(grads[1]), out<T>(grads[2]),
           out<T>(grads[3])},
          out<W>(work), count, at::cuda::getCurrentCUDAStream());
    });
  }
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, SNF_CUDA_KEY, m) {
  m.impl("rq_spline", forward);
  m.impl("rq_spline_backward", backward);
}

}  // namespace snf

// The element-wise operators on CUDA: device, stream and output memory. One file for all, as they
// differ in csrc/elementwise_math.h only.
#include "elementwise.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/sum.h>

#include "../elementwise_binding.h"
#include "tensors.h"

namespace snf {
namespace {

using at::Tensor;

struct Cuda {
  using Guard = OnDeviceOf;
  static Tensor read(const Tensor& t) { return t.contiguous(); }
  static Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    return at::empty(sizes, options);
  }
  static void check_event(const ElementwiseShape& shape) {
    TORCH_CHECK_VALUE(
        shape.event() <= INT32_MAX, "a sample must have less than 2^31 elements; got ",
        shape.event());
  }

  template <typename Op>
  static void forward(
      const Op& op, const ElementwiseShape& shape, const ElementwiseInputs& from,
      const ElementwiseOutputs& to) {
    check_event(shape);
    const int64_t parts = elementwise_parts(shape);
    const auto of_parts = [&](const Tensor& t) {
      return parts == 1 || !t.defined() ? t : at::empty({shape.samples, parts}, t.options());
    };
    const Tensor sums = of_parts(to.log_abs_det), counts = of_parts(to.iterations);
    SNF_DISPATCH_KERNEL_TYPES(from.x.scalar_type(), "elementwise", [&] {
      elementwise_forward<Op, T>(
          op,
          {shape, in<T>(from.x), in<T>(from.first), in<T>(from.second), out<T>(to.y),
           out<Wide<T>>(sums), out<int64_t>(counts)},
          at::cuda::getCurrentCUDAStream());
    });
    if (parts == 1) return;
    Tensor log_abs_det = to.log_abs_det, iterations = to.iterations;
    at::sum_out(log_abs_det, sums, 1);
    if (iterations.defined()) at::amax_out(iterations, counts, 1);
  }

  template <typename Op>
  static void backward(
      const Op& op, const ElementwiseShape& shape, const ElementwiseInputs& from,
      const Tensor& grad_y, const OptionalTensor& grad_log_abs_det,
      const ElementwiseGradients& to) {
    check_event(shape);
    SNF_DISPATCH_KERNEL_TYPES(from.x.scalar_type(), "elementwise_backward", [&] {
      using W = Wide<T>;
      const ElementwiseBackward<T, W> a = {
          shape,
          in<T>(from.x),
          in<T>(from.first),
          in<T>(from.second),
          in<T>(grad_y),
          in<W>(grad_log_abs_det),
          out<T>(to.x),
          out<T>(to.first),
          out<T>(to.second)};
      const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
      if constexpr (std::is_same_v<Op, Actnorm> || std::is_same_v<Op, ActnormInverse>)
        if (to.first.defined()) {
          const int64_t count = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
          const Tensor work = at::empty(
              {channel_workspace(shape, count)},
              from.x.options().dtype(wide_type(from.x.scalar_type())));
          return channel_backward<Op, T>(op, a, out<W>(work), count, stream);
        }
      elementwise_backward<Op, T>(op, a, stream);
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, SNF_CUDA_KEY, m) { ElementwiseBinding<Cuda>::implement(m); }

}  // namespace snf

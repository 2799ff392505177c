// triangular_conv2d_solve on CUDA.
#include "triangular_conv2d.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../check.h"
#include "../triangular.h"
#include "tensors.h"

namespace snf {
namespace {

using at::Tensor;

Tensor solve(const Tensor& z, const Tensor& weight, bool upper) {
  check_triangular(z, weight);
  const OnDeviceOf device(z);
  const int64_t size = z.size(1) * z.size(2) * z.size(3);
  TORCH_CHECK_VALUE(size <= INT32_MAX, "a sample must have less than 2^31 elements; got ", size);
  TORCH_CHECK_VALUE(
      weight.size(2) * weight.size(3) <= INT32_MAX, "weight must have less than 2^31 taps; got ",
      weight.sizes());
  const Tensor own = z.contiguous(), w = packed_lower(weight, upper);
  const Tensor x = at::empty_like(own);
  const auto number = [](int64_t n) { return static_cast<int>(n); };
  const int channels = number(z.size(1)), height = number(z.size(2)), width = number(z.size(3));
  SNF_DISPATCH_KERNEL_TYPES(z.scalar_type(), "triangular_conv2d_solve", [&] {
    using W = Wide<T>;
    const int64_t needed = triangular_workspace<T>(z.size(0), channels, height, width);
    const Tensor workspace = at::empty({needed}, w.options());
    triangular_solve<T>(
        {in<T>(own), in<W>(w), out<T>(x), out<W>(workspace), z.size(0), channels, height, width,
         number(weight.size(2)), number(weight.size(3)), upper},
        at::cuda::getCurrentCUDAStream());
  });
  return x;
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, SNF_CUDA_KEY, m) { m.impl("triangular_conv2d_solve", solve); }

}  // namespace snf

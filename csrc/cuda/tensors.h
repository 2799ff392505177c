// How the bindings hand tensors to the kernels.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../precision.h"

namespace snf {

// The kernels' name of a tensor's type.
template <typename T>
struct KernelType {
  using type = T;
};
template <>
struct KernelType<at::Half> {
  using type = __half;
};
template <>
struct KernelType<at::BFloat16> {
  using type = __nv_bfloat16;
};

// Makes the device of x the current one, if there is any.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const at::Tensor& x) : guard_(checked(x)) {}

 private:
  static at::Device checked(const at::Tensor& x) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        c10::cuda::device_count() > 0,
        "a CUDA operator of snf_ext was called, but no CUDA device can be used here (no GPU, no "
        "driver, or CUDA_VISIBLE_DEVICES hides it); x is on ",
        x.device());
    return x.device();
  }
  c10::cuda::CUDAGuard guard_;
};

// Null where there is no tensor, or one without elements that stands for one not wanted.
template <typename T>
const T* in(const at::Tensor& t) {
  return t.defined() && t.numel() > 0 ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}
template <typename T>
const T* in(const OptionalTensor& t) {
  return t ? in<T>(*t) : nullptr;
}
template <typename T>
T* out(const at::Tensor& t) {
  return t.defined() && t.numel() > 0 ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// One number a sample: written by a kernel, unless the samples have no elements.
inline at::Tensor per_row(const at::Tensor& x, int64_t rows) {
  const auto options = x.options().dtype(wide_type(x.scalar_type()));
  return x.numel() == 0 ? at::zeros({rows}, options) : at::empty({rows}, options);
}

inline at::Tensor empty_if(bool wanted, at::IntArrayRef sizes, const at::TensorOptions& options) {
  return wanted ? at::empty(sizes, options) : at::Tensor();
}

// An operator's output: no elements where it was not asked for, as outputs may share no memory.
inline at::Tensor output(bool wanted, const at::Tensor& t, const at::Tensor& x) {
  return wanted ? t.to(x.scalar_type()) : at::empty({0}, x.options());
}

#define SNF_DISPATCH_KERNEL_TYPES(TYPE, NAME, ...)                            \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, TYPE, NAME, [&] { \
    using T = typename KernelType<scalar_t>::type;                            \
    __VA_ARGS__();                                                            \
  })

// The types that the fused kernels take, for AT_DISPATCH_SWITCH.
#define SNF_DISPATCH_FUSED_TYPES(...)       \
  AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) \
  AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__)  \
  AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__)

// Where the bindings register; the tests run them on the host.
#ifndef SNF_CUDA_KEY
#define SNF_CUDA_KEY CUDA
#endif

}  // namespace snf

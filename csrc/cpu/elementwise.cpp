// The element-wise operators on the CPU: which instruction set, and which thread takes what. One
// file for all, as they differ in csrc/elementwise_math.h only.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "../elementwise_binding.h"
#include "cpu_capability.h"
#include "pooled_memory.h"

namespace snf {

#define SNF_DECLARE(isa)                                                                  \
  namespace isa {                                                                         \
  template <typename Op, typename T>                                                      \
  void forward(const Op&, const ElementwiseForward<T, T>&, int64_t begin, int64_t end);   \
  template <typename Op, typename T>                                                      \
  void backward(const Op&, const ElementwiseBackward<T, T>&, int64_t begin, int64_t end); \
  }
SNF_EACH_ISA(SNF_DECLARE)

namespace {

using at::Tensor;

template <typename T>
const T* in(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}
template <typename T>
T* out(const Tensor& t) {
  return t.defined() ? t.mutable_data_ptr<T>() : nullptr;
}

// The samples in parallel; each is computed by one thread, whatever their number.
template <typename Run>
void over_samples(const ElementwiseShape& shape, const Run& run) {
  at::parallel_for(0, shape.samples, 1 + (1 << 14) / shape.event(), run);
}

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static Tensor read(const Tensor& t) { return wide(t); }
  static Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    return pooled_empty(sizes, options);
  }

  template <typename Op>
  static void forward(
      const Op& op, const ElementwiseShape& shape, const ElementwiseInputs& from,
      const ElementwiseOutputs& to) {
    AT_DISPATCH_FLOATING_TYPES(from.x.scalar_type(), "elementwise", [&] {
      using T = scalar_t;
      const ElementwiseForward<T, T> a = {
          shape,        in<T>(from.x),          in<T>(from.first),          in<T>(from.second),
          out<T>(to.y), out<T>(to.log_abs_det), out<int64_t>(to.iterations)};
      over_samples(
          shape, [&](int64_t begin, int64_t end) { SNF_ON_THIS_CPU(forward(op, a, begin, end)); });
    });
  }

  template <typename Op>
  static void backward(
      const Op& op, const ElementwiseShape& shape, const ElementwiseInputs& from,
      const Tensor& grad_y, const OptionalTensor& grad_log_abs_det,
      const ElementwiseGradients& to) {
    // Parameters that all samples share: their gradients sample by sample, added up below.
    const bool shared = to.first.defined() && shape.parameters.sample == 0;
    ElementwiseGradients each = to;
    if (shared)
      for (Tensor* t : {&each.first, &each.second})
        *t = pooled_empty({shape.samples, to.first.numel()}, to.first.options());
    AT_DISPATCH_FLOATING_TYPES(from.x.scalar_type(), "elementwise_backward", [&] {
      using T = scalar_t;
      const ElementwiseBackward<T, T> a = {
          shape,
          in<T>(from.x),
          in<T>(from.first),
          in<T>(from.second),
          in<T>(grad_y),
          grad_log_abs_det ? in<T>(*grad_log_abs_det) : nullptr,
          out<T>(each.x),
          out<T>(each.first),
          out<T>(each.second)};
      over_samples(
          shape, [&](int64_t begin, int64_t end) { SNF_ON_THIS_CPU(backward(op, a, begin, end)); });
      if (!shared) return;
      add_samples<T>(each.first, to.first);
      add_samples<T>(each.second, to.second);
    });
  }

  template <typename T>
  static void add_samples(const Tensor& each, const Tensor& to) {
    const int64_t samples = each.size(0), channels = each.size(1);
    const T* from = each.const_data_ptr<T>();
    T* sums = to.mutable_data_ptr<T>();
    std::vector<double> totals(channels);
    for (int64_t b = 0; b < samples; ++b)
      for (int64_t c = 0; c < channels; ++c) totals[c] += from[b * channels + c];
    for (int64_t c = 0; c < channels; ++c) sums[c] = static_cast<T>(totals[c]);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, CPU, m) { ElementwiseBinding<Cpu>::implement(m); }

}  // namespace snf

#include "convolution.h"

#include <ATen/ops/_convolution.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/pad.h>
#include <ATen/ops/zeros.h>
#include <ATen/Context.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <numeric>
#include <tuple>

namespace snf {
namespace {

using at::Tensor;

// An image with its margins: zeros are left to the convolution, wrapped ones are copied. By index
// rather than at::pad, which refuses a circular margin wider than the image.
struct Padded {
  Tensor x;
  std::array<int64_t, 2> zeros;
};

Padded padded(const Tensor& x, const Tensor& kernel, const Geometry& g) {
  const int64_t rows = kernel.size(2) / 2 * g.dilation, columns = kernel.size(3) / 2 * g.dilation;
  if (!g.circular) return {x, {rows, columns}};
  const auto wrapped = [&](int64_t margin, int64_t extent) {
    const auto options = x.options().dtype(at::kLong);
    return at::arange(-margin, extent + margin, options).remainder(extent);
  };
  return {
      x.index_select(2, wrapped(rows, x.size(2))).index_select(3, wrapped(columns, x.size(3))),
      {0, 0}};
}

// cuDNN may choose sums in random order unless this setting, global in torch, says otherwise.
class Deterministic {
 public:
  Deterministic() {
    const std::lock_guard lock(mutex);
    if (users++ == 0) before = at::globalContext().deterministicCuDNN();
    at::globalContext().setDeterministicCuDNN(true);
  }
  ~Deterministic() {
    const std::lock_guard lock(mutex);
    if (--users == 0) at::globalContext().setDeterministicCuDNN(before);
  }

 private:
  static inline std::mutex mutex;
  static inline int users = 0;
  static inline bool before = false;
};

}  // namespace

Geometry geometry_of(const Tensor& x, int64_t dilation, int64_t groups, bool circular) {
  const int64_t rows = x.size(2), columns = x.size(3);
  // Zeros: from there on only the middle tap reaches a pixel.
  if (!circular) return {std::min(dilation, std::max(rows, columns)), groups, circular};
  const int64_t period = std::lcm(rows, columns);
  return {(dilation - 1) % period + 1, groups, circular};
}

Tensor reaching(const Tensor& kernel, const Tensor& x, const Geometry& g) {
  if (g.circular) return kernel;
  const auto cut = [&](const Tensor& k, int64_t axis) {
    const int64_t reach = std::min(k.size(axis) / 2, (x.size(axis) - 1) / g.dilation);
    if (2 * reach + 1 >= k.size(axis)) return k;  // a view of all costs microseconds too
    return k.narrow(axis, k.size(axis) / 2 - reach, 2 * reach + 1);
  };
  return cut(cut(kernel, 2), 3);
}

Tensor filled_up(const Tensor& gradient, const Tensor& kernel, const Tensor& x, const Geometry& g) {
  if (gradient.sizes() == kernel.sizes()) return gradient;
  const Tensor full = at::zeros(kernel.sizes(), gradient.options());
  reaching(full, x, g).copy_(gradient);
  return full;
}

Tensor flipped(const Tensor& kernel, const Geometry& g) {
  const Tensor grouped = kernel.unflatten(0, {g.groups, kernel.size(0) / g.groups});
  return grouped.transpose(1, 2).flip({3, 4}).reshape(kernel.sizes());
}

Tensor convolve(const Tensor& x, const Tensor& kernel, const Geometry& g, bool exact) {
  const Padded in = padded(x, kernel, g);
  const std::array<int64_t, 2> stride = {1, 1}, dilation = {g.dilation, g.dilation}, none = {0, 0};
  const Deterministic order;
  if (!exact)
    return at::convolution(in.x, kernel, {}, stride, in.zeros, dilation, false, none, g.groups);
  const at::Context& settings = at::globalContext();
  return at::_convolution(
      in.x, kernel, {}, stride, in.zeros, dilation, false, none, g.groups,
      settings.benchmarkCuDNN(), /*deterministic=*/true, settings.userEnabledCuDNN(),
      /*allow_tf32=*/false);
}

Tensor weight_gradient(
    const Tensor& delta, const Tensor& x, const Tensor& kernel, const Geometry& g) {
  const Padded in = padded(x, kernel, g);
  const Deterministic order;
  return std::get<1>(at::convolution_backward(
      delta, in.x, kernel, at::OptionalIntArrayRef{}, {1, 1}, in.zeros, {g.dilation, g.dilation},
      false, {0, 0}, g.groups, {false, true, false}));
}

}  // namespace snf

// debias_conv2d on the CPU: a probe's whole series, and its share of the gradient, in one operator.
// A few probes are little arithmetic; a dozen operators around it would take longer.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include "../debias.h"
#include "../precision.h"
#include "conv2d_packed.h"
#include "conv2d_step.h"

namespace snf {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> fused(
    const Tensor& v, const Tensor& weight, const Tensor& weight_inv, const Geometry& geometry,
    at::ArrayRef<double> scales, double share) {
  const int64_t probes = v.size(0), size = v.numel() / probes;
  const int64_t terms = static_cast<int64_t>(scales.size());
  Tensor gradient = at::empty(weight.sizes(), v.options());
  double growth = 0;
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "debias_conv2d", [&] {
    // W and R in each other's place: forward gives z = R p and the residual W R p - p = -E p.
    const Conv2dShape swapped = shape_of(v, weight_inv, weight, geometry);
    const Plane plane(swapped);
    const Conv2dPath<scalar_t>& series = conv2d_path<scalar_t>(swapped, plane);
    const Packed<scalar_t> packed_r(series, swapped, plane, weight_inv, swapped.weight, false);
    const Packed<scalar_t> packed_w(series, swapped, plane, weight, swapped.inverse, false);
    // Then a weight gradient alone.
    const Conv2dShape shape = shape_of(v, weight, weight, geometry);
    const Plane own_plane(shape);
    const Conv2dPath<scalar_t>& path = conv2d_path<scalar_t>(shape, own_plane);
    const Packed<scalar_t> flipped(path, shape, own_plane, weight, shape.weight, true);
    const int64_t sums_size = path.gradient_size(shape, shape.weight.taps());

    std::vector<scalar_t> room(4 * v.numel() + probes * sums_size);
    scalar_t* const image = room.data();
    scalar_t *const even = image + v.numel(), *const odd = even + v.numel();
    scalar_t *const u = odd + v.numel(), *const sums = u + v.numel();
    std::vector<scalar_t> squares((terms + 2) * probes);  // of E^k v, a row for each k
    const scalar_t* const first = v.const_data_ptr<scalar_t>();
    at::parallel_for(0, probes, 1, [&](int64_t begin, int64_t end) {
      const scalar_t* power = first;  // E^k v, but for the sign
      for (int64_t p = begin; p < end; ++p)
        for (int64_t i = p * size; i < (p + 1) * size; ++i) squares[p] += first[i] * first[i];
      for (int64_t k = 0; k <= terms; ++k) {
        scalar_t* const next = k == terms ? nullptr : k % 2 == 0 ? even : odd;
        scalar_t* const size_of_next = squares.data() + (k + 1) * probes;
        const PackedKernel<scalar_t> r = packed_r.view(), w = packed_w.view();
        series.forward(
            {swapped, plane, r, w, power, nullptr, image, next, size_of_next}, begin, end);
        power = next;
        if (k == 0) continue;
        const auto scale = static_cast<scalar_t>(k % 2 == 0 ? scales[k - 1] : -scales[k - 1]);
        for (int64_t i = begin * size; i < end * size; ++i) u[i] += scale * image[i];
      }
      const Conv2dBackward<scalar_t> step = {
          shape,
          own_plane,
          flipped.view(),
          flipped.view(),
          /*grad_z=*/first,
          /*grad_recon=*/nullptr,
          /*x=*/u,
          /*z=*/nullptr,
          /*bias=*/nullptr,
          /*residual=*/nullptr,
          /*grad_x=*/nullptr,
          /*data_share=*/1,
          /*want_weight=*/true,
          /*want_inverse=*/false,
          /*pulls_weight=*/false};
      for (int64_t p = begin; p < end; ++p)  // apart, so that threads do not change the sum
        path.backward(step, p, p + 1, sums + p * sums_size, nullptr);
    });

    const auto total = [&](int64_t k) {
      const scalar_t* row = squares.data() + k * probes;
      return std::accumulate(row, row + probes, 0.0);
    };
    growth = std::sqrt(total(terms) / std::max(total(terms - 1), 1e-37));
    if (growth < 1) {
      const auto scale = static_cast<scalar_t>(share / static_cast<double>(probes));
      for (int64_t p = 1; p < probes; ++p)
        for (int64_t i = 0; i < sums_size; ++i) sums[i] += sums[p * sums_size + i];
      for (int64_t i = 0; i < sums_size; ++i) sums[i] *= scale;
      path.unpack(shape, shape.weight.taps(), sums, gradient.mutable_data_ptr<scalar_t>());
    } else {  // also if it is not a number
      gradient.zero_();
    }
  });
  return {gradient, at::scalar_tensor(growth, gradient.options())};
}

std::tuple<Tensor, Tensor> debias(
    const Tensor& v, const Tensor& weight, const Tensor& weight_inv, int64_t dilation,
    int64_t groups, bool circular, at::ArrayRef<double> scales, double share) {
  check_debias(v, weight, weight_inv, dilation, groups, scales);
  const Geometry geometry = geometry_of(v, dilation, groups, circular);
  const Tensor w = wide(reaching(weight, v, geometry)), r = wide(reaching(weight_inv, v, geometry));
  if (prefers_stock(w, r))
    return debias_conv2d(v, weight, weight_inv, dilation, groups, circular, scales, share);
  const auto [gradient, growth] = fused(wide(v), w, r, geometry, scales, share);
  return {filled_up(gradient, weight, v, geometry), growth};
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, CPU, m) { m.impl("debias_conv2d", debias); }

}  // namespace snf

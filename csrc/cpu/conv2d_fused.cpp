// The fused convolution step: images shared out to threads, weight gradients summed in a fixed
// order.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "conv2d_packed.h"
#include "conv2d_step.h"
#include "pooled_memory.h"

namespace snf {
namespace {

using at::Tensor;

template <typename T>
const T* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// How many parts a batch's weight gradients are summed in: fixed by the shapes alone, so that the
// result does not depend on the number of threads.
int64_t part_count(int64_t batch, int64_t elements) {
  const int64_t most = std::clamp<int64_t>((int64_t{1} << 23) / elements, 4, 64);
  return std::clamp<int64_t>(std::max(std::min<int64_t>(batch, 16), batch / 8), 1, most);
}

}  // namespace

ForwardStep fused::forward(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    const Geometry& geometry, bool reconstruct) {
  Tensor z = pooled_empty(x.sizes(), x.options());
  Tensor residual =
      reconstruct ? pooled_empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  Tensor recon = at::empty({x.size(0)}, x.options());
  const Conv2dShape shape = shape_of(x, weight, weight_inv, geometry);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "snf_conv2d_forward", [&] {
    const Plane plane(shape);
    const Conv2dPath<scalar_t>& path = conv2d_path<scalar_t>(shape, plane);
    const Packed<scalar_t> packed_w(path, shape, plane, weight, shape.weight, false);
    const Packed<scalar_t> packed_r(path, shape, plane, weight_inv, shape.inverse, false);
    const Conv2dForward<scalar_t> step = {
        shape,
        plane,
        packed_w.view(),
        packed_r.view(),
        x.const_data_ptr<scalar_t>(),
        data_or_null<scalar_t>(bias),
        z.mutable_data_ptr<scalar_t>(),
        reconstruct ? residual.mutable_data_ptr<scalar_t>() : nullptr,
        recon.mutable_data_ptr<scalar_t>()};
    at::parallel_for(
        0, x.size(0), 1, [&](int64_t begin, int64_t end) { path.forward(step, begin, end); });
  });
  return {z, recon, residual};
}

BackwardStep fused::backward(
    const Tensor& grad_z, const OptionalTensor& grad_recon, const Tensor& x,
    const OptionalTensor& z, const OptionalTensor& residual, const Tensor& weight,
    const Tensor& weight_inv, const OptionalTensor& bias, const Geometry& geometry,
    const Shares& shares, std::array<bool, 4> mask) {
  const int64_t batch = x.size(0);
  const Conv2dShape shape = shape_of(x, weight, weight_inv, geometry);
  const auto allocate = [&](bool wanted, at::IntArrayRef size) {
    return wanted ? pooled_empty(size, x.options()) : Tensor();
  };
  Tensor dx = allocate(mask[0], x.sizes()), dw = allocate(mask[1], weight.sizes());
  Tensor dr = allocate(mask[2], weight_inv.sizes());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "snf_conv2d_backward", [&] {
    const Plane plane(shape);
    const Conv2dPath<scalar_t>& path = conv2d_path<scalar_t>(shape, plane);
    const Packed<scalar_t> packed_w(path, shape, plane, weight, shape.weight, true);
    // R is used for the penalty's pull on W alone: scaled, it gives any share of that.
    const Packed<scalar_t> packed_r(
        path, shape, plane, weight_inv, shape.inverse, true, shares.penalty);
    const Conv2dBackward<scalar_t> step = {
        shape,
        plane,
        packed_w.view(),
        packed_r.view(),
        grad_z.const_data_ptr<scalar_t>(),
        data_or_null<scalar_t>(grad_recon),
        x.const_data_ptr<scalar_t>(),
        data_or_null<scalar_t>(z),
        data_or_null<scalar_t>(bias),
        data_or_null<scalar_t>(residual),
        mask[0] ? dx.mutable_data_ptr<scalar_t>() : nullptr,
        static_cast<scalar_t>(shares.data),
        mask[1],
        mask[2],
        mask[1] && grad_recon && shares.penalty != 0};
    const int64_t size_w = mask[1] ? path.gradient_size(shape, shape.weight.taps()) : 0;
    const int64_t size_r = mask[2] ? path.gradient_size(shape, shape.inverse.taps()) : 0;
    const int64_t size = size_w + size_r;
    const int64_t parts = part_count(batch, weight.numel() + weight_inv.numel());
    Tensor buffer = pooled_empty({parts, size}, x.options());
    scalar_t* sums = buffer.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        scalar_t* own = sums + part * size;
        std::fill_n(own, size, scalar_t(0));
        path.backward(step, batch * part / parts, batch * (part + 1) / parts, own, own + size_w);
      }
    });
    at::parallel_for(0, size, 1 << 12, [&](int64_t begin, int64_t end) {
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = begin; i < end; ++i) sums[i] += sums[part * size + i];
    });
    if (mask[1]) path.unpack(shape, shape.weight.taps(), sums, dw.mutable_data_ptr<scalar_t>());
    if (mask[2])
      path.unpack(shape, shape.inverse.taps(), sums + size_w, dr.mutable_data_ptr<scalar_t>());
  });
  return {dx, dw, dr};
}

}  // namespace snf

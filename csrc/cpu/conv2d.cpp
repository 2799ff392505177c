// snf_conv2d on the CPU: images shared out to threads, weight gradients summed in a fixed order.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../multiplicity.h"
#include "conv2d_kernel.h"
#include "pooled_memory.h"
#include "precision.h"

namespace snf {
namespace {

using at::Tensor;

Conv2dShape shape_of(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, int64_t dilation,
    int64_t groups, bool circular) {
  return {
      x.size(1),
      groups,
      x.size(2),
      x.size(3),
      dilation,
      circular,
      {weight.size(2), weight.size(3)},
      {weight_inv.size(2), weight_inv.size(3)}};
}

// The taps of a kernel that can reach a pixel: zero padding alone would meet the others.
Tensor reaching(const Tensor& kernel, const Tensor& x, int64_t dilation, bool circular) {
  if (circular) return kernel;
  const auto cut = [&](const Tensor& k, int64_t axis) {
    const int64_t reach = std::min(k.size(axis) / 2, (x.size(axis) - 1) / dilation);
    return k.narrow(axis, k.size(axis) / 2 - reach, 2 * reach + 1);
  };
  return cut(cut(kernel, 2), 3);
}

// A kernel in the order of the inner loops, and where its taps are.
template <typename T>
struct Packed {
  Packed(
      const Conv2dPath<T>& path, const Conv2dShape& shape, const Plane& plane, const Tensor& kernel,
      KernelSize size, bool flipped)
      : size(size),
        values(path.packed_size(shape, size.taps())),
        offsets(tap_offsets(shape, plane, size)) {
    path.pack(shape, plane, kernel.const_data_ptr<T>(), size.taps(), flipped, values.data());
  }
  PackedKernel<T> view() const { return {values.data(), offsets.data(), size}; }

 private:
  KernelSize size;
  std::vector<T> values;
  std::vector<int64_t> offsets;
};

template <typename T>
const T* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    int64_t dilation, int64_t groups, bool circular) {
  check_conv2d(x, weight, weight_inv, bias, dilation, groups);
  const Tensor in = wide(x), w = wide(reaching(weight, x, dilation, circular)),
               r = wide(reaching(weight_inv, x, dilation, circular));
  const OptionalTensor c = wide(bias);
  const int64_t batch = x.size(0);
  Tensor z = pooled_empty(in.sizes(), in.options());
  Tensor residual = pooled_empty(in.sizes(), in.options());
  Tensor recon = at::empty({batch}, in.options());
  const Conv2dShape shape = shape_of(x, w, r, dilation, groups, circular);
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "snf_conv2d_forward", [&] {
    const Plane plane(shape);
    const Conv2dPath<scalar_t>& path = conv2d_path<scalar_t>(shape, plane);
    const Packed<scalar_t> packed_w(path, shape, plane, w, shape.weight, false);
    const Packed<scalar_t> packed_r(path, shape, plane, r, shape.inverse, false);
    const Conv2dForward<scalar_t> step = {
        shape,
        plane,
        packed_w.view(),
        packed_r.view(),
        in.const_data_ptr<scalar_t>(),
        data_or_null<scalar_t>(c),
        z.mutable_data_ptr<scalar_t>(),
        residual.mutable_data_ptr<scalar_t>(),
        recon.mutable_data_ptr<scalar_t>()};
    at::parallel_for(
        0, batch, 1, [&](int64_t begin, int64_t end) { path.forward(step, begin, end); });
  });
  return {z.to(x.scalar_type()), recon, residual};
}

// grad += scale * flip(other) * m(own), cropped or padded to the shape of `own` (SNF 21-30).
template <typename T>
void add_inverse_term(
    const Conv2dShape& shape, const T* other, KernelSize other_size, KernelSize own_size,
    double scale, T* grad) {
  const int64_t width = shape.per_group();
  struct Match {
    int64_t own, other;
    double multiple;
  };
  const auto matches = [&](int64_t own, int64_t other, int64_t extent) {
    std::vector<Match> found;
    for (int64_t a = 0; a < own; ++a)
      for (int64_t b = 0; b < other; ++b) {
        const int64_t m = multiplicity(
            (a - own / 2) * shape.dilation, (b - other / 2) * shape.dilation, extent,
            shape.circular);
        if (m > 0) found.push_back({a, b, static_cast<double>(m)});
      }
    return found;
  };
  const auto in_rows = matches(own_size.rows, other_size.rows, shape.height);
  const auto in_columns = matches(own_size.columns, other_size.columns, shape.width);
  for (int64_t channel = 0; channel < shape.channels; ++channel)
    for (int64_t i = 0; i < width; ++i, grad += own_size.taps()) {
      // Channels swap within their group.
      const int64_t start = channel / width * width, o = channel - start;
      const T* source = other + ((start + i) * width + o) * other_size.taps();
      for (const Match& row : in_rows)
        for (const Match& column : in_columns)
          grad[row.own * own_size.columns + column.own] += static_cast<T>(
              scale * row.multiple * column.multiple *
              source[row.other * other_size.columns + column.other]);
    }
}

// How many parts a batch's weight gradients are summed in: fixed by the shapes alone, so that the
// result does not depend on the number of threads.
int64_t part_count(int64_t batch, int64_t elements) {
  const int64_t most = std::clamp<int64_t>((int64_t{1} << 23) / elements, 4, 64);
  return std::clamp<int64_t>(std::max(std::min<int64_t>(batch, 16), batch / 8), 1, most);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_z, const OptionalTensor& grad_log_det, const OptionalTensor& grad_recon,
    const Tensor& x, const Tensor& z, const Tensor& residual, const Tensor& weight,
    const Tensor& weight_inv, const OptionalTensor& bias, int64_t dilation, int64_t groups,
    bool circular, std::array<bool, 4> mask) {
  const auto type = x.scalar_type();
  const Tensor dz = wide(grad_z), in = wide(x), out = wide(z);
  const Tensor w = wide(reaching(weight, x, dilation, circular)),
               r = wide(reaching(weight_inv, x, dilation, circular));
  const OptionalTensor c = wide(bias), q = per_sample(grad_recon, in.scalar_type());
  const int64_t batch = x.size(0);
  const Conv2dShape shape = shape_of(x, w, r, dilation, groups, circular);
  const double half_total = 0.5 * total(grad_log_det);
  const auto allocate = [&](bool wanted, at::IntArrayRef size) {
    return wanted ? pooled_empty(size, in.options()) : at::empty({0}, in.options());
  };
  Tensor dx = allocate(mask[0], x.sizes()), dw = allocate(mask[1], w.sizes());
  Tensor dr = allocate(mask[2], r.sizes());
  if (mask[0] || mask[1] || mask[2])
    AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "snf_conv2d_backward", [&] {
      const Plane plane(shape);
      const Conv2dPath<scalar_t>& path = conv2d_path<scalar_t>(shape, plane);
      const Packed<scalar_t> packed_w(path, shape, plane, w, shape.weight, true);
      const Packed<scalar_t> packed_r(path, shape, plane, r, shape.inverse, true);
      const Conv2dBackward<scalar_t> step = {
          shape,
          plane,
          packed_w.view(),
          packed_r.view(),
          dz.const_data_ptr<scalar_t>(),
          data_or_null<scalar_t>(q),
          in.const_data_ptr<scalar_t>(),
          out.const_data_ptr<scalar_t>(),
          data_or_null<scalar_t>(c),
          residual.const_data_ptr<scalar_t>(),
          mask[0] ? dx.mutable_data_ptr<scalar_t>() : nullptr,
          mask[1],
          mask[2]};
      const int64_t size_w = mask[1] ? path.gradient_size(shape, shape.weight.taps()) : 0;
      const int64_t size_r = mask[2] ? path.gradient_size(shape, shape.inverse.taps()) : 0;
      const int64_t size = size_w + size_r, parts = part_count(batch, w.numel() + r.numel());
      Tensor buffer = pooled_empty({parts, size}, in.options());
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
      scalar_t* grad_w = dw.mutable_data_ptr<scalar_t>();
      scalar_t* grad_r = dr.mutable_data_ptr<scalar_t>();
      if (mask[1]) path.unpack(shape, shape.weight.taps(), sums, grad_w);
      if (mask[2]) path.unpack(shape, shape.inverse.taps(), sums + size_w, grad_r);
      if (mask[1])
        add_inverse_term(
            shape, r.const_data_ptr<scalar_t>(), shape.inverse, shape.weight, half_total, grad_w);
      if (mask[2])
        add_inverse_term(
            shape, w.const_data_ptr<scalar_t>(), shape.weight, shape.inverse, -half_total, grad_r);
    });
  Tensor dc = mask[3] ? dz.sum({0, 2, 3}) : at::empty({0}, in.options());
  const auto whole = [&](const Tensor& grad, const Tensor& kernel) {
    if (grad.numel() == 0 || grad.sizes() == kernel.sizes()) return grad;
    Tensor full = at::zeros(kernel.sizes(), grad.options());
    reaching(full, x, dilation, circular).copy_(grad);
    return full;
  };
  return {dx.to(type), whole(dw, weight).to(type), whole(dr, weight_inv).to(type), dc.to(type)};
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, CPU, m) {
  m.impl("snf_conv2d_forward", forward);
  m.impl("snf_conv2d_backward", backward);
}

}  // namespace snf

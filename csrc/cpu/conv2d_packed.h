// Tensors as the fused kernels take them.
#pragma once

#include <cstdint>
#include <vector>

#include "../convolution.h"
#include "conv2d_kernel.h"

namespace snf {

inline Conv2dShape shape_of(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_inv,
    const Geometry& geometry) {
  Conv2dShape shape = {
      x.size(1),
      geometry.groups,
      x.size(2),
      x.size(3),
      geometry.dilation,
      geometry.circular,
      {weight.size(2), weight.size(3)},
      {weight_inv.size(2), weight_inv.size(3)}};
  if (shape.one_tap()) {  // knows no neighbours: an image may as well be one row
    shape.width = shape.pixels();
    shape.height = 1;
  }
  return shape;
}

// A kernel in the order of the inner loops, and where its taps are.
template <typename T>
struct Packed {
  Packed(
      const Conv2dPath<T>& path, const Conv2dShape& shape, const Plane& plane,
      const at::Tensor& kernel, KernelSize size, bool flipped, double scale = 1)
      : size(size),
        values(path.packed_size(shape, size.taps())),
        offsets(tap_offsets(shape, plane, size)) {
    path.pack(shape, plane, kernel.const_data_ptr<T>(), size.taps(), flipped, values.data());
    for (T& value : values) value *= static_cast<T>(scale);
  }
  PackedKernel<T> view() const { return {values.data(), offsets.data(), size}; }

 private:
  KernelSize size;
  std::vector<T> values;
  std::vector<int64_t> offsets;
};

}  // namespace snf

// Where padded images and their taps lie, and the memory of a thread for them.
#include "conv2d_kernel.h"

#include <algorithm>
#include <cstddef>
#include <new>

namespace snf {

namespace {

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace

Plane::Plane(const Conv2dShape& shape) {
  halo_rows = std::max(shape.weight.rows, shape.inverse.rows) / 2 * shape.dilation;
  halo_columns = std::max(shape.weight.columns, shape.inverse.columns) / 2 * shape.dilation;
  pitch = shape.width + (shape.circular ? 2 : 1) * halo_columns;
  lead = round_up(halo_rows * pitch + halo_columns, kAlign);
  length = std::max((shape.height - 1) * pitch + shape.width, kAlign);
  size = length;
  bare = shape.one_tap() && length == shape.pixels();
  if (bare) return;
  size = round_up(lead + length + halo_rows * pitch + halo_columns, kAlign);
  // Planes a multiple of 4 KiB apart would compete for the same cache sets.
  if (size % 512 == 0) size += kAlign;
}

std::vector<int64_t> tap_offsets(const Conv2dShape& shape, const Plane& plane, KernelSize size) {
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < shape.per_group(); ++i)
    for (int64_t a = 0; a < size.rows; ++a)
      for (int64_t b = 0; b < size.columns; ++b)
        offsets.push_back(
            i * plane.size +
            ((a - size.rows / 2) * plane.pitch + b - size.columns / 2) * shape.dilation);
  return offsets;
}

template <typename T>
T* workspace(int64_t elements) {
  struct Aligned {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  struct Buffer {
    T* data = nullptr;
    int64_t capacity = 0;
    ~Buffer() { Aligned{}(data); }
  };
  thread_local Buffer buffer;
  if (buffer.capacity < elements) {
    Aligned{}(buffer.data);
    buffer.data = nullptr;
    buffer.capacity = 0;
    buffer.data = static_cast<T*>(
        ::operator new(static_cast<std::size_t>(elements) * sizeof(T), std::align_val_t{64}));
    buffer.capacity = elements;
  }
  return buffer.data;
}

template float* workspace<float>(int64_t);
template double* workspace<double>(int64_t);

}  // namespace snf

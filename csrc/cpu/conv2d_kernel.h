// The fused convolution step on the CPU: what the instruction-set specific kernels take and give.
// Knows no torch.
//
// Images are copied into padded planes, so that a tap of a kernel is a fixed distance in memory.
// Zero padding shares one gap between the end of a row and the start of the next; circular padding
// needs two. With one tap there is nothing to pad, and images are read and written where they lie.
// Two families of kernels do the arithmetic: conv2d_pixels.inl keeps a plane for each
// channel and has vectors along the pixels, conv2d_channels.inl keeps one plane whose pixels are
// vectors of channels.
#pragma once

#include <cstdint>
#include <vector>

namespace snf {

struct KernelSize {
  int64_t rows, columns;
  int64_t taps() const { return rows * columns; }
};

struct Conv2dShape {
  int64_t channels, groups, height, width, dilation;
  bool circular;
  KernelSize weight, inverse;

  int64_t per_group() const { return channels / groups; }
  int64_t pixels() const { return height * width; }
  bool one_tap() const { return weight.taps() * inverse.taps() == 1; }
};

// Layout of a plane in pixels, the same for every buffer of a step.
struct Plane {
  explicit Plane(const Conv2dShape& shape);

  bool bare;  // nothing around the pixels: an image is its planes where it lies
  int64_t halo_rows, halo_columns;
  int64_t pitch;   // from one row to the next
  int64_t lead;    // from the plane's start to its first pixel
  int64_t length;  // of the flat run that is computed, from the first pixel to the last; at least
                   // kAlign
  int64_t size;    // of the whole plane, a multiple of kAlign unless it is bare

  static constexpr int64_t kAlign = 16;  // a multiple of every vector's lanes
};

// A kernel rearranged for the inner loop, as itself or flipped (for the transposed convolution).
template <typename T>
struct PackedKernel {
  const T* values;
  const int64_t* offsets;  // of each tap in the plane of each input channel of a group
  KernelSize size;
};

template <typename T>
struct Conv2dForward {
  Conv2dShape shape;
  Plane plane;
  PackedKernel<T> weight, inverse;
  const T* x;
  const T* bias;  // may be null
  T* z;
  T* residual;  // may be null: nothing is reconstructed
  T* recon;     // one number an image
};

template <typename T>
struct Conv2dBackward {
  Conv2dShape shape;
  Plane plane;
  PackedKernel<T> weight_flipped, inverse_flipped;
  const T* grad_z;
  const T* grad_recon;  // may be null: no gradient through recon
  const T* x;
  const T* z;         // may be null unless the inverse's gradient is wanted
  const T* bias;      // may be null
  const T* residual;  // may be null without grad_recon
  T* grad_x;          // may be null
  T data_share;       // of the gradient through z, for the weight
  bool want_weight, want_inverse;
  bool pulls_weight;  // whether the gradient of recon reaches the weight
};

// Scratch memory of one thread, kept between calls: fresh pages cost more than the arithmetic.
template <typename T>
T* workspace(int64_t elements);

// One family of kernels.
template <typename T>
struct Conv2dPath {
  // Numbers that a packed kernel takes.
  int64_t (*packed_size)(const Conv2dShape&, int64_t taps);
  void (*pack)(
      const Conv2dShape&, const Plane&, const T* kernel, int64_t taps, bool flipped, T* out);
  // Images [begin, end).
  void (*forward)(const Conv2dForward<T>&, int64_t begin, int64_t end);
  // Adds the images' weight gradients to grad_weight and grad_inverse, each of gradient_size
  // numbers in an order of the family's own; `unpack` brings them into the kernel's.
  void (*backward)(
      const Conv2dBackward<T>&, int64_t begin, int64_t end, T* grad_weight, T* grad_inverse);
  int64_t (*gradient_size)(const Conv2dShape&, int64_t taps);
  void (*unpack)(const Conv2dShape&, int64_t taps, const T* packed, T* grad);
};

// The family that suits a shape on this processor.
template <typename T>
const Conv2dPath<T>& conv2d_path(const Conv2dShape& shape, const Plane& plane);

// Offsets of a kernel's taps in the planes of a group, channel by channel.
std::vector<int64_t> tap_offsets(const Conv2dShape& shape, const Plane& plane, KernelSize size);

}  // namespace snf

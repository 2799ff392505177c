// A coupling's network on the CPU (conv 3x3 - ReLU - conv 1x1 - ReLU - conv 3x3): what the
// instruction-set specific kernels take and give. Knows no torch.
//
// An image goes through all three convolutions while it is in the cache. Inputs and outputs are few
// channels and have a padded plane each; hidden channels are many and one plane holds them all, the
// channel fastest, filled up with zeros to whole vectors. Backward computes the hidden channels
// anew: that is a sixth of its arithmetic, and they need not be kept.
#pragma once

#include <cstdint>

#include "conv2d_kernel.h"

namespace snf {

struct NetworkShape {
  static constexpr int64_t kTaps = 9;

  int64_t inputs, hidden, outputs, height, width;
  int64_t padded;  // hidden channels, to whole vectors

  int64_t pixels() const { return height * width; }
  // Rows of padded numbers: one for each pair of a tap and an input or output.
  int64_t first() const { return inputs * kTaps; }
  int64_t last() const { return outputs * kTaps; }
};

// Weights, or their gradients: rows of hidden channels; biases.
template <typename T>
struct NetworkRows {
  T* first;        // [inputs, taps]
  T* middle;       // [hidden], hidden channels out
  T* last;         // [outputs, taps]
  T* bias_first;   // one row
  T* bias_middle;  // one row
  T* bias_last;    // outputs

  static int64_t size(const NetworkShape& s) {
    return (s.first() + s.hidden + s.last() + 2) * s.padded + s.outputs;
  }
  NetworkRows(const NetworkShape& s, T* numbers)
      : first(numbers),
        middle(first + s.first() * s.padded),
        last(middle + s.hidden * s.padded),
        bias_first(last + s.last() * s.padded),
        bias_middle(bias_first + s.padded),
        bias_last(bias_middle + s.padded) {}
};

// Where the numbers near a pixel are.
struct NetworkOffsets {
  const int64_t* inputs;    // in the planes: the taps of each input
  const int64_t* outputs;   // the taps of each output, mirrored
  const int64_t* hidden;    // in the hidden plane: its channels
  const int64_t* taps;      // taps
  const int64_t* mirrored;  // taps, mirrored
};

template <typename T>
struct NetworkStep {
  NetworkShape shape;
  Plane plane;
  NetworkOffsets near;
  NetworkRows<T> weights;
  const T* transposed;  // the middle weights, hidden channels in
  const T* x;
  int64_t x_stride;  // from one image to the next
};

template <typename T>
struct NetworkKernel {
  int64_t lanes;
  // Images [begin, end) of y.
  void (*forward)(const NetworkStep<T>&, int64_t begin, int64_t end, T* y);
  // Images [begin, end) of grad_x, which may be null; adds the images' weight gradients to
  // `grads`, as NetworkRows, which may be null.
  void (*backward)(
      const NetworkStep<T>&, int64_t begin, int64_t end, const T* grad_y, T* grad_x, T* grads);
};

// The kernels for this processor.
template <typename T>
const NetworkKernel<T>& network_kernel();

}  // namespace snf

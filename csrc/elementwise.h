// What the element-wise drivers take on every device: raw pointers, no torch.
// T: the type in memory; W: the type of arithmetic.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace snf {

// Where parameters, or their gradients, are: that of element i of run r of sample b lies at
// b * sample + r * run + i * stride. With a stride of 0 a run shares one.
struct Places {
  int64_t sample = 0, run = 0, stride = 0;
};

// A sample's elements: `kept` that pass unchanged, then `runs` times `length` that are transformed.
struct ElementwiseShape {
  int64_t samples = 0, kept = 0, runs = 1, length = 0;
  Places parameters, gradients;

  SNF_INLINE int64_t event() const { return kept + runs * length; }
};

template <typename T, typename W>
struct ElementwiseForward {
  ElementwiseShape shape;
  const T *x, *first, *second;  // the last two null without parameters
  T* y;                         // null where it is no output
  W* log_abs_det;               // of each sample
  int64_t* iterations;          // of each sample; null where nothing is iterated
};

template <typename T, typename W>
struct ElementwiseBackward {
  ElementwiseShape shape;
  const T *x, *first, *second, *grad_y;  // grad_y null where y is no output
  const W* grad_log_abs_det;             // may be null
  T* grad_x;                             // null where not wanted, as are the two below
  T *grad_first, *grad_second;
};

}  // namespace snf

// What the spline's kernels for each instruction set have in common; knows no torch.
#pragma once

#include <cstdint>

#include "../spline_math.h"

namespace snf {

// Lanes are neighbouring elements in memory. Tables of a tile are stored [knot][lane].
constexpr int kSplineLanes = 64;

// One tile of lanes over a range of rows. A row holds several samples where an event has fewer
// elements than a tile has lanes.
template <typename T>
struct SplineJob {
  const T *x, *widths, *heights, *derivatives;
  T tail_bound;
  int bins;
  bool inverse, shared;
  int64_t columns;     // elements of a sample, and of shared parameters
  int64_t first;       // the tile's first lane in row 0
  int64_t stride;      // from one row to the next
  int64_t begin, end;  // rows
  int64_t total;       // elements of x
  int lanes;           // of the tile
  int segment;         // lanes of one sample
  // Forward.
  T *y, *log_sums;  // log_sums[sample]
  // Backward. Absent gradients and outputs are null; grad_log has one number a sample.
  const T *grad_y, *grad_log;
  T *grad_x, *grad_widths, *grad_heights, *grad_derivatives;
  T* table_gradients;  // of shared parameters: [3][bins - 1][lane]

  bool wants_parameters() const {
    return grad_widths != nullptr || grad_heights != nullptr || grad_derivatives != nullptr ||
           table_gradients != nullptr;
  }
  int64_t sample(int64_t row) const { return (first + row * stride) / columns; }
};

// Numbers of scratch memory that a job needs.
inline int64_t spline_scratch(int64_t bins) { return (6 * (bins + 1) + 2 * bins) * kSplineLanes; }

template <typename T>
struct SplinePath {
  void (*forward)(const SplineJob<T>&, T* scratch);
  void (*backward)(const SplineJob<T>&, T* scratch);
  // From the sum of a tile's table gradients to the gradients of shared raw parameters.
  void (*finish)(const SplineJob<T>&, T* scratch);
};

template <typename T>
const SplinePath<T>& spline_path();

}  // namespace snf

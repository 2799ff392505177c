// rq_spline as the bindings call it: raw pointers, no torch. All calls only enqueue. T: float,
// double, __half or __nv_bfloat16.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../host_device.h"
#include "wide.h"

namespace snf {

// samples of `event` elements; shared: all samples have the parameters of one.
struct SplineShape {
  int64_t samples;
  int event, bins;
  double tail_bound;
  bool inverse, shared;
};

// Raw parameters: [event, bins] (derivatives: bins - 1) or [samples, event, bins].
template <typename T>
struct SplineInputs {
  const T *x, *widths, *heights, *derivatives;
};

// Gradients in: either may be null, and counts as zeros then. Out: null where not wanted.
template <typename T>
struct SplineGradients {
  const T* y;
  const Wide<T>* log_abs_det;
  T *x, *widths, *heights, *derivatives;

  SNF_HOST_DEVICE bool wants_parameters() const {
    return widths != nullptr || heights != nullptr || derivatives != nullptr;
  }
};

// Numbers that `workspace` must hold.
int64_t spline_forward_workspace(const SplineShape&);
int64_t spline_backward_workspace(const SplineShape&, int64_t multiprocessors);

// One kernel; before it one where samples share the parameters, and after it one where a sample
// takes several blocks.
template <typename T>
void spline_forward(
    const SplineShape&, const SplineInputs<T>&, T* y, Wide<T>* log_abs_det, Wide<T>* workspace,
    cudaStream_t);

// One kernel. Where samples share the parameters: one before it, and after it one if their
// gradients are wanted.
template <typename T>
void spline_backward(
    const SplineShape&, const SplineInputs<T>&, const SplineGradients<T>&, Wide<T>* workspace,
    int64_t multiprocessors, cudaStream_t);

}  // namespace snf

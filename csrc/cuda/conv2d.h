// The fused convolution step as the bindings call it: raw pointers, no torch. All calls only
// enqueue; none allocates or synchronises. Definitions in conv2d_kernels.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "conv2d_plan.h"
#include "wide.h"

namespace snf {

// T: float, __half or __nv_bfloat16; for the inverse term alone also double.
template <typename T>
struct ConvForwardArguments {
  const T *x, *weight, *weight_inv, *bias;  // bias may be null
  T* z;
  float *residual, *log_det, *recon;  // residual may be null: recon is zeros then, as log_det
                                      // always is in training
  float* workspace;                   // forward_workspace(plan, shape) floats
};

template <typename T>
struct ConvBackwardArguments {
  const T *grad_z, *x, *z, *weight, *weight_inv, *bias;  // bias may be null
  // The first two may be null: no such term. So may z and the residual, where nobody reads them.
  const float *grad_log_det, *grad_recon, *residual;
  T *grad_x, *grad_weight, *grad_weight_inv, *grad_bias;  // null where not wanted
  float* workspace;                                       // backward_workspace(plan, shape) floats
  // What the weight takes of the gradients through z and log_det, and of recon's.
  float data_share = 0.5f, penalty_share = 1.0f;
};

// The inverse term alone, added to gradients that something else computed.
template <typename T>
struct InverseTermArguments {
  const T *weight, *weight_inv;
  const Wide<T>* grad_log_det;       // may be null
  const Wide<T>* gradients;          // of the weight, of the inverse, and [channels] of anything
  T *grad_weight, *grad_weight_inv;  // null where not wanted
  float data_share = 0.5f;           // what the weight takes of the term
};

// What plans are made for where nothing is reconstructed: an inverse that takes no room.
inline ConvShape without_inverse(ConvShape shape) {
  shape.weight_inv = {1, 1};
  return shape;
}

// Floats of scratch memory.
int64_t forward_workspace(const ConvForwardPlan& plan, const ConvShape& shape);
int64_t backward_workspace(const ConvBackwardPlan& plan, const ConvShape& shape);

// One kernel, and a second one where an image takes several tiles.
template <typename T>
void conv2d_forward(
    const ConvShape&, const ConvForwardPlan&, const ConvForwardArguments<T>&, cudaStream_t);

// Two kernels: the step, and the reduction of its blocks' weight gradients.
template <typename T>
void conv2d_backward(
    const ConvShape&, const ConvBackwardPlan&, const ConvBackwardArguments<T>&, cudaStream_t);

// One kernel.
template <typename T>
void conv2d_inverse_term(const ConvShape&, const InverseTermArguments<T>&, cudaStream_t);

}  // namespace snf

// The element-wise operators as the bindings call them: raw pointers, no torch. All calls only
// enqueue. T: float, double, __half or __nv_bfloat16; Op: one of csrc/elementwise_math.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../elementwise.h"
#include "wide.h"

namespace snf {

// Elements of a sample that one block takes.
constexpr int kSamplePart = 4096;

// Blocks of a sample.
int64_t elementwise_parts(const ElementwiseShape&);

// One kernel. log_abs_det and iterations take one number a part, [samples, parts].
template <typename Op, typename T>
void elementwise_forward(const Op&, const ElementwiseForward<T, Wide<T>>&, cudaStream_t);

// One kernel. Parameters that samples share: see below.
template <typename Op, typename T>
void elementwise_backward(const Op&, const ElementwiseBackward<T, Wide<T>>&, cudaStream_t);

// The gradients of what all samples share: two kernels, the second of which adds up what is left
// in `workspace`, channel_workspace numbers. Gives the gradient of x on the way if it is wanted.
int64_t channel_workspace(const ElementwiseShape&, int64_t multiprocessors);
template <typename Op, typename T>
void channel_backward(
    const Op&, const ElementwiseBackward<T, Wide<T>>&, Wide<T>* workspace, int64_t multiprocessors,
    cudaStream_t);

}  // namespace snf

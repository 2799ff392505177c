// The element-wise kernels as the bindings call them: raw pointers, no torch. All calls only
// enqueue. T: float, double, __half or
// __nv_bfloat16.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "wide.h"

namespace snf {

// Elements of a row that one block takes.
constexpr int kRowPart = 8192;

// residual = reconstruction - x, z = y + bias, recon = row sums of residual^2, log_det = 0 (its
// value in training). Without a reconstruction there is no residual and recon is 0. Outputs may lie
// in the place of inputs of their type: z over y, residual over reconstruction.
template <typename T>
struct ResidualArguments {
  const Wide<T>*reconstruction, *y;
  const T *x, *bias;  // bias may be null; entry i / period belongs to column i
  T* z;
  Wide<T>*residual, *log_det, *recon, *workspace;  // residual_workspace(rows, columns) numbers
  int64_t rows;
  int columns, period;
};

// The accumulator of a weight gradient: to = scale * S * from', S the sum of grad_log_det.
template <typename T>
struct Transpose {
  const T* from;
  Wide<T>* to;  // null where it is not wanted
  float scale;
};

// half = grad_z / 2, pull = 2 q e, delta = pull - grad_x / 2, y = z - bias; each where it is not
// null. Without grad_recon the pull is zero.
template <typename T>
struct DeltaArguments {
  const T *grad_z, *z, *bias;
  const Wide<T>*residual, *grad_recon, *grad_log_det, *grad_x;
  Wide<T>*half, *pull, *delta, *y;
  Transpose<T> transposes[2];
  T* grad_bias;  // column sums of grad_z; null where not wanted
  int64_t rows;
  int columns, period;
};

int64_t residual_workspace(int64_t rows, int columns);

// One kernel, and a second one for rows of more than kRowPart elements.
template <typename T>
void residual(const ResidualArguments<T>&, cudaStream_t);

// One kernel.
template <typename T>
void deltas(const DeltaArguments<T>&, cudaStream_t);

// out[row] = sum of in[row, :]
template <typename W>
void row_sums(const W* in, int columns, W* out, int64_t rows, cudaStream_t);

}  // namespace snf

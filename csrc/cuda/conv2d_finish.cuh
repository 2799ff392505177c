// The reduction over the backward kernel's blocks, and the learned inverse's term. See
// docs/kernels.md.
#pragma once

#include "../multiplicity.h"
#include "conv2d_tile.cuh"

namespace snf {

// One weight gradient to be finished: the sum of its partial gradients and of the inverse term,
// scale * S * flip(other) * m (SNF 21-30). How the partial gradients lie is `order`.
template <typename T>
struct FinishKernel {
  CorrelationPlan order;
  int block;      // output channels of one item
  Size other;     // size of the other kernel
  const T* from;  // the other kernel
  T* gradient;    // null where it is not wanted
  float scale;
};

template <typename T>
struct Finish {
  ConvGeometry geometry;
  FinishKernel<T> kernels[2];  // of the weight and of its learned inverse
  T* grad_bias;                // null where it is not wanted
  const Wide<T>* partials;     // [rows][both kernels' gradients, the bias's]
  int rows;
  const Wide<T>* grad_log_det;  // null where there is none
  int64_t batch;
};

// Where sum `n` of a partial gradient stands in the kernel; false for the padding of a block.
template <typename T>
__device__ bool find_weight(
    const FinishKernel<T>& k, const ConvGeometry& g, int n, int& out, int& in, int& tap) {
  const CorrelationPlan& p = k.order;
  const int taps = p.tap_rows * p.tap_columns, sum = n / p.items, item = n % p.items;
  const int blocks_a_group = (g.per_group + k.block - 1) / k.block;
  tap = item % p.tap_groups * taps + sum % taps;
  in = item / p.tap_groups % g.per_group;
  const int block = item / p.tap_groups / g.per_group;
  const int within = block % blocks_a_group * k.block + sum / taps;
  out = block / blocks_a_group * g.per_group + within;
  return within < g.per_group;
}

// flip(other) * m at one place of a kernel: the sum over the other kernel's taps that stand in the
// transposed place of the matrix, each as often as it does.
template <typename T>
__device__ Wide<T> inverse_term(
    const FinishKernel<T>& k, const ConvGeometry& g, int out, int in, int tap) {
  const int a = (tap / k.order.kernel.columns - k.order.kernel.rows / 2) * g.dilation;
  const int b = (tap % k.order.kernel.columns - k.order.kernel.columns / 2) * g.dilation;
  const int start = out / g.per_group * g.per_group;  // channels swap within their group
  const T* const from =
      k.from + ((start + in) * int64_t{g.per_group} + out - start) * k.other.count();
  Wide<T> sum = 0;
  for (int row = 0; row < k.other.rows; ++row) {
    const auto rows = multiplicity(a, (row - k.other.rows / 2) * g.dilation, g.height, g.circular);
    if (rows == 0) continue;
    for (int column = 0; column < k.other.columns; ++column) {
      const auto columns =
          multiplicity(b, (column - k.other.columns / 2) * g.dilation, g.width, g.circular);
      if (columns != 0)
        sum += static_cast<Wide<T>>(rows * columns) * widen(from[row * k.other.columns + column]);
    }
  }
  return sum;
}

constexpr int kFinishRows = 16;

// A warp's lanes own neighbouring sums, the block's warps a share of the rows each; then the
// first warp adds the shares and the inverse term and writes the gradients.
template <typename T>
__global__ void __launch_bounds__(kWarp* kFinishRows, 2) conv2d_finish(const Finish<T> p) {
  using W = Wide<T>;
  W* const shares = reinterpret_cast<W*>(shared_memory());  // [kFinishRows][kWarp]
  const ConvGeometry& g = p.geometry;
  const int lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp;
  const FinishKernel<T>&weight = p.kernels[0], &inverse = p.kernels[1];
  const int first = weight.order.outputs(weight.block);
  const int second = first + inverse.order.outputs(inverse.block);
  const int width = second + g.channels, n = blockIdx.x * kWarp + lane;

  W total = 0;
  if (p.grad_log_det != nullptr) {
    for (int64_t b = threadIdx.x; b < p.batch; b += blockDim.x) total += p.grad_log_det[b];
    total = block_sum(total, shares);
    __syncthreads();
  }
  const bool wanted = n < first    ? weight.gradient != nullptr
                      : n < second ? inverse.gradient != nullptr
                                   : n < width && p.grad_bias != nullptr;
  W sum = 0;
  if (wanted) {
#pragma unroll 8
    for (int row = part; row < p.rows; row += kFinishRows)
      sum += p.partials[int64_t{row} * width + n];
  }
  shares[part * kWarp + lane] = sum;
  __syncthreads();
  if (part != 0 || !wanted) return;
  for (int i = 1; i < kFinishRows; ++i) sum += shares[i * kWarp + lane];
  if (n >= second) return store(p.grad_bias + n - second, sum);
  const FinishKernel<T>& k = n < first ? weight : inverse;
  int out, in, tap;
  if (!find_weight(k, g, n < first ? n : n - first, out, in, tap)) return;
  if (p.grad_log_det != nullptr)
    sum += static_cast<W>(k.scale) * total * inverse_term(k, g, out, in, tap);
  store(k.gradient + (out * int64_t{g.per_group} + in) * k.order.kernel.count() + tap, sum);
}

}  // namespace snf

// The forward kernel of a self-normalizing convolution. See docs/kernels.md.
#pragma once

#include "conv2d_tile.cuh"

namespace snf {

template <typename T>
struct ConvForward {
  ConvForwardPlan plan;
  ConvGeometry geometry;
  const T *x, *weight, *weight_inv, *bias;  // bias may be null
  T* z;
  float *residual, *log_det, *recon;  // residual may be null; recon: one number a tile
};

// A block owns a tile of one image (all of it where it fits) and all channels: z = y + bias, and
// where a residual is wanted residual = R y - x and the tile's sum of its squares. Reads x and the
// weights once, writes z and the residual once. y around the tile is computed again by the
// neighbours.
template <int kBlock, typename T>
__global__ void __launch_bounds__(kMaxThreads, 1) conv2d_forward(const ConvForward<T> p) {
  const ConvForwardPlan& plan = p.plan;
  const ConvGeometry& g = p.geometry;
  const int64_t image = blockIdx.x / plan.tiles.count();
  const int tile = blockIdx.x % plan.tiles.count();
  const int row = tile / plan.tiles.columns * plan.tile.rows;
  const int column = tile % plan.tiles.columns * plan.tile.columns;
  const int last_row = min(row + plan.tile.rows, g.height);
  const int last_column = min(column + plan.tile.columns, g.width);
  const int region_row = row - plan.pad.rows, region_column = column - plan.pad.columns;
  const Size w = plan.by_weight.kernel, r = plan.by_inverse.kernel;

  const int64_t offset = image * g.channels * g.pixels();
  const T* const x_image = p.x + offset;
  const Plane x = {
      shared_memory(), plan.x, region_row - w.rows / 2 * g.dilation,
      region_column - w.columns / 2 * g.dilation};
  const Plane y = {
      x.data + g.channels * plan.x.stride, plan.y, row - r.rows / 2 * g.dilation,
      column - r.columns / 2 * g.dilation};
  float* const scratch = shared_memory() + plan.scratch;

  lay_down<kBlock, false>(plan.by_weight, g, p.weight, plan.weight_pitch);
  if (p.residual != nullptr)
    lay_down<kBlock, false>(plan.by_inverse, g, p.weight_inv, plan.weight_pitch);
  fill(x, g, [&](int at, int) { return widen(x_image[at]); });
  for (int n = threadIdx.x; n < g.channels * plan.y.stride; n += blockDim.x) y.data[n] = 0.0f;

  convolve<kBlock, false>(
      plan.by_weight, g, x, region_row, region_column, p.weight, plan.weight_pitch, scratch,
      [&](int channel, int at_row, int at_column, float value) {
        int image_row = at_row, image_column = at_column;
        if (!inside(g, image_row, image_column)) return;
        *y.at(channel, at_row, at_column) = value;
        if (at_row < row || at_row >= last_row || at_column < column || at_column >= last_column)
          return;
        const float bias = p.bias == nullptr ? 0.0f : widen(p.bias[channel]);
        store(p.z + offset + (channel * g.height + at_row) * g.width + at_column, value + bias);
      });

  if (p.residual == nullptr) {  // recon has one number an image
    if (tile == 0 && threadIdx.x == 0) p.recon[image] = p.log_det[image] = 0;
    return;
  }
  float squares = 0;
  convolve<kBlock, false>(
      plan.by_inverse, g, y, row, column, p.weight_inv, plan.weight_pitch, scratch,
      [&](int channel, int at_row, int at_column, float value) {
        if (at_row >= last_row || at_column >= last_column) return;
        const float error = value - *x.at(channel, at_row, at_column);
        p.residual[offset + (channel * g.height + at_row) * g.width + at_column] = error;
        squares += error * error;
      });
  __syncthreads();
  squares = block_sum(squares, scratch);
  if (threadIdx.x != 0) return;
  p.recon[blockIdx.x] = squares;
  if (tile == 0) p.log_det[image] = 0;
}

}  // namespace snf

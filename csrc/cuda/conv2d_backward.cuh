// The backward kernel of a self-normalizing convolution, but for the sum over its blocks. See
// docs/kernels.md.
#pragma once

#include "conv2d_tile.cuh"

namespace snf {

// ---- Weight gradients of a plane ---------------------------------------------------------------

// Adds delta * x, pixel by pixel, to the sums of a block of taps over some segments of rows. `x`
// points at the pixel that the block's first tap meets at the tile's first pixel.
template <int kBlock, int kRows, int kColumns>
__device__ void correlate_segments(
    float (&sums)[kBlock * kRows * kColumns], const CorrelationPlan& p, const float* delta,
    const int (&channels)[kBlock], int delta_pitch, const float* x, int x_pitch, Size valid,
    int share) {
  const int units = valid.rows * p.segments;
  for (int unit = share; unit < units; unit += p.splits) {
    const int row = unit / p.segments, begin = unit % p.segments * p.segment_length;
    const int end = min(begin + p.segment_length, valid.columns);
    const float* const d = delta + row * delta_pitch;
    const float* const from = x + row * x_pitch;
    // The window slides along the row: each of its columns is read once, over the oldest one.
    float window[kRows][kColumns];
#pragma unroll
    for (int a = 0; a < kRows; ++a)
#pragma unroll
      for (int b = 0; b < kColumns - 1; ++b) window[a][b] = from[a * x_pitch + begin + b];
    for (int first = begin; first < end; first += kColumns) {
#pragma unroll
      for (int s = 0; s < kColumns; ++s) {
        const int column = first + s;
        if (column >= end) break;
#pragma unroll
        for (int a = 0; a < kRows; ++a)
          window[a][(s + kColumns - 1) % kColumns] = from[a * x_pitch + column + kColumns - 1];
#pragma unroll
        for (int k = 0; k < kBlock; ++k) {
          const float value = d[channels[k] + column];
#pragma unroll
          for (int a = 0; a < kRows; ++a)
#pragma unroll
            for (int b = 0; b < kColumns; ++b)
              sums[(k * kRows + a) * kColumns + b] += value * window[a][(s + b) % kColumns];
        }
      }
    }
  }
}

// This block's part of a weight gradient, to[sum within an item][item]; `add` to what is there.
// `delta` and `x` are planes around the tile that starts at (row, column), of which `valid` counts.
template <int kBlock, int kRows, int kColumns>
__device__ void correlate(
    const CorrelationPlan& p, const ConvGeometry& g, const Plane& delta, const Plane& x, int row,
    int column, Size valid, int threads, float* scratch, float* to, bool add) {
  constexpr int kSums = kBlock * kRows * kColumns;
  const int thread = threadIdx.x;
  const int at_once = threads / p.splits;  // items
  const int share = thread % p.splits, own = thread / p.splits;
  const int blocks_a_group = (g.per_group + kBlock - 1) / kBlock;
  for (int first = 0; first < p.items; first += at_once) {
    const int count = min(at_once, p.items - first);
    __syncthreads();  // the planes are there, and nobody needs the scratch memory any more
    if (own < count) {
      const int item = first + own;
      const int tap = item % p.tap_groups * kRows * kColumns;
      const int input = item / p.tap_groups % g.per_group;
      const int block = item / p.tap_groups / g.per_group;
      const int group = block / blocks_a_group, lowest = block % blocks_a_group * kBlock;
      int channels[kBlock];
#pragma unroll
      for (int k = 0; k < kBlock; ++k)
        channels[k] = lowest + k < g.per_group ? k * delta.shape.stride : 0;
      const float* const corner = x.at(
          group * g.per_group + input,
          row + (tap / p.kernel.columns - p.kernel.rows / 2) * g.dilation,
          column + (tap % p.kernel.columns - p.kernel.columns / 2) * g.dilation);
      float sums[kSums] = {};
      correlate_segments<kBlock, kRows, kColumns>(
          sums, p, delta.at(group * g.per_group + lowest, row, column), channels, delta.shape.pitch,
          corner, x.shape.pitch, valid, share);
#pragma unroll
      for (int k = 0; k < kSums; ++k) scratch[k * threads + thread] = sums[k];
    }
    __syncthreads();
    for (int n = thread; n < count * kSums; n += blockDim.x) {
      const int k = n / count, item = n % count;
      const float* const shares = scratch + k * threads + item * p.splits;
      float sum = 0;
#pragma unroll 8
      for (int s = 0; s < p.splits; ++s) sum += shares[s];
      float* const out = to + k * p.items + first + item;
      *out = add ? *out + sum : sum;
    }
  }
}

template <int kBlock>
__device__ void correlate(
    const CorrelationPlan& p, const ConvGeometry& g, const Plane& delta, const Plane& x, int row,
    int column, Size valid, int threads, float* scratch, float* to, bool add) {
  if (p.tap_rows == 3)
    correlate<kBlock, 3, 3>(p, g, delta, x, row, column, valid, threads, scratch, to, add);
  else if (p.tap_columns == 5)
    correlate<kBlock, 1, 5>(p, g, delta, x, row, column, valid, threads, scratch, to, add);
  else if (p.tap_columns == 7)
    correlate<kBlock, 1, 7>(p, g, delta, x, row, column, valid, threads, scratch, to, add);
  else
    correlate<kBlock, 1, 1>(p, g, delta, x, row, column, valid, threads, scratch, to, add);
}

// ---- Backward ----------------------------------------------------------------------------------

template <typename T>
struct ConvBackward {
  ConvBackwardPlan plan;
  ConvGeometry geometry;
  int64_t units;                                         // tiles of all images
  const T *grad_z, *x, *z, *weight, *weight_inv, *bias;  // bias may be null, and z if not needed
  const float *grad_recon, *residual;                    // may be null: no penalty
  T* grad_x;                                             // null where it is not wanted
  float* partials;  // a row a block: both weight gradients and the bias's; null if none is wanted
  bool wants_weight, wants_weight_inv, wants_bias;
  float data_share, penalty_share;
};

// A block owns one tile of one image after the other, all channels, and a row of partial sums. In
// shared memory: grad_z and 2 q e with the margins of the transposed convolutions, from which
// delta_w = data_share grad_z + penalty_share R'(2 q e) and delta_r = 2 q e - grad_x / 2, both
// merged before the weight gradients, and x and y = z - bias with the margins of those. Nothing but
// grad_x and the partial sums is written.
template <int kBlock, typename T>
__global__ void __launch_bounds__(kMaxThreads, 1) conv2d_backward(const ConvBackward<T> p) {
  const ConvBackwardPlan& plan = p.plan;
  const ConvGeometry& g = p.geometry;
  const Size w = plan.weight.kernel, r = plan.weight_inv.kernel;
  const int outputs_w = plan.weight.outputs(kBlock);
  const int outputs_r = plan.weight_inv.outputs(kBlock);
  float* const partials =
      p.partials == nullptr
          ? nullptr
          : p.partials + int64_t{blockIdx.x} * (outputs_w + outputs_r + g.channels);
  const bool penalty = p.grad_recon != nullptr;
  const bool pulls_weight = p.wants_weight && penalty && p.penalty_share != 0;

  Plane grad = {shared_memory(), plan.by_weight_plane, 0, 0};
  Plane x = {grad.data + g.channels * grad.shape.stride, plan.by_weight_plane, 0, 0};
  Plane pull = {x.data + g.channels * x.shape.stride, plan.by_inverse_plane, 0, 0};
  Plane y = {pull.data + g.channels * pull.shape.stride, plan.by_inverse_plane, 0, 0};
  Plane delta_r = {y.data + g.channels * y.shape.stride, plan.tile_plane, 0, 0};
  float* const scratch = shared_memory() + plan.scratch;
  const bool wants_delta_r = p.grad_x != nullptr || p.wants_weight_inv;
  if (wants_delta_r) lay_down<kBlock, true>(plan.by_weight, g, p.weight, plan.weight_pitch);
  if (pulls_weight) lay_down<kBlock, true>(plan.by_inverse, g, p.weight_inv, plan.weight_pitch);

  bool add = false;
  for (int64_t unit = blockIdx.x; unit < p.units; unit += gridDim.x, add = true) {
    const int64_t image = unit / plan.tiles.count();
    const int tile = static_cast<int>(unit % plan.tiles.count());
    const int row = tile / plan.tiles.columns * plan.tile.rows;
    const int column = tile % plan.tiles.columns * plan.tile.columns;
    const Size valid = {
        min(plan.tile.rows, g.height - row), min(plan.tile.columns, g.width - column)};
    grad.row = x.row = row - w.rows / 2 * g.dilation;
    grad.column = x.column = column - w.columns / 2 * g.dilation;
    pull.row = y.row = row - r.rows / 2 * g.dilation;
    pull.column = y.column = column - r.columns / 2 * g.dilation;
    delta_r.row = row;
    delta_r.column = column;

    const int64_t offset = image * g.channels * g.pixels();
    const T *const grad_z = p.grad_z + offset, *const x_image = p.x + offset;
    const float twice_q = penalty ? 2 * p.grad_recon[image] : 0.0f;
    __syncthreads();  // the planes of the last unit are no longer needed
    fill(grad, g, [&](int at, int) { return widen(grad_z[at]); });
    if (penalty) fill(pull, g, [&](int at, int) { return twice_q * p.residual[offset + at]; });
    if (p.wants_weight) fill(x, g, [&](int at, int) { return widen(x_image[at]); });
    if (p.wants_weight_inv)
      fill(y, g, [&](int at, int channel) {
        const float bias = p.bias == nullptr ? 0.0f : widen(p.bias[channel]);
        return widen(p.z[offset + at]) - bias;
      });
    __syncthreads();

    if (p.wants_bias) {
      const int lane = threadIdx.x % kWarp;
      for (int c = threadIdx.x / kWarp; c < g.channels; c += blockDim.x / kWarp) {
        float sum = 0;
        for (int n = lane; n < valid.count(); n += kWarp)
          sum += *grad.at(c, row + n / valid.columns, column + n % valid.columns);
        for (int step = kWarp / 2; step > 0; step /= 2)
          sum += __shfl_xor_sync(0xffffffffu, sum, step);
        float* const out = partials + outputs_w + outputs_r + c;
        if (lane == 0) *out = add ? *out + sum : sum;
      }
    }

    if (wants_delta_r)
      convolve<kBlock, true>(
          plan.by_weight, g, grad, row, column, p.weight, plan.weight_pitch, scratch,
          [&](int channel, int at_row, int at_column, float value) {
            if (at_row - row >= valid.rows || at_column - column >= valid.columns) return;
            const int at = (channel * g.height + at_row) * g.width + at_column;
            if (p.grad_x != nullptr) store(p.grad_x + offset + at, value);
            const float own = penalty ? *pull.at(channel, at_row, at_column) : 0.0f;
            *delta_r.at(channel, at_row, at_column) = own - 0.5f * value;
          });

    // From here on the middle of `grad` holds delta_w: the convolution above was its last reader.
    const auto merge = [&](int channel, int at_row, int at_column, float value) {
      if (at_row - row >= valid.rows || at_column - column >= valid.columns) return;
      float* const here = grad.at(channel, at_row, at_column);
      *here = p.data_share * *here + p.penalty_share * value;
    };
    if (p.wants_weight) {
      if (pulls_weight) {
        convolve<kBlock, true>(
            plan.by_inverse, g, pull, row, column, p.weight_inv, plan.weight_pitch, scratch, merge);
      } else {
        __syncthreads();
        const Positions position(plan.tile);
        for (int n = threadIdx.x; n < g.channels * plan.tile.count(); n += blockDim.x) {
          const Position at = position(n);
          merge(at.channel, row + at.row, column + at.column, 0.0f);
        }
      }
      correlate<kBlock>(
          plan.weight, g, grad, x, row, column, valid, plan.correlating_threads, scratch, partials,
          add);
    }
    if (p.wants_weight_inv)
      correlate<kBlock>(
          plan.weight_inv, g, delta_r, y, row, column, valid, plan.correlating_threads, scratch,
          partials + outputs_w, add);
  }
}

}  // namespace snf

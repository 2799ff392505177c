// The fused kernels of a self-normalizing convolution: one for forward, one for backward, and the
// reduction over backward's blocks. Sums are float32 and in a fixed order. See docs/kernels.md.
#pragma once

#include "../multiplicity.h"
#include "conv2d_plan.h"
#include "device.cuh"

namespace snf {

// put(get(n)) for n < count, shared out to the block's threads. Each thread gets several before it
// puts the first, so that the waits for memory overlap.
template <int kBatch, typename Get, typename Put>
__device__ void in_batches(int count, const Get& get, const Put& put) {
  const int step = blockDim.x;
  for (int first = threadIdx.x; first < count; first += kBatch * step) {
    decltype(get(0)) batch[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (first + i * step < count) batch[i] = get(first + i * step);
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (first + i * step < count) put(batch[i]);
  }
}

// ---- Planes: a region of one image in shared memory, all channels ------------------------------

struct Plane {
  float* data;
  PlaneShape shape;
  int row, column;  // where its first element lies in the image, perhaps outside

  __device__ float* at(int channel, int image_row, int image_column) const {
    return data + channel * shape.stride + (image_row - row) * shape.pitch + image_column - column;
  }
};

// How the kernels see the layer: its shape, and divisions by the sizes of planes.
struct ConvGeometry {
  int channels, per_group, height, width, dilation;
  bool circular;
  __device__ int pixels() const { return height * width; }
};

// Takes apart n = (channel * rows + row) * columns + column.
struct Position {
  int channel, row, column;
};
struct Positions {
  SmallDivider rows, columns;
  __device__ explicit Positions(Size size) : rows(size.rows), columns(size.columns) {}
  __device__ Position operator()(int n) const {
    Position at;
    int rest;
    at.column = columns.split(n, rest);
    at.row = rows.split(rest, at.channel);
    return at;
  }
};

// The position in the image if there is one: inside, or wrapped.
__device__ inline bool inside(const ConvGeometry& g, int& row, int& column) {
  if (g.circular) {
    row = ((row % g.height) + g.height) % g.height;
    column = ((column % g.width) + g.width) % g.width;
    return true;
  }
  return static_cast<unsigned>(row) < static_cast<unsigned>(g.height) &&
         static_cast<unsigned>(column) < static_cast<unsigned>(g.width);
}

// Fills a plane with value(offset in the image, channel), zero outside.
template <typename Value>
__device__ void fill(const Plane& plane, const ConvGeometry& g, const Value& value) {
  struct Pixel {
    float value;
    int place;
  };
  const Positions position(plane.shape.size);
  in_batches<8>(
      g.channels * plane.shape.size.count(),
      [&](int n) {
        const Position at = position(n);
        int row = plane.row + at.row, column = plane.column + at.column;
        const bool real = inside(g, row, column);
        const int offset = (at.channel * g.height + row) * g.width + column;
        return Pixel{
            real ? value(offset, at.channel) : 0.0f,
            at.channel * plane.shape.stride + at.row * plane.shape.pitch + at.column};
      },
      [&](const Pixel& pixel) { plane.data[pixel.place] = pixel.value; });
}

// ---- Convolution of a plane --------------------------------------------------------------------

// Lays down the weights of a chunk of input channels, [input channel][tap][output channel] with
// whole blocks of output channels. Transposed: channels swapped within their group, taps reversed.
template <int kBlock, bool kTransposed, typename T>
__device__ void stage_weights(
    const T* __restrict__ weight, const ConvGeometry& g, int taps, int first, int count, int pitch,
    float* __restrict__ to) {
  struct Weights {
    float of[kBlock];
    int place;
  };
  const int blocks_a_group = (g.per_group + kBlock - 1) / kBlock;
  const int blocks = g.channels / g.per_group * blocks_a_group;
  const SmallDivider by_taps(taps), by_inner(kTransposed ? blocks : count),
      by_group(blocks_a_group);
  in_batches<4>(
      count * taps * blocks,
      [&](int n) {
        // In the order of the weights in memory, whichever way they are read.
        int rest, outer, group;
        const int tap = by_taps.split(n, rest), inner = by_inner.split(rest, outer);
        const int block = kTransposed ? inner : outer, input = kTransposed ? outer : inner;
        const int lowest = by_group.split(block, group) * kBlock;
        Weights weights;
#pragma unroll
        for (int k = 0; k < kBlock; ++k) {
          const int out = lowest + k, in = first + input;
          const int row = group * g.per_group + (kTransposed ? in : out);
          weights.of[k] =
              out < g.per_group
                  ? widen(weight[(row * g.per_group + (kTransposed ? out : in)) * taps + tap])
                  : 0.0f;
        }
        weights.place =
            (input * taps + (kTransposed ? taps - 1 - tap : tap)) * pitch + block * kBlock;
        return weights;
      },
      [&](const Weights& weights) {
        float* const out = to + weights.place;
        if constexpr (kBlock == 4)
          *reinterpret_cast<float4*>(out) =
              make_float4(weights.of[0], weights.of[1], weights.of[2], weights.of[3]);
        else
          for (int k = 0; k < kBlock; ++k) out[k] = weights.of[k];
      });
}

template <int kBlock>
__device__ void multiply(
    float (&sums)[kStrip][kBlock], const float (&column)[kStrip], const float* weights) {
  float w[kBlock];
  if constexpr (kBlock == 4) {
    const float4 four = *reinterpret_cast<const float4*>(weights);
    w[0] = four.x, w[1] = four.y, w[2] = four.z, w[3] = four.w;
  } else {
    for (int k = 0; k < kBlock; ++k) w[k] = weights[k];
  }
#pragma unroll
  for (int p = 0; p < kStrip; ++p)
#pragma unroll
    for (int k = 0; k < kBlock; ++k) sums[p][k] += column[p] * w[k];
}

// Adds one input channel to the sums of a strip; a column of the strip's window is read once for
// all taps in it.
template <int kBlock, int kTaps>
__device__ void add_square(
    float (&sums)[kStrip][kBlock], const float* window, int window_pitch, const float* weights,
    int weight_pitch) {
#pragma unroll
  for (int b = 0; b < kTaps; ++b) {
    float column[kStrip + kTaps - 1];
#pragma unroll
    for (int p = 0; p < kStrip + kTaps - 1; ++p) column[p] = window[p * window_pitch + b];
#pragma unroll
    for (int a = 0; a < kTaps; ++a) {
      const float part[kStrip] = {column[a], column[a + 1], column[a + 2], column[a + 3]};
      multiply<kBlock>(sums, part, weights + (a * kTaps + b) * weight_pitch);
    }
  }
}

template <int kBlock>
__device__ void add_any(
    float (&sums)[kStrip][kBlock], const float* window, int window_pitch, const float* weights,
    int weight_pitch, Size kernel, int dilation) {
  for (int a = 0; a < kernel.rows; ++a)
    for (int b = 0; b < kernel.columns; ++b) {
      const float* corner = window + a * dilation * window_pitch + b * dilation;
      float column[kStrip];
#pragma unroll
      for (int p = 0; p < kStrip; ++p) column[p] = corner[p * window_pitch];
      multiply<kBlock>(sums, column, weights + (a * kernel.columns + b) * weight_pitch);
    }
}

// out(position, value) for every element of the region that starts at (row, column) of the image:
// the convolution of `in` there. All threads of the block call it; they may use what `out` wrote
// after the next barrier. `scratch` holds each share's sums, and before them the chunks of weights
// that are not laid down already.
template <int kBlock, bool kTransposed, typename T, typename Out>
__device__ void convolve(
    const ConvolutionPlan& p, const ConvGeometry& g, const Plane& in, int row, int column,
    const T* weight, int weight_pitch, float* scratch, const Out& out) {
  float* const staged = shared_memory() + p.weights;
  const int thread = threadIdx.x, taps = p.kernel.count();
  const int strips = (p.out.rows + kStrip - 1) / kStrip;
  const int blocks_a_group = (g.per_group + kBlock - 1) / kBlock;
  const bool works = thread < p.items * p.splits;
  const int share = thread / p.items, item = thread % p.items;
  const int at_column = item % p.out.columns, at_row = item / p.out.columns % strips * kStrip;
  const int block = item / p.out.columns / strips;
  const int group = block / blocks_a_group, lowest = block % blocks_a_group * kBlock;
  // The window of the strip's first pixel starts the margin before it.
  const float* const window = in.at(
      group * g.per_group, row + at_row - p.kernel.rows / 2 * g.dilation,
      column + at_column - p.kernel.columns / 2 * g.dilation);
  const bool square = p.kernel.rows == p.kernel.columns && g.dilation == 1;

  float sums[kStrip][kBlock] = {};
  for (int first = 0; first < g.per_group; first += p.chunk) {
    const int count = min(p.chunk, g.per_group - first);
    __syncthreads();  // the plane is there, and nobody needs the scratch memory any more
    if (!p.laid_down) {
      stage_weights<kBlock, kTransposed>(weight, g, taps, first, count, weight_pitch, staged);
      __syncthreads();
    }
    if (!works) continue;
    for (int i = share; i < count; i += p.splits) {
      const float* const from = window + (first + i) * in.shape.stride;
      const float* const weights = staged + i * taps * weight_pitch + block * kBlock;
      const int pitch = in.shape.pitch;
      if (square && p.kernel.rows == 3)
        add_square<kBlock, 3>(sums, from, pitch, weights, weight_pitch);
      else if (square && p.kernel.rows == 5)
        add_square<kBlock, 5>(sums, from, pitch, weights, weight_pitch);
      else if (square && p.kernel.rows == 7)
        add_square<kBlock, 7>(sums, from, pitch, weights, weight_pitch);
      else if (square && p.kernel.rows == 1)
        add_square<kBlock, 1>(sums, from, pitch, weights, weight_pitch);
      else
        add_any<kBlock>(sums, from, pitch, weights, weight_pitch, p.kernel, g.dilation);
    }
  }

  __syncthreads();
  const int outputs = g.channels * p.out.count();
  if (works) {
#pragma unroll
    for (int k = 0; k < kBlock; ++k) {
      if (lowest + k >= g.per_group) continue;
      const int channel = group * g.per_group + lowest + k;
      float* const to =
          scratch + share * outputs + (channel * p.out.rows + at_row) * p.out.columns + at_column;
#pragma unroll
      for (int s = 0; s < kStrip; ++s)
        if (at_row + s < p.out.rows) to[s * p.out.columns] = sums[s][k];
    }
  }
  __syncthreads();
  const Positions position(p.out);
  for (int n = thread; n < outputs; n += blockDim.x) {
    float sum = 0;
#pragma unroll 4
    for (int s = 0; s < p.splits; ++s) sum += scratch[n + s * outputs];
    const Position at = position(n);
    out(at.channel, row + at.row, column + at.column, sum);
  }
}

// Lays down the weights of a convolution before it begins, if there is room for all of them.
template <int kBlock, bool kTransposed, typename T>
__device__ void lay_down(
    const ConvolutionPlan& p, const ConvGeometry& g, const T* weight, int weight_pitch) {
  if (p.laid_down)
    stage_weights<kBlock, kTransposed>(
        weight, g, p.kernel.count(), 0, g.per_group, weight_pitch, shared_memory() + p.weights);
}

// ---- Forward -----------------------------------------------------------------------------------

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

// ---- Reduction ---------------------------------------------------------------------------------

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

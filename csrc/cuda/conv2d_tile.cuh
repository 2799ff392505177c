// What the fused convolution kernels do with a tile of one image in shared memory: fill planes and
// convolve them. Sums are float32 and in a fixed order. See docs/kernels.md.
#pragma once

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

}  // namespace snf

// How the fused convolution kernels divide the work: tiles, threads, shared memory. Host code that
// knows neither torch nor CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../host_device.h"

namespace snf {

struct DeviceLimits {
  int shared_bytes;     // that one block may ask for
  int multiprocessors;  // so many blocks run at once at the least
  int threads = 512;    // of one block; the kernels are compiled for at most kMaxThreads
};
constexpr int kMaxThreads = 512;

struct Size {
  int rows, columns;
  SNF_HOST_DEVICE int count() const { return rows * columns; }
};

struct ConvShape {
  int64_t batch;
  int channels, per_group;
  Size image, weight, weight_inv;
  int dilation;
  bool circular;
  int groups() const { return channels / per_group; }
};

// Rows of one column that a thread computes at once, and channels of one group if there are enough.
constexpr int kStrip = 4;
constexpr int kChannelBlock = 4;

// One image plane a channel in shared memory: a region of the image and its margins.
struct PlaneShape {
  Size size;
  int pitch, stride;  // from row to row, from channel to channel; odd, against bank conflicts
};

// One convolution of a block: every thread sums `kStrip` rows times a block of channels over a
// share of the input channels. The weights of all input channels are laid down before the kernel
// begins where there is room, or else in chunks of as many as there is room for.
struct ConvolutionPlan {
  Size out, kernel;
  int items, splits, chunk;
  bool laid_down;
  int weights;  // where they lie in shared memory, in floats
};

// One weight gradient of a block. A thread sums `tap_rows x tap_columns` taps for a block of output
// channels and one input channel over a share of the image's row segments.
struct CorrelationPlan {
  Size kernel;
  int tap_rows, tap_columns, tap_groups;
  int items, splits, segments, segment_length;
  SNF_HOST_DEVICE int sums(int block) const { return block * tap_rows * tap_columns; }
  SNF_HOST_DEVICE int outputs(int block) const { return items * sums(block); }
};

struct ConvForwardPlan {
  bool fits = false;
  int block;              // channels that a thread takes at once
  Size tile, tiles, pad;  // pad: of y around the tile, computed for the residual's margins
  PlaneShape x, y;
  ConvolutionPlan by_weight, by_inverse;
  int weight_pitch, threads;
  int scratch, shared_floats;  // of shared memory: where the scratch area begins, and all of it
};

struct ConvBackwardPlan {
  bool fits = false;
  int block;
  Size tile, tiles;
  PlaneShape by_weight_plane, by_inverse_plane, tile_plane;
  ConvolutionPlan by_weight, by_inverse;  // both transposed
  CorrelationPlan weight, weight_inv;
  int weight_pitch, threads, correlating_threads, blocks;
  int scratch, shared_floats;
  // Floats that each block leaves for the reduction: both weight gradients and the bias's.
  int partial_floats(int channels) const {
    return weight.outputs(block) + weight_inv.outputs(block) + channels;
  }
};

namespace plan {

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
inline int round_up(int a, int b) { return divide_up(a, b) * b; }

// What follows starts where vectors of four floats may.
inline int64_t whole_vectors(int64_t floats) { return (floats + 3) / 4 * 4; }

inline Size margin(Size kernel, int dilation) {
  return {kernel.rows / 2 * dilation, kernel.columns / 2 * dilation};
}

// Planes of a region; the rows below it that the last strips read are part of them.
inline PlaneShape plane(Size region, Size margin, int strip = kStrip) {
  const Size size = {
      round_up(region.rows, strip) + 2 * margin.rows, region.columns + 2 * margin.columns};
  const int pitch = size.columns | 1;
  return {size, pitch, (size.rows * pitch) | 1};
}

inline int channel_block(const ConvShape& s) {
  return s.per_group >= kChannelBlock - 1 ? kChannelBlock : 1;
}

inline int channel_blocks(const ConvShape& s, int block) {
  return s.groups() * divide_up(s.per_group, block);
}

// From one row of staged weights to the next: whole blocks of channels, an odd number of them, so
// that neighbouring rows fall into other banks.
inline int weight_pitch(const ConvShape& s, int block) {
  return (channel_blocks(s, block) | 1) * block;
}

inline ConvolutionPlan convolution(
    const ConvShape& s, int block, Size out, Size kernel, int threads) {
  ConvolutionPlan p = {out, kernel, 0, 1, 1, false, 0};
  p.items = channel_blocks(s, block) * divide_up(out.rows, kStrip) * out.columns;
  const int most = std::clamp(threads / std::max(p.items, 1), 1, s.per_group);
  p.splits = divide_up(s.per_group, divide_up(s.per_group, most));
  return p;
}

inline int partial_floats(const ConvolutionPlan& p, const ConvShape& s) {
  return p.splits * s.channels * p.out.count();
}

// Shares out the shared memory behind the planes: both weights and `least` floats of scratch if
// that fits in `floats`, or else a scratch area that holds the weights in chunks. Returns the
// scratch area's size, 0 if there is no way.
inline int64_t lay_out(
    ConvolutionPlan& a, ConvolutionPlan& b, const ConvShape& s, int pitch, int64_t planes,
    int64_t least, int64_t floats) {
  least = std::max<int64_t>({least, partial_floats(a, s), partial_floats(b, s)});
  const int64_t channel_a = int64_t{a.kernel.count()} * pitch;
  const int64_t channel_b = int64_t{b.kernel.count()} * pitch;
  const int64_t whole_a = whole_vectors(channel_a * s.per_group);
  const int64_t whole_b = whole_vectors(channel_b * s.per_group);
  a.laid_down = b.laid_down = planes + whole_a + whole_b + least <= floats;
  if (a.laid_down) {
    a.chunk = b.chunk = s.per_group;
    a.weights = static_cast<int>(planes);
    b.weights = static_cast<int>(planes + whole_a);
    return least;
  }
  const int64_t room = std::max<int64_t>(floats - planes, 0);
  a.chunk = static_cast<int>(std::min<int64_t>(s.per_group, room / channel_a));
  b.chunk = static_cast<int>(std::min<int64_t>(s.per_group, room / channel_b));
  if (a.chunk == 0 || b.chunk == 0 || least > room) return 0;
  a.weights = b.weights = static_cast<int>(planes);
  return std::max({least, a.chunk * channel_a, b.chunk * channel_b});
}

// Where the scratch area begins.
inline int scratch_start(
    const ConvolutionPlan& a, const ConvolutionPlan& b, const ConvShape& s, int pitch) {
  if (!a.laid_down) return a.weights;
  return b.weights +
         static_cast<int>(whole_vectors(int64_t{b.kernel.count()} * pitch * s.per_group));
}

inline CorrelationPlan correlation(
    const ConvShape& s, int block, Size kernel, Size tile, int threads) {
  CorrelationPlan p = {};
  p.kernel = kernel;
  p.tap_rows = p.tap_columns = 1;
  const bool square = kernel.rows == kernel.columns && s.dilation == 1;
  if (square && kernel.rows == 3) p.tap_rows = p.tap_columns = 3;
  if (square && (kernel.rows == 5 || kernel.rows == 7)) p.tap_columns = kernel.columns;
  p.tap_groups = kernel.count() / (p.tap_rows * p.tap_columns);
  p.items = channel_blocks(s, block) * s.per_group * p.tap_groups;
  // More shares than that cost more to add up than they save.
  const int wanted = std::clamp(threads / p.items, 1, 64);
  const int most = std::max(1, tile.columns / 4);
  p.segments = std::clamp(divide_up(wanted, tile.rows), 1, most);
  p.segment_length = divide_up(tile.columns, p.segments);
  const int units = tile.rows * p.segments;
  p.splits = divide_up(units, divide_up(units, std::min(wanted, units)));
  return p;
}

// The floats of shared memory that one block should take: two blocks on a multiprocessor where
// there are more blocks than multiprocessors, and all of it where two do not fit.
inline int64_t shared_budget(int64_t blocks, const DeviceLimits& limits, bool alone) {
  return limits.shared_bytes / (alone || blocks <= limits.multiprocessors ? 4 : 8);
}

inline bool forward_tile(
    ConvForwardPlan& p, const ConvShape& s, const DeviceLimits& limits, bool alone) {
  const Size by_weight = margin(s.weight, s.dilation),
             by_inverse = margin(s.weight_inv, s.dilation);
  // Past the border y is zero and need not be computed, unless it goes round.
  p.pad = {
      p.tiles.rows == 1 && !s.circular ? 0 : by_inverse.rows,
      p.tiles.columns == 1 && !s.circular ? 0 : by_inverse.columns};
  const Size region = {p.tile.rows + 2 * p.pad.rows, p.tile.columns + 2 * p.pad.columns};
  p.by_weight = convolution(s, p.block, region, s.weight, limits.threads);
  p.by_inverse = convolution(s, p.block, p.tile, s.weight_inv, limits.threads);
  if (std::max(p.by_weight.items, p.by_inverse.items) > limits.threads) return false;
  p.x = plane(region, by_weight);
  p.y = plane(p.tile, by_inverse);
  const int64_t planes = whole_vectors(int64_t{s.channels} * (p.x.stride + p.y.stride));
  p.threads = round_up(
      std::max(p.by_weight.items * p.by_weight.splits, p.by_inverse.items * p.by_inverse.splits),
      32);
  const int64_t budget = shared_budget(s.batch * p.tiles.count(), limits, alone);
  const int64_t scratch =
      lay_out(p.by_weight, p.by_inverse, s, p.weight_pitch, planes, p.threads, budget);
  if (scratch == 0) return false;
  p.scratch = scratch_start(p.by_weight, p.by_inverse, s, p.weight_pitch);
  p.shared_floats = p.scratch + static_cast<int>(scratch);
  return true;
}

inline bool backward_tile(
    ConvBackwardPlan& p, const ConvShape& s, const DeviceLimits& limits, bool alone) {
  p.by_weight = convolution(s, p.block, p.tile, s.weight, limits.threads);
  p.by_inverse = convolution(s, p.block, p.tile, s.weight_inv, limits.threads);
  if (std::max(p.by_weight.items, p.by_inverse.items) > limits.threads) return false;
  p.by_weight_plane = plane(p.tile, margin(s.weight, s.dilation));
  p.by_inverse_plane = plane(p.tile, margin(s.weight_inv, s.dilation));
  p.tile_plane = plane(p.tile, {0, 0}, 1);
  const int64_t planes = whole_vectors(
      int64_t{s.channels} *
      (2 * p.by_weight_plane.stride + 2 * p.by_inverse_plane.stride + p.tile_plane.stride));
  const int computing =
      std::max(p.by_weight.items * p.by_weight.splits, p.by_inverse.items * p.by_inverse.splits);
  // Few channels leave threads for more shares of the image in the weight gradients.
  p.threads = round_up(std::max(computing, std::min(256, limits.threads)), 32);
  const int64_t units = s.batch * p.tiles.count();
  const int64_t budget = shared_budget(units, limits, alone);
  int64_t scratch = 0;
  for (p.correlating_threads = p.threads; scratch == 0; p.correlating_threads /= 2) {
    if (p.correlating_threads < 32) return false;
    p.weight = correlation(s, p.block, s.weight, p.tile, p.correlating_threads);
    p.weight_inv = correlation(s, p.block, s.weight_inv, p.tile, p.correlating_threads);
    const int64_t sums = int64_t{p.correlating_threads} *
                         std::max(p.weight.sums(p.block), p.weight_inv.sums(p.block));
    scratch = lay_out(p.by_weight, p.by_inverse, s, p.weight_pitch, planes, sums, budget);
    if (scratch != 0) break;
  }
  p.scratch = scratch_start(p.by_weight, p.by_inverse, s, p.weight_pitch);
  p.shared_floats = p.scratch + static_cast<int>(scratch);
  // So many that run at once on one multiprocessor, with its 64 K registers and 128 a thread.
  const int resident =
      std::clamp(limits.shared_bytes / (p.shared_floats * 4), 1, std::max(1, 512 / p.threads));
  p.blocks = static_cast<int>(std::min<int64_t>(units, int64_t{limits.multiprocessors} * resident));
  return true;
}

// Past this many weights the fused kernels lose to the vendor's convolutions: each block leaves its
// gradients of all weights to the reduction, and matrix kernels pay off (docs/kernels.md).
constexpr int64_t kMostWeights = 24 * 1024;

// Whether the fused kernels are the better way and their 32-bit offsets within an image suffice.
inline bool suitable(const ConvShape& s) {
  for (const Size& kernel : {s.weight, s.weight_inv}) {
    if (int64_t{s.channels} * s.per_group * kernel.rows * kernel.columns > kMostWeights)
      return false;
    if (int64_t{std::max(kernel.rows, kernel.columns)} * s.dilation > 1024) return false;
  }
  return int64_t{s.channels} * s.image.rows * s.image.columns <= INT32_MAX / 2;
}

// The whole image if it fits, or else tiles, halved along the longer side until they do.
template <typename Plan, typename Fits>
Plan choose(const ConvShape& s, const DeviceLimits& limits, const Fits& fits) {
  Plan p;
  if (!suitable(s)) return p;
  p.block = channel_block(s);
  p.weight_pitch = weight_pitch(s, p.block);
  for (const bool alone : {false, true}) {
    p.tiles = {1, 1};
    for (;;) {
      p.tile = {divide_up(s.image.rows, p.tiles.rows), divide_up(s.image.columns, p.tiles.columns)};
      p.tiles = {divide_up(s.image.rows, p.tile.rows), divide_up(s.image.columns, p.tile.columns)};
      p.fits = fits(p, s, limits, alone);
      if (p.fits) return p;
      if (!alone && s.batch * p.tiles.count() > limits.multiprocessors) break;
      if (p.tile.count() == 1) return p;
      int& longer = p.tile.rows >= p.tile.columns ? p.tiles.rows : p.tiles.columns;
      longer *= 2;
    }
  }
  return p;
}

}  // namespace plan

inline ConvForwardPlan plan_forward(const ConvShape& s, const DeviceLimits& limits) {
  return plan::choose<ConvForwardPlan>(s, limits, plan::forward_tile);
}

inline ConvBackwardPlan plan_backward(const ConvShape& s, const DeviceLimits& limits) {
  return plan::choose<ConvBackwardPlan>(s, limits, plan::backward_tile);
}

}  // namespace snf

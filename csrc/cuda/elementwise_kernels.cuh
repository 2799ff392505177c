// The element-wise drivers: one kernel forward, one backward, over the operators of
// csrc/elementwise_math.h. See docs/kernels.md.
#pragma once

#include "../elementwise_math.h"
#include "device.cuh"
#include "elementwise.h"

namespace snf {

constexpr int kElementThreads = 256;

// The largest over the block's threads; as block_sum, but only thread 0 gets it.
__device__ inline int block_largest(int value, int* scratch) {
  for (int step = kWarp / 2; step > 0; step /= 2)
    value = max(value, __shfl_xor_sync(0xffffffffu, value, step));
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 1; warp < kElementThreads / kWarp; ++warp) value = max(value, scratch[warp]);
  return value;
}

// Where one transformed element's parameters are.
__device__ inline int64_t place(const Places& p, int64_t sample, int run, int i) {
  return sample * p.sample + run * p.run + i * p.stride;
}

// A block owns a part of a sample and leaves its sum of log_slope, and its most iterations.
template <typename Op, typename T>
__global__ void __launch_bounds__(kElementThreads, 4) elementwise_forward_step(
    const Op op, const ElementwiseForward<T, Wide<T>> p, const Divider by_length, int parts) {
  using W = Wide<T>;
  const int64_t sample = blockIdx.x / parts;
  const int event = static_cast<int>(p.shape.event()), kept = static_cast<int>(p.shape.kept);
  const int length = static_cast<int>(p.shape.length);
  const int begin = static_cast<int>(blockIdx.x % parts) * kSamplePart;
  const int end = begin + min(kSamplePart, event - begin);
  const int64_t offset = sample * event;
  W sum = 0;
  int most = 0;
  for (int e = begin + static_cast<int>(threadIdx.x); e < end; e += kElementThreads) {
    W x = widen(p.x[offset + e]);
    if (e < kept) {
      store(p.y + offset + e, x);
      continue;
    }
    W first = 0, second = 0;
    if constexpr (Op::kParameters) {
      const int run = by_length(e - kept), i = e - kept - run * length;
      const int64_t at = place(p.shape.parameters, sample, run, i);
      first = widen(p.first[at]);
      second = widen(p.second[at]);
    }
    if constexpr (Op::kSolves) {
      Search<W> s = op.start(x);
      int iterations = 1;
      while (op.advance(x, s.low, s.high, s.x) && iterations < Op::kMost) ++iterations;
      most = max(most, iterations);
      x = s.x;
    }
    const Value<W> value = op.forward(x, first, second);
    if constexpr (Op::kOutput) store(p.y + offset + e, value.y);
    sum += value.log_slope;
  }
  W* const scratch = reinterpret_cast<W*>(shared_memory());
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) p.log_abs_det[blockIdx.x] = sum;
  if constexpr (Op::kSolves) {
    __syncthreads();
    most = block_largest(most, reinterpret_cast<int*>(scratch));
    if (threadIdx.x == 0) p.iterations[blockIdx.x] = most;
  }
}

// A block owns a part of a sample; nothing is summed.
template <typename Op, typename T>
__global__ void __launch_bounds__(kElementThreads, 4) elementwise_backward_step(
    const Op op, const ElementwiseBackward<T, Wide<T>> p, const Divider by_length, int parts) {
  using W = Wide<T>;
  const int64_t sample = blockIdx.x / parts;
  const int event = static_cast<int>(p.shape.event()), kept = static_cast<int>(p.shape.kept);
  const int length = static_cast<int>(p.shape.length);
  const int begin = static_cast<int>(blockIdx.x % parts) * kSamplePart;
  const int end = begin + min(kSamplePart, event - begin);
  const int64_t offset = sample * event;
  const W g = p.grad_log_abs_det == nullptr ? W(0) : p.grad_log_abs_det[sample];
  for (int e = begin + static_cast<int>(threadIdx.x); e < end; e += kElementThreads) {
    const W dy = Op::kOutput ? widen(p.grad_y[offset + e]) : W(0);
    if (e < kept) {
      if (p.grad_x != nullptr) store(p.grad_x + offset + e, dy);
      continue;
    }
    const W x = widen(p.x[offset + e]);
    if constexpr (Op::kParameters) {
      const int run = by_length(e - kept), i = e - kept - run * length;
      const int64_t at = place(p.shape.parameters, sample, run, i);
      const Gradients<W> to = op.backward(x, widen(p.first[at]), widen(p.second[at]), dy, g);
      if (p.grad_x != nullptr) store(p.grad_x + offset + e, to.x);
      if (p.grad_first != nullptr) {
        const int64_t there = place(p.shape.gradients, sample, run, i);
        store(p.grad_first + there, to.first);
        store(p.grad_second + there, to.second);
      }
    } else {
      store(p.grad_x + offset + e, op.backward(x, W(0), W(0), dy, g).x);
    }
  }
}

// How the samples of one channel are shared out between blocks.
struct ChannelBlocks {
  int64_t channels, pixels, each;  // each: samples that a block takes
};

// A block owns a channel of a share of the samples, and leaves its two sums: all first, then all
// second, [shares, channels] each.
template <typename Op, typename T>
__global__ void __launch_bounds__(kElementThreads, 4) channel_backward_step(
    const Op op, const ElementwiseBackward<T, Wide<T>> p, const ChannelBlocks blocks,
    const Divider by_pixels, int64_t shares, Wide<T>* sums) {
  using W = Wide<T>;
  const int64_t channel = blockIdx.x % blocks.channels, share = blockIdx.x / blocks.channels;
  const int64_t first_sample = share * blocks.each;
  const int64_t left = p.shape.samples - first_sample;
  const int samples = static_cast<int>(left < blocks.each ? left : blocks.each);
  const int pixels = static_cast<int>(blocks.pixels);
  const W first = widen(p.first[channel]), second = widen(p.second[channel]);
  W sum_first = 0, sum_second = 0;
  for (int n = static_cast<int>(threadIdx.x); n < samples * pixels; n += kElementThreads) {
    const int b = by_pixels(n);
    const int64_t sample = first_sample + b;
    const int64_t at = (sample * blocks.channels + channel) * pixels + (n - b * pixels);
    const W g = p.grad_log_abs_det == nullptr ? W(0) : p.grad_log_abs_det[sample];
    const Gradients<W> to = op.backward(widen(p.x[at]), first, second, widen(p.grad_y[at]), g);
    if (p.grad_x != nullptr) store(p.grad_x + at, to.x);
    sum_first += to.first;
    sum_second += to.second;
  }
  W* const scratch = reinterpret_cast<W*>(shared_memory());
  sum_first = block_sum(sum_first, scratch);
  __syncthreads();
  sum_second = block_sum(sum_second, scratch);
  if (threadIdx.x != 0) return;
  sums[blockIdx.x] = sum_first;
  sums[shares * blocks.channels + blockIdx.x] = sum_second;
}

// A thread owns one channel of one parameter and adds up the shares in order.
template <typename T>
__global__ void __launch_bounds__(kElementThreads, 4)
    channel_finish(const Wide<T>* sums, int64_t channels, int64_t shares, T* first, T* second) {
  const int64_t n = int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
  if (n >= 2 * channels) return;
  const int64_t parameter = n / channels, channel = n % channels;
  const Wide<T>* const from = sums + parameter * shares * channels + channel;
  Wide<T> sum = 0;
  for (int64_t share = 0; share < shares; ++share) sum += from[share * channels];
  store((parameter == 0 ? first : second) + channel, sum);
}

}  // namespace snf

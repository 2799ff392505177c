// Substitution for triangular convolutions. See docs/kernels.md.
#pragma once

#include "device.cuh"
#include "triangular_conv2d.h"

namespace snf {

constexpr int kMostWaveWarps = 16;

// A block owns an image. A pixel waits for those above and to its left, so all pixels of one
// anti-diagonal are solved at once, a warp a pixel, its lanes 32 output channels at a time.
template <typename T>
__global__ void __launch_bounds__(kMostWaveWarps* kWarp, 1)
    triangular_wavefronts(const TriangularArguments<T> p) {
  using W = Wide<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int pixels = p.height * p.width, size = pixels * p.channels;
  const int64_t image = int64_t{blockIdx.x} * size;
  W* const solved =  // [pixel][channel]
      p.workspace == nullptr ? reinterpret_cast<W*>(shared_memory()) : p.workspace + image;
  const int own_tap = p.rows * p.columns - 1;
  const W* const own = p.weight + int64_t{own_tap} * p.channels * p.channels;

  for (int wave = 0; wave < p.height + p.width - 1; ++wave) {
    const int top = max(0, wave - p.width + 1), count = min(wave, p.height - 1) - top + 1;
    for (int start = 0; start < count; start += warps) {
      const int row = top + start + warp, column = wave - row;
      const bool works = start + warp < count;
      W* const here = solved + int64_t{row * p.width + column} * p.channels;
      for (int first = 0; first < p.channels; first += kWarp) {
        if (works) {  // the same for a whole warp
          const int co = first + lane, together = min(kWarp, p.channels - first);
          const bool mine = lane < together;
          const int place = co * pixels + row * p.width + column;
          const int64_t at = image + (p.reversed ? size - 1 - place : place);
          W sum = mine ? widen(p.z[at]) : W(0);
          for (int a = max(0, p.rows - 1 - row); a < p.rows; ++a)
            for (int b = max(0, p.columns - 1 - column); b < p.columns; ++b) {
              const int tap = a * p.columns + b;
              const int behind = (p.rows - 1 - a) * p.width + p.columns - 1 - b;
              const W* const in = here - int64_t{behind} * p.channels;
              const W* const w = p.weight + int64_t{tap} * p.channels * p.channels + co;
              // Of its own channels a pixel knows those of the rounds before.
              const int known = tap == own_tap ? first : p.channels;
              if (mine)
                for (int ci = 0; ci < known; ++ci) sum -= w[int64_t{ci} * p.channels] * in[ci];
            }
          for (int j = 0; j < together; ++j) {
            const W* const w = own + int64_t{first + j} * p.channels + first;
            const W value = __shfl_sync(0xffffffffu, sum, j) / w[j];
            if (lane == j) sum = value;
            if (lane > j && mine) sum -= w[lane] * value;
          }
          if (mine) {
            here[co] = sum;
            store(p.x + at, sum);
          }
        }
        __syncthreads();  // these channels are there for the next, and for the next wave
      }
    }
  }
}

}  // namespace snf

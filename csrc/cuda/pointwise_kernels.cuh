// What stands between the products of a layer step that the vendor's libraries compute: the linear
// layer, and convolutions of many channels. Rows are samples. See docs/kernels.md.
#pragma once

#include "device.cuh"
#include "pointwise.h"

namespace snf {

constexpr int kRowThreads = 256;
constexpr int kTile = 32;

// The elements of one row that a block works on.
struct RowPart {
  int64_t row;
  int begin, end;
  __device__ RowPart(unsigned part, unsigned parts, int columns) {
    row = part / parts;
    begin = static_cast<int>(part % parts) * kRowPart;
    end = begin + min(kRowPart, columns - begin);
  }
};

// A block owns a part of a row: residual = R y - x if there is R y, z = y + bias, and its share of
// recon.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4)
    residual_step(const ResidualArguments<T> p, Divider period, int parts, Wide<T>* recon) {
  using W = Wide<T>;
  const RowPart part(blockIdx.x, parts, p.columns);
  const int64_t offset = part.row * p.columns;
  W squares = 0;
  for (int i = part.begin + static_cast<int>(threadIdx.x); i < part.end; i += kRowThreads) {
    const W bias = p.bias == nullptr ? W(0) : widen(p.bias[period(i)]);
    store(p.z + offset + i, p.y[offset + i] + bias);
  }
  if (p.reconstruction != nullptr)  // a loop of its own takes fewer registers than a branch in one
    for (int i = part.begin + static_cast<int>(threadIdx.x); i < part.end; i += kRowThreads) {
      const W error = p.reconstruction[offset + i] - widen(p.x[offset + i]);
      p.residual[offset + i] = error;
      squares += error * error;
    }
  squares = block_sum(squares, reinterpret_cast<W*>(shared_memory()));
  if (threadIdx.x != 0) return;
  recon[blockIdx.x] = squares;
  if (part.begin == 0) p.log_det[part.row] = 0;
}

// out[row] = sum of in[row, :]. A warp owns a row.
template <typename W>
__global__ void __launch_bounds__(kRowThreads, 4)
    sum_rows(const W* in, int columns, W* out, int64_t rows) {
  const int64_t row = (int64_t{blockIdx.x} * kRowThreads + threadIdx.x) / kWarp;
  if (row >= rows) return;
  W sum = 0;
  for (int i = threadIdx.x % kWarp; i < columns; i += kWarp) sum += in[row * columns + i];
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % kWarp == 0) out[row] = sum;
}

// The blocks of the kernel below, in this order.
struct DeltaBlocks {
  unsigned rows, transposes, sums;
  unsigned parts, tiles;  // of a row, of a matrix's side
};

template <typename T>
__device__ void deltas_of_row(
    const DeltaArguments<T>& p, const Divider& period, const RowPart& part) {
  using W = Wide<T>;
  const int64_t offset = part.row * p.columns;
  const W twice_q = p.grad_recon == nullptr ? W(0) : 2 * p.grad_recon[part.row];
  for (int i = part.begin + static_cast<int>(threadIdx.x); i < part.end; i += kRowThreads) {
    const int64_t at = offset + i;
    const W pull = p.grad_recon == nullptr ? W(0) : twice_q * p.residual[at];
    if (p.pull != nullptr) p.pull[at] = pull;
    if (p.half != nullptr) p.half[at] = W(0.5) * widen(p.grad_z[at]);
    if (p.delta != nullptr) p.delta[at] = pull - W(0.5) * p.grad_x[at];
    if (p.y != nullptr)
      p.y[at] = widen(p.z[at]) - (p.bias == nullptr ? W(0) : widen(p.bias[period(i)]));
  }
}

// to = scale * S * from', one tile of 32 x 32 through shared memory.
template <typename T>
__device__ void transpose_tile(
    const DeltaArguments<T>& p, const Transpose<T>& t, unsigned tile, unsigned tiles,
    Wide<T>* shared) {
  using W = Wide<T>;
  W total = 0;
  for (int64_t b = threadIdx.x; b < p.rows; b += kRowThreads) total += p.grad_log_det[b];
  total = block_sum(total, shared);
  __syncthreads();
  const int64_t row = int64_t{tile / tiles} * kTile, column = int64_t{tile % tiles} * kTile;
  const int64_t size = p.columns;
  const int x = threadIdx.x % kTile;
  for (int y = threadIdx.x / kTile; y < kTile; y += kRowThreads / kTile)
    if (row + y < size && column + x < size)
      shared[y * (kTile + 1) + x] = widen(t.from[(row + y) * size + column + x]);
  __syncthreads();
  for (int y = threadIdx.x / kTile; y < kTile; y += kRowThreads / kTile)
    if (column + y < size && row + x < size)
      t.to[(column + y) * size + row + x] = W(t.scale) * total * shared[x * (kTile + 1) + y];
}

// Sums over the rows of grad_z for 32 columns: a warp's lanes own the columns, its eight warps an
// eighth of the rows each.
template <typename T>
__device__ void sum_columns(const DeltaArguments<T>& p, unsigned block, Wide<T>* shared) {
  using W = Wide<T>;
  const int lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp;
  const int64_t column = int64_t{block} * kWarp + lane;
  W sum = 0;
  if (column < p.columns)
    for (int64_t row = part; row < p.rows; row += kRowThreads / kWarp)
      sum += widen(p.grad_z[row * p.columns + column]);
  shared[part * kWarp + lane] = sum;
  __syncthreads();
  if (part != 0 || column >= p.columns) return;
  for (int i = 1; i < kRowThreads / kWarp; ++i) sum += shared[i * kWarp + lane];
  store(p.grad_bias + column, sum);
}

// Everything element-wise between backward's products, in one launch; what a block owns follows
// from its number: a part of a row of deltas, a tile of a transposed weight (the accumulators of
// the weight gradients), or 32 columns of the bias's gradient.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4)
    delta_step(const DeltaArguments<T> p, const Divider period, const DeltaBlocks blocks) {
  Wide<T>* const shared = reinterpret_cast<Wide<T>*>(shared_memory());
  unsigned block = blockIdx.x;
  if (block < blocks.rows) return deltas_of_row(p, period, RowPart(block, blocks.parts, p.columns));
  block -= blocks.rows;
  const unsigned a_matrix = blocks.tiles * blocks.tiles;
  if (block < blocks.transposes) {
    const bool first = p.transposes[0].to != nullptr && block < a_matrix;
    return transpose_tile(p, p.transposes[first ? 0 : 1], block % a_matrix, blocks.tiles, shared);
  }
  sum_columns(p, block - blocks.transposes, shared);
}

}  // namespace snf

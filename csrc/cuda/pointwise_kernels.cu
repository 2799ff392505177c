// Launches of the element-wise kernels.
#include "pointwise.h"

#include "pointwise_kernels.cuh"

namespace snf {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int64_t residual_workspace(int64_t rows, int columns) {
  const int64_t parts = divide_up(columns, kRowPart);
  return parts == 1 ? 0 : rows * parts;
}

template <typename W>
void row_sums(const W* in, int columns, W* out, int64_t rows, cudaStream_t stream) {
  constexpr int kRows = kRowThreads / kWarp;
  launch(
      "sum_rows", sum_rows<W>, divide_up(rows, kRows), kRowThreads, 0, stream, in, columns, out,
      rows);
}

template <typename T>
void residual(const ResidualArguments<T>& a, cudaStream_t stream) {
  const int parts = static_cast<int>(divide_up(a.columns, kRowPart));
  Wide<T>* const recon = parts == 1 ? a.recon : a.workspace;
  launch(
      "residual_step", residual_step<T>, a.rows * parts, kRowThreads,
      kRowThreads / kWarp * sizeof(Wide<T>), stream, a, Divider(a.period), parts, recon);
  if (parts > 1) row_sums<Wide<T>>(recon, parts, a.recon, a.rows, stream);
}

template <typename T>
void deltas(const DeltaArguments<T>& a, cudaStream_t stream) {
  const int64_t parts = divide_up(a.columns, kRowPart), tiles = divide_up(a.columns, kTile);
  int64_t rows = 0, transposes = 0, sums = 0;
  if (a.half != nullptr || a.pull != nullptr || a.delta != nullptr || a.y != nullptr)
    rows = a.rows * parts;
  for (const Transpose<T>& t : a.transposes)
    if (t.to != nullptr) transposes += tiles * tiles;
  if (a.grad_bias != nullptr) sums = divide_up(a.columns, kWarp);
  // The launch refuses more blocks than 31 bits can number, so that these fit.
  const auto number = [](int64_t n) { return static_cast<unsigned>(n); };
  const DeltaBlocks blocks = {
      number(rows), number(transposes), number(sums), number(parts), number(tiles)};
  launch(
      "delta_step", delta_step<T>, rows + transposes + sums, kRowThreads,
      kTile * (kTile + 1) * sizeof(Wide<T>), stream, a, Divider(a.period), blocks);
}

#define SNF_INSTANTIATE(T)                                           \
  template void residual(const ResidualArguments<T>&, cudaStream_t); \
  template void deltas(const DeltaArguments<T>&, cudaStream_t);
SNF_INSTANTIATE(float)
SNF_INSTANTIATE(double)
SNF_INSTANTIATE(__half)
SNF_INSTANTIATE(__nv_bfloat16)
template void row_sums(const float*, int, float*, int64_t, cudaStream_t);
template void row_sums(const double*, int, double*, int64_t, cudaStream_t);

}  // namespace snf

// Launches of the spline.
#include "rq_spline_kernels.cuh"

#include "pointwise.h"

namespace snf {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t table_size(const SplineShape& s) {
  return s.shared ? 3 * (s.bins + int64_t{1}) * s.event : 0;
}
int64_t sum_rows_of(const SplineShape& s) { return 3 * (s.bins - int64_t{1}); }

// Blocks of a sample.
int64_t parts_of_sample(const SplineShape& s) { return divide_up(s.event, kSplinePart); }

// Parts of the batch: enough threads to fill the device, unless their sums outweigh the elements.
int64_t parts_of_batch(const SplineShape& s, int64_t multiprocessors) {
  constexpr int64_t kSamples = 4;
  const int64_t wanted = divide_up(4 * kSplineGradients * multiprocessors, s.event);
  const int64_t useful = divide_up(s.samples, kSamples);
  return wanted < useful ? wanted : useful;
}

template <typename T>
SharedKnots<T> shared_knots(
    const SplineShape& s, const SplineInputs<T>& from, Wide<T>* tables, cudaStream_t stream) {
  launch(
      "spline_tables", spline_tables<T>, divide_up(3 * int64_t{s.event}, kSplineThreads),
      kSplineThreads, 0, stream, from, s.event, s.bins, static_cast<Wide<T>>(s.tail_bound), tables);
  return {tables, s.event, s.bins};
}

template <typename T>
OwnKnots<T> own_knots(const SplineShape& s, const SplineInputs<T>& from) {
  return {from.widths, from.heights, from.derivatives, s.bins, static_cast<Wide<T>>(s.tail_bound)};
}

template <bool inverse, typename T>
void backward_shared(
    const SplineShape& s, const SplineInputs<T>& from, const SplineGradients<T>& g,
    Wide<T>* workspace, int64_t multiprocessors, cudaStream_t stream) {
  using W = Wide<T>;
  constexpr int64_t kShared = 48 * 1024;
  const int64_t wanted = g.wants_parameters() ? sum_rows_of(s) * kSplineGradients * sizeof(W) : 0;
  const SplineParts split = {s.samples, parts_of_batch(s, multiprocessors), wanted <= kShared};
  const W bound = static_cast<W>(s.tail_bound);
  W* const sums = workspace + table_size(s);
  launch(
      "spline_backward_shared", spline_backward_shared<inverse, T>,
      divide_up(split.parts * s.event, kSplineGradients), kSplineGradients,
      split.in_shared ? static_cast<std::size_t>(wanted) : 0, stream,
      shared_knots(s, from, workspace, stream), from.x, g, split, bound, sums);
  if (!g.wants_parameters()) return;
  launch(
      "spline_finish", spline_finish<T>, 3 * divide_up(s.event, kWarp), kSplineThreads, 0, stream,
      from, g, s.event, s.bins, split.parts, bound, sums);
}

template <bool inverse, typename T>
void backward_own(
    const SplineShape& s, const SplineInputs<T>& from, const SplineGradients<T>& g,
    cudaStream_t stream) {
  const int64_t count = s.samples * s.event;
  launch(
      "spline_backward_own", spline_backward_own<inverse, T>, divide_up(count, kSplineGradients),
      kSplineGradients, 0, stream, own_knots(s, from), from.x, g, count, s.event);
}

}  // namespace

int64_t spline_forward_workspace(const SplineShape& s) {
  const int64_t parts = parts_of_sample(s);
  return table_size(s) + (parts == 1 ? 0 : s.samples * parts);
}

int64_t spline_backward_workspace(const SplineShape& s, int64_t multiprocessors) {
  if (!s.shared) return 0;
  return table_size(s) + parts_of_batch(s, multiprocessors) * sum_rows_of(s) * s.event;
}

template <typename T>
void spline_forward(
    const SplineShape& s, const SplineInputs<T>& from, T* y, Wide<T>* log_abs_det,
    Wide<T>* workspace, cudaStream_t stream) {
  using W = Wide<T>;
  const int parts = static_cast<int>(parts_of_sample(s));
  W* const log_sums = parts == 1 ? log_abs_det : workspace + table_size(s);
  const auto step = [&](const auto& knots, const auto kernel) {
    launch(
        "spline_forward_step", kernel, s.samples * parts, kSplineThreads,
        kSplineThreads / kWarp * sizeof(W), stream, knots, from.x, s.event, parts,
        static_cast<W>(s.tail_bound), y, log_sums);
  };
  if (s.shared) {
    const SharedKnots<T> knots = shared_knots(s, from, workspace, stream);
    step(
        knots, s.inverse ? spline_forward_step<SharedKnots<T>, true, T>
                         : spline_forward_step<SharedKnots<T>, false, T>);
  } else {
    step(
        own_knots(s, from), s.inverse ? spline_forward_step<OwnKnots<T>, true, T>
                                      : spline_forward_step<OwnKnots<T>, false, T>);
  }
  if (parts > 1) row_sums<W>(log_sums, parts, log_abs_det, s.samples, stream);
}

template <typename T>
void spline_backward(
    const SplineShape& s, const SplineInputs<T>& from, const SplineGradients<T>& g,
    Wide<T>* workspace, int64_t multiprocessors, cudaStream_t stream) {
  if (s.shared && s.inverse)
    backward_shared<true>(s, from, g, workspace, multiprocessors, stream);
  else if (s.shared)
    backward_shared<false>(s, from, g, workspace, multiprocessors, stream);
  else if (s.inverse)
    backward_own<true>(s, from, g, stream);
  else
    backward_own<false>(s, from, g, stream);
}

#define SNF_INSTANTIATE(T)                                                                      \
  template void spline_forward(                                                                 \
      const SplineShape&, const SplineInputs<T>&, T*, Wide<T>*, Wide<T>*, cudaStream_t);        \
  template void spline_backward(                                                                \
      const SplineShape&, const SplineInputs<T>&, const SplineGradients<T>&, Wide<T>*, int64_t, \
      cudaStream_t);
SNF_INSTANTIATE(float)
SNF_INSTANTIATE(double)
SNF_INSTANTIATE(__half)
SNF_INSTANTIATE(__nv_bfloat16)

}  // namespace snf

// The spline's kernels over csrc/spline_math.h. See docs/kernels.md.
#pragma once

#include "../spline_math.h"
#include "device.cuh"
#include "rq_spline.h"

namespace snf {

constexpr int kSplineThreads = 256;    // forward, and sums over parts
constexpr int kSplineGradients = 128;  // backward: shared memory for that many columns of sums
// Elements of a sample that one block takes.
constexpr int kSplinePart = 4096;

// ---- From raw parameters to knots --------------------------------------------------------------

template <typename W>
struct Softmax {
  W most, over_sum;

  template <typename T>
  __device__ Softmax(const T* raw, int bins) {
    most = widen(raw[0]);
    for (int k = 1; k < bins; ++k) {
      const W next = widen(raw[k]);
      most = next > most ? next : most;
    }
    W sum = 0;
    for (int k = 0; k < bins; ++k) sum += elementary::exp(widen(raw[k]) - most);
    over_sum = 1 / sum;
  }
  template <typename T>
  __device__ W share(const T* raw, int k) const {
    return elementary::exp(widen(raw[k]) - most) * over_sum;
  }
};

// The bins of one axis, one after the other.
template <typename T>
struct Axis {
  using W = Wide<T>;
  const T* raw;
  int bins;
  W tail_bound;
  Softmax<W> softmax;
  W sizes = 0, low, high;          // of the bin
  W shares_before = 0, share = 0;  // of the softmax

  __device__ Axis(const T* raw, int bins, W tail_bound)
      : raw(raw), bins(bins), tail_bound(tail_bound), softmax(raw, bins), high(-tail_bound) {}
  // To bin k from bin k - 1.
  __device__ void advance(int k) {
    low = high;
    shares_before += share;
    share = softmax.share(raw, k);
    sizes += spline::bin_size(share, spline::spread<W>(bins));
    high = k + 1 < bins ? 2 * tail_bound * sizes - tail_bound : tail_bound;
  }
};

template <typename T>
__device__ Wide<T> slope_of_knot(const T* raw, int k, int bins) {
  return k == 0 || k == bins ? Wide<T>(1) : spline::knot_slope(widen(raw[k - 1]));
}

// ---- Where an element's bin comes from ---------------------------------------------------------

template <typename W>
struct Found {
  spline::Bin<W> bin;
  int number;
};

// Tables that all samples share, x, y and slopes: [3][bins + 1][event].
template <typename T>
struct SharedKnots {
  const Wide<T>* tables;
  int event, bins;

  template <bool inverse>
  __device__ Found<Wide<T>> find(int64_t, int column, Wide<T> p) const {
    const int64_t row = event, kind = row * (bins + 1);
    const Wide<T>* const own = tables + column;
    const Wide<T>* const axis = own + (inverse ? kind : 0);
    int low = 0, high = bins - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (p >= axis[middle * row])
        low = middle;
      else
        high = middle - 1;
    }
    const Wide<T>* const x = own + low * row;
    const Wide<T>*const y = x + kind, *const d = y + kind;
    return {{x[0], x[row], y[0], y[row], d[0], d[row]}, low};
  }
};

// Raw parameters of each element's own: its thread walks over the bins, and keeps none.
template <typename T>
struct OwnKnots {
  using W = Wide<T>;
  const T *widths, *heights, *derivatives;
  int bins;
  W tail_bound;

  template <bool inverse>
  __device__ int walk(W p, Axis<T>& x, Axis<T>& y) const {
    int k = 0;
    while (true) {
      x.advance(k);
      y.advance(k);
      if (k + 1 == bins || !(p >= (inverse ? y.high : x.high))) return k;
      ++k;
    }
  }
  __device__ Found<W> found(int64_t element, int k, const Axis<T>& x, const Axis<T>& y) const {
    const T* const raw = derivatives + element * (bins - 1);
    return {
        {x.low, x.high, y.low, y.high, slope_of_knot(raw, k, bins),
         slope_of_knot(raw, k + 1, bins)},
        k};
  }
  template <bool inverse>
  __device__ Found<W> find(int64_t element, int, W p) const {
    Axis<T> x(widths + element * bins, bins, tail_bound);
    Axis<T> y(heights + element * bins, bins, tail_bound);
    const int k = walk<inverse>(p, x, y);
    return found(element, k, x, y);
  }
};

// A thread owns one kind of knots of one element.
template <typename T>
__global__ void __launch_bounds__(kSplineThreads, 2)
    spline_tables(const SplineInputs<T> p, int event, int bins, Wide<T> tail_bound, Wide<T>* to) {
  const int64_t n = int64_t{blockIdx.x} * kSplineThreads + threadIdx.x;
  if (n >= 3 * int64_t{event}) return;
  const int kind = static_cast<int>(n / event);
  const int64_t column = n % event;
  to += kind * (bins + int64_t{1}) * event + column;
  if (kind == 2) {
    const T* const raw = p.derivatives + column * (bins - 1);
    for (int64_t k = 0; k <= bins; ++k)
      to[k * event] = slope_of_knot(raw, static_cast<int>(k), bins);
    return;
  }
  Axis<T> axis((kind == 0 ? p.widths : p.heights) + column * bins, bins, tail_bound);
  to[0] = -tail_bound;
  for (int64_t k = 0; k < bins; ++k) {
    axis.advance(static_cast<int>(k));
    to[(k + 1) * event] = axis.high;
  }
}

// ---- Forward -----------------------------------------------------------------------------------

// False for not-a-number too.
template <typename W>
__device__ bool is_inside(W x, W tail_bound) {
  return x >= -tail_bound && x <= tail_bound;
}

template <bool inverse, typename W>
__device__ spline::Place<W> place_in_bin(const spline::Bin<W>& bin, W p) {
  return inverse ? spline::place_of_y(bin, p) : spline::place_of_x(bin, p);
}

// A block owns a part of a sample and leaves its sum of logarithms of slopes.
template <typename Knots, bool inverse, typename T>
__global__ void __launch_bounds__(kSplineThreads, 2) spline_forward_step(
    const Knots knots, const T* x, int event, int parts, Wide<T> tail_bound, T* y,
    Wide<T>* log_sums) {
  using W = Wide<T>;
  const int64_t offset = blockIdx.x / parts * int64_t{event};
  const int begin = static_cast<int>(blockIdx.x % parts) * kSplinePart;
  const int end = begin + min(kSplinePart, event - begin);
  W sum = 0;
  for (int e = begin + static_cast<int>(threadIdx.x); e < end; e += kSplineThreads) {
    const W v = widen(x[offset + e]);
    if (!is_inside(v, tail_bound)) {
      store(y + offset + e, v);
      continue;
    }
    const auto bin = knots.template find<inverse>(offset + e, e, v).bin;
    const auto at = place_in_bin<inverse>(bin, v);
    store(y + offset + e, inverse ? spline::x_at(bin, at) : spline::y_at(bin, at));
    const W log_slope = elementary::log(spline::slope_at(bin, at));
    sum += inverse ? -log_slope : log_slope;
  }
  sum = block_sum(sum, reinterpret_cast<W*>(shared_memory()));
  if (threadIdx.x == 0) log_sums[blockIdx.x] = sum;
}

// ---- Backward ----------------------------------------------------------------------------------

// Of one element at its bin; zeros at the knots for one outside.
template <bool inverse, typename T>
__device__ spline::Gradients<Wide<T>> gradients_of(
    const SplineGradients<T>& g, int64_t sample, int64_t element, const spline::Bin<Wide<T>>& bin,
    Wide<T> v, bool inside) {
  using W = Wide<T>;
  const W dy = g.y == nullptr ? W(0) : widen(g.y[element]);
  if (!inside) return {dy, {}};
  const W dl = g.log_abs_det == nullptr ? W(0) : g.log_abs_det[sample];
  return spline::element_backward<inverse>(bin, place_in_bin<inverse>(bin, v), dy, dl);
}

// How the batch is shared out between threads: each owns one element of the event, for the samples
// of one part.
struct SplineParts {
  int64_t samples, parts;
  bool in_shared;  // memory, where the sums gather; else in their place in the workspace
};

// sums: [parts][3][bins - 1][event], of gradients at inner knots; null where not wanted.
template <bool inverse, typename T>
__global__ void __launch_bounds__(kSplineGradients, 4) spline_backward_shared(
    const SharedKnots<T> knots, const T* x, const SplineGradients<T> g, const SplineParts split,
    Wide<T> tail_bound, Wide<T>* sums) {
  using W = Wide<T>;
  const int64_t n = int64_t{blockIdx.x} * kSplineGradients + threadIdx.x;
  const int64_t event = knots.event, part = n / event;
  if (part >= split.parts) return;
  const int column = static_cast<int>(n % event), inner = knots.bins - 1, rows = 3 * inner;
  W *const left = sums + part * rows * event + column, *const mine = split.in_shared
                                                                         ? reinterpret_cast<W*>(
                                                                               shared_memory()) +
                                                                               threadIdx.x
                                                                         : left;
  const int64_t pitch = split.in_shared ? kSplineGradients : event;
  const bool wants_sums = g.wants_parameters();
  if (wants_sums)
    for (int row = 0; row < rows; ++row) mine[row * pitch] = 0;
  const int64_t end = split.samples * (part + 1) / split.parts;
  for (int64_t sample = split.samples * part / split.parts; sample < end; ++sample) {
    const int64_t element = sample * event + column;
    const W v = widen(x[element]);
    const bool inside = is_inside(v, tail_bound);
    const Found<W> at = knots.template find<inverse>(element, column, inside ? v : W(0));
    const auto to = gradients_of<inverse>(g, sample, element, at.bin, v, inside);
    if (g.x != nullptr) store(g.x + element, to.in);
    if (!wants_sums || !inside) continue;
    const W low[3] = {to.bin.x0, to.bin.y0, to.bin.d0}, high[3] = {to.bin.x1, to.bin.y1, to.bin.d1};
#pragma unroll
    for (int kind = 0; kind < 3; ++kind) {
      W* const own = mine + kind * inner * pitch;  // from the first inner knot on
      if (at.number > 0) own[(at.number - 1) * pitch] += low[kind];
      if (at.number < inner) own[at.number * pitch] += high[kind];
    }
  }
  if (wants_sums && split.in_shared)
    for (int row = 0; row < rows; ++row) left[row * event] = mine[row * pitch];
}

// knot_j = 2 T (sum over i < j of size_i) - T, size = smallest + spread softmax(raw):
// from a column of gradients at inner knots to those of raw sizes.
template <typename T>
__device__ void raw_sizes(
    const T* raw, int bins, Wide<T> tail_bound, const Wide<T>* at_knots, int64_t pitch, T* to) {
  using W = Wide<T>;
  const Softmax<W> softmax(raw, bins);
  const W scale = 2 * tail_bound * spline::spread<W>(bins);
  W mean = 0, sum = 0;
  // Unrolled as far as ptxas likes, these loops spill on sm_100.
#pragma unroll 1
  for (int k = bins - 2; k >= 0; --k) {
    sum += at_knots[k * pitch];
    mean += softmax.share(raw, k) * (scale * sum);
  }
  sum = 0;
#pragma unroll 1
  for (int k = bins - 1; k >= 0; --k) {
    if (k < bins - 1) sum += at_knots[k * pitch];
    store(to + k, softmax.share(raw, k) * (scale * sum - mean));
  }
}

// A block owns 32 elements of one kind of parameter. Its warps add up the parts in order, a knot
// each, in the place of the first part; then its first warp goes on to the raw parameters.
template <typename T>
__global__ void __launch_bounds__(kSplineThreads, 2) spline_finish(
    const SplineInputs<T> p, const SplineGradients<T> g, int event, int bins, int64_t parts,
    Wide<T> tail_bound, Wide<T>* sums) {
  using W = Wide<T>;
  const int64_t tiles = (event + int64_t{kWarp - 1}) / kWarp, pitch = event;
  const int kind = static_cast<int>(blockIdx.x / tiles), inner = bins - 1;
  const int64_t column = blockIdx.x % tiles * kWarp + threadIdx.x % kWarp;
  T* const to = kind == 0 ? g.widths : kind == 1 ? g.heights : g.derivatives;
  if (to == nullptr) return;
  W* const own = sums + kind * inner * pitch + column;
  if (column < event)
    for (int knot = static_cast<int>(threadIdx.x) / kWarp; knot < inner;
         knot += kSplineThreads / kWarp) {
      W sum = 0;
#pragma unroll 8
      for (int64_t part = 0; part < parts; ++part) sum += own[(part * 3 * inner + knot) * pitch];
      own[knot * pitch] = sum;
    }
  __syncthreads();  // the sums are there
  if (threadIdx.x >= kWarp || column >= event) return;
  if (kind < 2) {
    const T* const raw = (kind == 0 ? p.widths : p.heights) + column * bins;
    raw_sizes(raw, bins, tail_bound, own, pitch, to + column * bins);
    return;
  }
  const int64_t first = column * inner;
#pragma unroll 1
  for (int knot = 0; knot < inner; ++knot) {
    const W rate = spline::knot_slope_derivative(widen(p.derivatives[first + knot]));
    store(to + first + knot, own[knot * pitch] * rate);
  }
}

// The same for a single element, whose gradients are at the two ends of bin `number`.
template <typename T>
__device__ void own_sizes(const Axis<T>& axis, int number, Wide<T> low, Wide<T> high, T* to) {
  using W = Wide<T>;
  const W scale = 2 * axis.tail_bound * spline::spread<W>(axis.bins);
  const W here = number + 1 < axis.bins ? scale * high : W(0);
  const W before = number > 0 ? here + scale * low : W(0);
  const W mean = axis.shares_before * before + axis.share * here;
  for (int k = 0; k < axis.bins; ++k) {
    const W at_size = k < number ? before : k == number ? here : W(0);
    store(to + k, axis.softmax.share(axis.raw, k) * (at_size - mean));
  }
}

// A thread owns an element, with all its parameters.
template <bool inverse, typename T>
__global__ void __launch_bounds__(kSplineGradients, 4) spline_backward_own(
    const OwnKnots<T> knots, const T* x, const SplineGradients<T> g, int64_t count, int event) {
  using W = Wide<T>;
  const int64_t n = int64_t{blockIdx.x} * kSplineGradients + threadIdx.x;
  if (n >= count) return;
  const W v = widen(x[n]);
  const int bins = knots.bins;
  const bool inside = is_inside(v, knots.tail_bound);
  Axis<T> along_x(knots.widths + n * bins, bins, knots.tail_bound);
  Axis<T> along_y(knots.heights + n * bins, bins, knots.tail_bound);
  const int k = knots.template walk<inverse>(inside ? v : W(0), along_x, along_y);
  const spline::Bin<W> bin = knots.found(n, k, along_x, along_y).bin;
  const auto to = gradients_of<inverse>(g, n / event, n, bin, v, inside);
  if (g.x != nullptr) store(g.x + n, to.in);
  if (g.widths != nullptr) own_sizes(along_x, k, to.bin.x0, to.bin.x1, g.widths + n * bins);
  if (g.heights != nullptr) own_sizes(along_y, k, to.bin.y0, to.bin.y1, g.heights + n * bins);
  if (g.derivatives == nullptr) return;
  const int64_t first = n * (bins - 1);
  for (int knot = 0; knot < bins - 1; ++knot) {
    W at_raw = 0;
    if (knot == k - 1 || knot == k) {
      const W rate = spline::knot_slope_derivative(widen(knots.derivatives[first + knot]));
      at_raw = rate * (knot == k ? to.bin.d1 : to.bin.d0);
    }
    store(g.derivatives + first + knot, at_raw);
  }
}

}  // namespace snf

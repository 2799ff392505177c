// The monotone rational-quadratic spline, for every device; knows no torch.
//
// With bin (x0, y0) .. (x1, y1), slopes d0 and d1, w = x1 - x0, h = y1 - y0, s = h / w, t = (x -
// x0) / w and b = t (1 - t):
//
//   y = y0 + h N / D,  N = s t^2 + d0 b,  D = s (1 - 2 b) + (d0 + d1) b
//   dy/dx = M (s / D)^2,  M = d1 t^2 + 2 s b + d0 (1 - t)^2
//
// All three are sums of positive terms. So is the discriminant of the inverse, as written below:
// nothing here cancels, and nothing has to be clamped against a negative root. Where d1 is steep,
// 1 - t is tiny and decides the slope: the inverse computes it by itself.
#pragma once

#include "elementary.h"

namespace snf {
namespace spline {

constexpr double kSmallestSize = 1e-3;   // of a bin, as a share of the interval
constexpr double kSmallestSlope = 1e-3;  // of a knot
// Squares and ratios of slopes stay finite in float32.
constexpr double kLargestSlope = 1e15;
// Added to a raw derivative, so that 0 stands for the slope 1 of the tails: log(e^0.999 - 1).
constexpr double kUnitSlope = 0.539742417236952;

// ---- From raw parameters to knots --------------------------------------------------------------

// What is left to share out between the bins after each has its smallest size.
template <typename T>
SNF_INLINE T spread(int bins) {
  return static_cast<T>(1 - kSmallestSize * bins);
}

// A bin's share of the interval, from its softmax.
template <typename T>
SNF_INLINE T bin_size(T probability, T spread) {
  return static_cast<T>(kSmallestSize) + spread * probability;
}

template <typename T>
SNF_INLINE T knot_slope(T raw) {
  const T slope =
      static_cast<T>(kSmallestSlope) + elementary::softplus(raw + static_cast<T>(kUnitSlope));
  return slope > static_cast<T>(kLargestSlope) ? static_cast<T>(kLargestSlope) : slope;
}

// d knot_slope / d raw
template <typename T>
SNF_INLINE T knot_slope_derivative(T raw) {
  const T rate = elementary::sigmoid(raw + static_cast<T>(kUnitSlope));
  return raw >= static_cast<T>(kLargestSlope) ? T(0) : rate;
}

// ---- One element -------------------------------------------------------------------------------

template <typename T>
struct Bin {
  T x0, x1, y0, y1, d0, d1;
};

// NaN stays NaN, here and above: a parameter that is not a number must not pass for one.
template <typename T>
SNF_INLINE T unit_interval(T t) {
  t = t < 0 ? T(0) : t;
  return t > 1 ? T(1) : t;
}

// Where an element stands in its bin: t from 0 to 1, and u = 1 - t.
template <typename T>
struct Place {
  T t, u;
};

template <typename T>
SNF_INLINE Place<T> place_of_x(const Bin<T>& bin, T x) {
  const T t = unit_interval((x - bin.x0) / (bin.x1 - bin.x0));
  return {t, 1 - t};  // x is rounded itself: nothing would be gained by another division
}

// The root from 0 to 1 of (s - q) t^2 + q t - s v = 0 whose discriminant's root is given. Each form
// is free of cancellation for its sign of q.
template <typename T>
SNF_INLINE T root_of(T q, T s, T v, T root) {
  const bool positive = q >= 0;
  const T above = positive ? 2 * s * v : root - q;
  const T below = positive ? q + root : 2 * (s - q);
  return unit_interval(above / below);
}

// Of the x whose value is y: with v = (y - y0) / h, t is the root with q = d0 (1 - v) - d1 v +
// 2 s v; seen from the other end, where d0 and d1, v and 1 - v change places, u is.
template <typename T>
SNF_INLINE Place<T> place_of_y(const Bin<T>& bin, T y) {
  const T h = bin.y1 - bin.y0, s = h / (bin.x1 - bin.x0);
  const T v = unit_interval((y - bin.y0) / h), rest = unit_interval((bin.y1 - y) / h);
  const T m = bin.d0 * rest - bin.d1 * v;
  const T root = elementary::sqrt(m * m + 4 * s * s * (v * rest));
  return {root_of(m + 2 * s * v, s, v, root), root_of(2 * s * rest - m, s, rest, root)};
}

template <typename T>
SNF_INLINE T x_at(const Bin<T>& bin, Place<T> at) {
  return bin.x0 + (bin.x1 - bin.x0) * at.t;
}

template <typename T>
SNF_INLINE T y_at(const Bin<T>& bin, Place<T> at) {
  const T h = bin.y1 - bin.y0, s = h / (bin.x1 - bin.x0), t = at.t, b = t * at.u;
  const T above = s * t * t + bin.d0 * b, below = s * (1 - 2 * b) + (bin.d0 + bin.d1) * b;
  return bin.y0 + h * (above / below);
}

// dy/dx
template <typename T>
SNF_INLINE T slope_at(const Bin<T>& bin, Place<T> at) {
  const T s = (bin.y1 - bin.y0) / (bin.x1 - bin.x0), t = at.t, u = at.u, b = t * u;
  const T below = s * (1 - 2 * b) + (bin.d0 + bin.d1) * b;
  const T m = bin.d1 * t * t + 2 * s * b + bin.d0 * u * u;
  const T ratio = s / below;
  return m * ratio * ratio;
}

template <typename T>
struct Gradients {
  T in;        // of the element
  Bin<T> bin;  // of its bin's knots
};

// From the gradients of the output and of its logarithm of the slope. The inverse, x(y), is
// differentiated through y(x(y)) = y: dx/d* = -(dy/d*) / slope.
template <bool inverse, typename T>
SNF_INLINE Gradients<T> element_backward(const Bin<T>& bin, Place<T> at, T grad_out, T grad_log) {
  const T over_w = 1 / (bin.x1 - bin.x0), h = bin.y1 - bin.y0, s = h * over_w;
  const T t = at.t, u = at.u, b = t * u, rest = 1 - 2 * b, both = bin.d0 + bin.d1;
  const T below = s * rest + both * b, over_below = 1 / below;
  const T m = bin.d1 * t * t + 2 * s * b + bin.d0 * u * u, over_m = 1 / m;
  const T portion = (s * t * t + bin.d0 * b) * over_below;  // of h that y is above y0
  const T ratio = s * over_below;
  // Derivatives of the logarithm of the slope in t, s, d0, d1 ...
  const T log_t = 2 * ((bin.d1 * t + s * (u - t) - bin.d0 * u) * over_m -
                       (both - 2 * s) * (u - t) * over_below);
  const T log_s = 2 * (b * over_m + 1 / s - rest * over_below);
  const T log_d0 = u * u * over_m - 2 * b * over_below;
  const T log_d1 = t * t * over_m - 2 * b * over_below;
  // ... and of the portion.
  const T bend = b * over_below;
  const T portion_t = ratio * (m * over_below);
  const T portion_s = bend * ((bin.d1 * t * t - bin.d0 * u * u) * over_below);
  const T portion_d0 = bend * (1 - portion), portion_d1 = -bend * portion;

  T grad_y = grad_out, in = 0;
  if (inverse) {
    grad_log = -grad_log;
    in = (grad_out + grad_log * log_t * over_w) / (m * ratio * ratio);
    grad_y = -in;
  }
  const T up = grad_y * h;
  const T at_t = (up * portion_t + grad_log * log_t) * over_w;
  const T at_s = (up * portion_s + grad_log * log_s) * over_w;
  const T at_w = -at_t * t - at_s * s, at_h = at_s + grad_y * portion;
  return {
      inverse ? in : at_t,
      {-at_t - at_w, at_w, grad_y - at_h, at_h, up * portion_d0 + grad_log * log_d0,
       up * portion_d1 + grad_log * log_d1}};
}

}  // namespace spline
}  // namespace snf

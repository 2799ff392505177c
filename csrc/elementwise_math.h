// The element-wise operators, one element at a time; shared by every device, knows no torch.
//
// forward(x, first, second) gives y and the logarithm of |dy/dx|; backward(x, first, second, dy, g)
// the gradients of x and of the two parameters, dy and g being those of y and of the logarithm.
#pragma once

#include "elementary.h"

namespace snf {

template <typename T>
struct Value {
  T y, log_slope;
};

template <typename T>
struct Gradients {
  T x, first, second;
};

// What most operators are: with an output, without parameters, in closed form.
struct Elementwise {
  static constexpr bool kOutput = true;       // y is an output
  static constexpr bool kParameters = false;  // takes first and second
  static constexpr bool kSolves = false;      // y is found by iteration: start, then advance
};

struct SmoothLeakyReLU : Elementwise {
  double alpha;
  explicit SmoothLeakyReLU(double alpha) : alpha(alpha) {}

  template <typename T>
  SNF_INLINE T value(T x) const {
    return T(alpha) * x + T(1 - alpha) * elementary::softplus(x);
  }
  template <typename T>
  SNF_INLINE T slope(T x) const {
    return T(alpha) + T(1 - alpha) * elementary::sigmoid(x);
  }
  // Both, of one exponential.
  template <typename T>
  SNF_INLINE void value_and_slope(T x, T& value, T& slope) const {
    const T a = T(alpha), rest = T(1 - alpha);
    const T e = elementary::exp(x > 0 ? -x : x);
    value = a * x + rest * ((x > 0 ? x : T(0)) + elementary::log1p(e));
    slope = a + rest * (x > 0 ? T(1) : e) / (1 + e);
  }
  // d log(slope) / dx
  template <typename T>
  SNF_INLINE T bend(T x) const {
    const T s = elementary::sigmoid(x);
    return T(1 - alpha) * s * (1 - s) / (T(alpha) + T(1 - alpha) * s);
  }
  template <typename T>
  SNF_INLINE Value<T> forward(T x, T, T) const {
    return {value(x), elementary::log(slope(x))};
  }
  template <typename T>
  SNF_INLINE Gradients<T> backward(T x, T, T, T dy, T g) const {
    return {dy * slope(x) + g * bend(x), 0, 0};
  }
};

// Where a root is known to lie, and where it is thought to.
template <typename T>
struct Search {
  T low, high, x;
};

// Newton's method. Its start lies on the right of the root of this convex function, whence it
// comes down without overshooting; a step that rounding leads out of the bracket halves that.
struct SmoothLeakyReLUInverse : Elementwise {
  static constexpr bool kSolves = true;
  static constexpr int kMost = 100;
  SmoothLeakyReLU map;
  explicit SmoothLeakyReLUInverse(double alpha) : map(alpha) {}

  template <typename T>
  static constexpr T kTolerance = sizeof(T) == 8 ? T(8.9e-16) : T(4.8e-7);  // 4 epsilon

  // max(x, a x) <= f(x) <= max(x, a x) + (1 - a) log 2
  template <typename T>
  SNF_INLINE Search<T> start(T z) const {
    const T a = T(map.alpha), size = z < 0 ? -z : z;
    const T high = z > 0 ? z : z / a;
    const T least = z - T(0.7) * T(1 - map.alpha) - kTolerance<T> * size;
    return {least > 0 ? least : least / a, high, high};
  }
  // One step; whether x moved by more than rounding.
  template <typename T>
  SNF_INLINE bool advance(T z, T& low, T& high, T& x) const {
    T value, slope;
    map.value_and_slope(x, value, slope);
    const T excess = value - z;
    low = excess > 0 ? low : x;
    high = excess > 0 ? x : high;
    const T newton = x - excess / slope, half = T(0.5) * low + T(0.5) * high;
    const T next = (newton >= low) & (newton <= high) ? newton : half;
    const T step = next > x ? next - x : x - next, size = x < 0 ? -x : x;
    x = next;
    return step > kTolerance<T> * (1 + size);
  }
  // Forward and backward take x, the root, for their argument: it is kept from forward.
  template <typename T>
  SNF_INLINE Value<T> forward(T x, T, T) const {
    return {x, -elementary::log(map.slope(x))};
  }
  template <typename T>
  SNF_INLINE Gradients<T> backward(T x, T, T, T dy, T g) const {
    return {(dy - g * map.bend(x)) / map.slope(x), 0, 0};
  }
};

struct Logit : Elementwise {
  double alpha, inner, log_inner;
  explicit Logit(double alpha)
      : alpha(alpha), inner(1 - 2 * alpha), log_inner(__builtin_log(1 - 2 * alpha)) {}

  template <typename T>
  SNF_INLINE Value<T> forward(T x, T, T) const {
    // 1 - s from 1 - x: near x = 1, s itself has lost the digits.
    const T log_s = elementary::log(T(alpha) + T(inner) * x);
    const T log_1ms = elementary::log(T(alpha) + T(inner) * (1 - x));
    return {log_s - log_1ms, T(log_inner) - log_s - log_1ms};
  }
  template <typename T>
  SNF_INLINE Gradients<T> backward(T x, T, T, T dy, T g) const {
    const T by_s = T(inner) / (T(alpha) + T(inner) * x);
    const T by_1ms = T(inner) / (T(alpha) + T(inner) * (1 - x));
    return {dy * (by_s + by_1ms) + g * (by_1ms - by_s), 0, 0};
  }
};

struct LogitInverse : Logit {
  using Logit::Logit;

  template <typename T>
  SNF_INLINE Value<T> forward(T y, T, T) const {
    const T log_s = -elementary::softplus(-y), log_1ms = -elementary::softplus(y);
    return {(elementary::sigmoid(y) - T(alpha)) / T(inner), log_s + log_1ms - T(log_inner)};
  }
  template <typename T>
  SNF_INLINE Gradients<T> backward(T y, T, T, T dx, T g) const {
    const T s = elementary::sigmoid(y), rest = elementary::sigmoid(-y);
    return {dx * s * rest / T(inner) + g * (rest - s), 0, 0};
  }
};

// first: shift; second: log_scale. e^s is taken as the square of e^(s / 2), which float32 holds for
// twice as long; the product then overflows only where the true value does.
struct Actnorm : Elementwise {
  static constexpr bool kParameters = true;

  template <typename T>
  SNF_INLINE Value<T> forward(T x, T shift, T log_scale) const {
    const T root = elementary::exp(T(-0.5) * log_scale);
    return {(x - shift) * root * root, -log_scale};
  }
  template <typename T>
  SNF_INLINE Gradients<T> backward(T x, T shift, T log_scale, T dy, T g) const {
    const T root = elementary::exp(T(-0.5) * log_scale);
    const T dx = dy * root * root;
    return {dx, -dx, -dx * (x - shift) - g};
  }
};

struct ActnormInverse : Elementwise {
  static constexpr bool kParameters = true;

  template <typename T>
  SNF_INLINE Value<T> forward(T y, T shift, T log_scale) const {
    const T root = elementary::exp(T(0.5) * log_scale);
    return {y * root * root + shift, log_scale};
  }
  template <typename T>
  SNF_INLINE Gradients<T> backward(T y, T, T log_scale, T dx, T g) const {
    const T root = elementary::exp(T(0.5) * log_scale);
    const T dy = dx * root * root;
    return {dy, dx, dy * y + g};
  }
};

// first: raw; second: t.
struct AffineCoupling : Elementwise {
  static constexpr bool kParameters = true;
  static constexpr double kBound = 2.0;  // of the logarithm of the scale

  template <typename T>
  SNF_INLINE Value<T> forward(T x, T raw, T t) const {
    const T log_scale = T(kBound) * elementary::tanh(raw / T(kBound));
    return {x * elementary::exp(log_scale) + t, log_scale};
  }
  template <typename T>
  SNF_INLINE Gradients<T> backward(T x, T raw, T, T dy, T g) const {
    const T tanh = elementary::tanh(raw / T(kBound));
    const T dx = dy * elementary::exp(T(kBound) * tanh);
    return {dx, (dx * x + g) * (1 - tanh * tanh), dy};
  }
};

struct AffineCouplingInverse : Elementwise {
  static constexpr bool kParameters = true;

  template <typename T>
  SNF_INLINE Value<T> forward(T y, T raw, T t) const {
    constexpr T bound = T(AffineCoupling::kBound);
    const T log_scale = bound * elementary::tanh(raw / bound);
    return {(y - t) * elementary::exp(-log_scale), -log_scale};
  }
  template <typename T>
  SNF_INLINE Gradients<T> backward(T y, T raw, T t, T dx, T g) const {
    constexpr T bound = T(AffineCoupling::kBound);
    const T tanh = elementary::tanh(raw / bound);
    const T dy = dx * elementary::exp(-bound * tanh);
    return {dy, -(dy * (y - t) + g) * (1 - tanh * tanh), -dy};
  }
};

// The sum of log_slope is the result.
struct NormalLogProb : Elementwise {
  static constexpr bool kOutput = false;

  template <typename T>
  SNF_INLINE Value<T> forward(T z, T, T) const {
    return {0, T(-0.5) * z * z - T(0.91893853320467274178)};  // log(2 pi) / 2
  }
  template <typename T>
  SNF_INLINE Gradients<T> backward(T z, T, T, T, T g) const {
    return {-g * z, 0, 0};
  }
};

#define SNF_ELEMENTWISE(APPLY)  \
  APPLY(SmoothLeakyReLU)        \
  APPLY(SmoothLeakyReLUInverse) \
  APPLY(Logit)                  \
  APPLY(LogitInverse)           \
  APPLY(Actnorm)                \
  APPLY(ActnormInverse)         \
  APPLY(AffineCoupling)         \
  APPLY(AffineCouplingInverse)  \
  APPLY(NormalLogProb)

}  // namespace snf

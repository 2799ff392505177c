// Elementary functions of the element-wise operators, for every device; knows no torch.
//
// On the host the float32 functions are branch-free polynomials (Cephes' coefficients), so that a
// loop over them becomes vector code for whichever instruction set it is compiled for; they are
// within 2 units in the last place. float64 calls the C library, a device its own functions.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace snf {
namespace elementary {

SNF_INLINE float from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

SNF_INLINE uint32_t to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  return __builtin_bit_cast(uint32_t, value);
#endif
}

// e^x; 0 below 2^-126.
SNF_INLINE float exp(float x) {
#if defined(__CUDA_ARCH__)
  return ::expf(x);
#else
  const bool under = x < -87.3365f, over = x > 88.72283f;
  x = under ? -87.3365f : x;
  x = over ? 88.72283f : x;
  constexpr float kToWhole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float shifted = x * 1.44269504f + kToWhole;
  float n = shifted - kToWhole;
  n = n > 127.0f ? 127.0f : n;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  float y = p * from_bits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  y = over ? __builtin_inff() : y;
  return under ? 0.0f : y;
#endif
}

// Natural logarithm: -inf at 0, nan below.
SNF_INLINE float log(float x) {
#if defined(__CUDA_ARCH__)
  return ::logf(x);
#else
  const bool denormal = x < 1.17549435e-38f;
  const uint32_t bits = to_bits(denormal ? x * 8388608.0f : x);  // 2^23
  // 2^n m with m from sqrt(1/2) to sqrt(2)
  const int32_t n = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float m = from_bits(bits - (static_cast<uint32_t>(n) << 23)) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float square = m * m, whole = static_cast<float>(n - (denormal ? 23 : 0));
  float y = p * m * square + whole * -2.12194440e-4f - 0.5f * square;
  y = (m + y) + whole * 0.693359375f;
  y = x == __builtin_inff() ? x : y;
  y = x == 0.0f ? -__builtin_inff() : y;
  return x < 0.0f || x != x ? __builtin_nanf("") : y;
#endif
}

SNF_INLINE double exp(double x) {
#if defined(__CUDA_ARCH__)
  return ::exp(x);
#else
  return __builtin_exp(x);
#endif
}

SNF_INLINE double log(double x) {
#if defined(__CUDA_ARCH__)
  return ::log(x);
#else
  return __builtin_log(x);
#endif
}

SNF_INLINE float sqrt(float x) {
#if defined(__CUDA_ARCH__)
  return ::sqrtf(x);
#else
  return __builtin_sqrtf(x);
#endif
}

SNF_INLINE double sqrt(double x) {
#if defined(__CUDA_ARCH__)
  return ::sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

// log(1 + u) for u >= 0. With w = 1 + u rounded, log(w) u / (w - 1) makes up for the rounding.
template <typename T>
SNF_INLINE T log1p(T u) {
  const T w = 1 + u, rounded = w - 1;
  const T safe = rounded == 0 ? T(1) : rounded;
  const T y = log(w) * (u / safe);
  return rounded == 0 ? u : y;
}

// log(1 + e^x)
template <typename T>
SNF_INLINE T softplus(T x) {
  const T positive = x > 0 ? x : T(0), distance = x > 0 ? -x : x;
  return positive + log1p(exp(distance));
}

// 1 / (1 + e^-x), exact in both tails
template <typename T>
SNF_INLINE T sigmoid(T x) {
  const T e = exp(x > 0 ? -x : x);
  const T y = 1 / (1 + e);
  return x > 0 ? y : e * y;
}

SNF_INLINE float tanh(float x) {
#if defined(__CUDA_ARCH__)
  return ::tanhf(x);
#else
  const float size = x < 0 ? -x : x;
  const float e = exp(-2.0f * size);
  const float far = (1.0f - e) / (1.0f + e);
  // Near 0 that subtraction loses digits.
  const float q = size * size;
  float p = -5.70498872745e-3f;
  p = p * q + 2.06390887954e-2f;
  p = p * q - 5.37397155531e-2f;
  p = p * q + 1.33314422036e-1f;
  p = p * q - 3.33332819422e-1f;
  const float y = size < 0.625f ? p * q * size + size : far;
  return x < 0 ? -y : y;
#endif
}

SNF_INLINE double tanh(double x) {
#if defined(__CUDA_ARCH__)
  return ::tanh(x);
#else
  return __builtin_tanh(x);
#endif
}

}  // namespace elementary
}  // namespace snf

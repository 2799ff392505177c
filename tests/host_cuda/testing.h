// What the kernel tests share: device arrays of any precision, comparison, and a count of failures.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "dense.h"

namespace testing {

inline double wide(float v) { return v; }
inline double wide(double v) { return v; }
inline double wide(__half v) { return __half2float(v); }
inline double wide(__nv_bfloat16 v) { return __bfloat162float(v); }
inline void narrow(float& to, double v) { to = static_cast<float>(v); }
inline void narrow(double& to, double v) { to = v; }
inline void narrow(__half& to, double v) { to = __float2half_rn(static_cast<float>(v)); }
inline void narrow(__nv_bfloat16& to, double v) { to = __float2bfloat16_rn(static_cast<float>(v)); }

// Numbers as a kernel reads them.
template <typename T>
std::vector<T> to_device(const dense::Numbers& values) {
  std::vector<T> out(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) narrow(out[i], values[i]);
  return out;
}

// Rounds to what a T can hold, so that the truth starts from the numbers that the kernel sees.
template <typename T>
dense::Numbers rounded(dense::Numbers values) {
  for (double& v : values) {
    T held;
    narrow(held, v);
    v = wide(held);
  }
  return values;
}

// Memory for an output, of not-a-number: what is not written shows.
template <typename T>
std::vector<T> poisoned(std::size_t count) {
  T nan;
  narrow(nan, std::numeric_limits<double>::quiet_NaN());
  return std::vector<T>(count, nan);
}

inline int& failures() {
  static int count = 0;
  return count;
}

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures();
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// The largest difference relative to the largest true element; not-a-number fails.
template <typename T>
void expect_close(
    const std::vector<T>& got, const dense::Numbers& truth, double tolerance,
    const std::string& what) {
  double scale = 1e-30, error = 0;
  expect(got.size() == truth.size(), what + ": another size");
  for (std::size_t i = 0; i < std::min(got.size(), truth.size()); ++i) {
    scale = std::max(scale, std::abs(truth[i]));
    const double difference = std::abs(wide(got[i]) - truth[i]);
    error = std::isnan(difference) ? INFINITY : std::max(error, difference);
  }
  expect(error <= tolerance * scale, what + ": relative error " + std::to_string(error / scale));
}

// Worst case allowed: the rounding of an output of type T, and of the sums behind it.
template <typename T>
constexpr double tolerance() {
  return sizeof(T) == 8 ? 1e-10 : sizeof(T) == 4 ? 2e-4 : 1e-2;
}

inline int report(const char* name, int cases) {
  std::printf("%s: %d cases, %s\n", name, cases, failures() == 0 ? "ok" : "FAILED");
  return failures() == 0 ? 0 : 1;
}

}  // namespace testing

// The few checks that the C++ tests need. A failed one prints and is counted; main returns
// `failures()`.
#pragma once

#include <ATen/ATen.h>

#include <cstdio>
#include <exception>
#include <string>

namespace expect {

inline int& failures() {
  static int count = 0;
  return count;
}

inline void that(bool holds, const std::string& what) {
  if (holds) return;
  ++failures();
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// |got - truth| <= tolerance * max(1, |truth|), by the largest element. Not-a-number fails.
inline void close(
    const at::Tensor& got, const at::Tensor& truth, double tolerance, const std::string& what) {
  if (got.sizes() != truth.sizes()) return that(false, what + ": another shape");
  if (truth.numel() == 0) return;
  const double scale = std::max(1.0, truth.abs().max().item<double>());
  const double error = (got.to(at::kDouble) - truth).abs().max().item<double>() / scale;
  that(error <= tolerance, what + ": relative error " + std::to_string(error));
}

// `call` throws an error whose text holds `part`.
template <typename Call>
void throws(const Call& call, const std::string& part, const std::string& what) {
  try {
    call();
  } catch (const std::exception& error) {
    const std::string text = error.what();
    return that(text.find(part) != std::string::npos, what + ": the error says " + text);
  }
  that(false, what + ": no error");
}

inline int report(const char* name) {
  std::printf("%s: %s\n", name, failures() == 0 ? "ok" : "FAILED");
  return failures() == 0 ? 0 : 1;
}

}  // namespace expect

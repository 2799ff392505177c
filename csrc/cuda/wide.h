// The type that a kernel computes in.
#pragma once

#include <type_traits>

namespace snf {

// Arithmetic is in float32, or in float64 where the tensors are.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace snf

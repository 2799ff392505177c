// Half precisions are computed in float32.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

#include "check.h"

namespace snf {

// A backward that is called under autocast would otherwise round its products.
struct WithoutAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

inline at::ScalarType wide_type(at::ScalarType type) {
  return type == at::kBFloat16 || type == at::kHalf ? at::kFloat : type;
}

inline at::Tensor wide(const at::Tensor& t) {
  return t.to(wide_type(t.scalar_type())).contiguous();
}

inline OptionalTensor wide(const OptionalTensor& t) {
  return t ? OptionalTensor(wide(*t)) : std::nullopt;
}

// A tensor of one number a sample, in a layer's wide type; empty stays empty.
inline OptionalTensor per_sample(const OptionalTensor& t, at::ScalarType type) {
  return t ? OptionalTensor(t->to(type).contiguous().flatten()) : std::nullopt;
}

}  // namespace snf

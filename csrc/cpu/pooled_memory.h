// Memory for large tensors, kept between steps.
#pragma once

#include <ATen/core/Tensor.h>

namespace snf {

// An uninitialised contiguous CPU tensor. A large one comes from a pool: training frees the tensors
// of a step only to allocate them again in the next, and taking fresh pages from the system each
// time costs up to a sixth of a linear layer's step. At most 256 MiB of freed memory are kept.
at::Tensor pooled_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace snf

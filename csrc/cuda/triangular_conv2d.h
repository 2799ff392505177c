// The substitution as its binding calls it: raw pointers, no torch. Only enqueues.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "wide.h"

namespace snf {

// Solves the lower system for x; with `reversed`, of images and x whose elements stand in reverse.
template <typename T>
struct TriangularArguments {
  const T* z;
  const Wide<T>* weight;  // [tap][input channel][output channel], the pixel's own tap last
  T* x;
  Wide<T>* workspace;  // triangular_workspace(...) numbers
  int64_t images;
  int channels, height, width, rows, columns;
  bool reversed;
};

// Zero where an image fits in shared memory.
template <typename T>
int64_t triangular_workspace(int64_t images, int channels, int height, int width);

// One kernel.
template <typename T>
void triangular_solve(const TriangularArguments<T>&, cudaStream_t);

}  // namespace snf

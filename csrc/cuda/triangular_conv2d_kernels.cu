// Launches of the substitution.
#include <algorithm>

#include "triangular_conv2d_kernels.cuh"

namespace snf {
namespace {

// What every device gives without being asked.
constexpr int64_t kSharedBytes = 48 * 1024;

}  // namespace

template <typename T>
int64_t triangular_workspace(int64_t images, int channels, int height, int width) {
  const int64_t size = int64_t{channels} * height * width;
  return size * static_cast<int64_t>(sizeof(Wide<T>)) <= kSharedBytes ? 0 : images * size;
}

template <typename T>
void triangular_solve(const TriangularArguments<T>& a, cudaStream_t stream) {
  const int warps = std::min({kMostWaveWarps, a.height, a.width});
  const std::size_t size = std::size_t(a.channels) * a.height * a.width;
  const std::size_t shared = a.workspace == nullptr ? size * sizeof(Wide<T>) : 0;
  launch(
      "triangular_wavefronts", triangular_wavefronts<T>, a.images, warps * kWarp, shared, stream,
      a);
}

#define SNF_INSTANTIATE(T)                                          \
  template int64_t triangular_workspace<T>(int64_t, int, int, int); \
  template void triangular_solve(const TriangularArguments<T>&, cudaStream_t);
SNF_INSTANTIATE(float)
SNF_INSTANTIATE(double)
SNF_INSTANTIATE(__half)
SNF_INSTANTIATE(__nv_bfloat16)

}  // namespace snf

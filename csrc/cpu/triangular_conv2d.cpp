// triangular_conv2d_solve on the CPU: substitution pixel after pixel, with one image a lane, so
// that vectors are full whatever the number of channels.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "../check.h"
#include "../host_device.h"
#include "../triangular.h"
#include "cpu_capability.h"

namespace snf {
namespace {

using at::Tensor;

template <typename T>
struct Solve {
  const T *z, *weight;  // weight as packed_lower gives it
  T* x;
  int64_t images, channels, height, width, rows, columns;
  bool upper;
  int64_t size() const { return channels * height * width; }
};

// What the pixels before add to N output channels of one pixel, taken from `sums`. N sums are in
// flight at a time, as each would wait for its own last product. The loops over ci are written out
// in full, since vectors may not pass through calls between functions of other instruction sets.
template <int N, typename T, typename Vector>
SNF_INLINE void take_neighbours(
    const Solve<T>& s, const Vector* solved, int64_t row, int64_t column, int64_t first,
    Vector* sums) {
  Vector sum[N];
  for (int n = 0; n < N; ++n) sum[n] = sums[n];
  for (int64_t a = std::max<int64_t>(0, s.rows - 1 - row); a < s.rows; ++a)
    for (int64_t b = std::max<int64_t>(0, s.columns - 1 - column); b < s.columns; ++b) {
      const int64_t tap = a * s.columns + b;
      if (tap == s.rows * s.columns - 1) break;  // the pixel itself
      const int64_t pixel = (row + a - s.rows + 1) * s.width + column + b - s.columns + 1;
      const Vector* in = solved + pixel * s.channels;
      const T* w = s.weight + tap * s.channels * s.channels + first;
      for (int64_t ci = 0; ci < s.channels; ++ci, w += s.channels)
        for (int n = 0; n < N; ++n) sum[n] -= w[n] * in[ci];
    }
  for (int n = 0; n < N; ++n) sums[n] = sum[n];
}

// One image a lane, from `first` on; `solved` has room for all pixels and channels of these.
template <typename T, int Bytes>
SNF_INLINE void solve_lanes(const Solve<T>& s, int64_t first, T* scratch) {
  typedef T Vector __attribute__((vector_size(Bytes)));
  constexpr int64_t kLanes = Bytes / sizeof(T);
  Vector* const solved = reinterpret_cast<Vector*>(scratch);
  const int64_t lanes = std::min(kLanes, s.images - first), pixels = s.height * s.width;
  const auto place = [&](int64_t lane, int64_t channel, int64_t pixel) {
    const int64_t i = channel * pixels + pixel;
    return (first + lane) * s.size() + (s.upper ? s.size() - 1 - i : i);
  };
  const T* own = s.weight + (s.rows * s.columns - 1) * s.channels * s.channels;
  for (int64_t row = 0; row < s.height; ++row)
    for (int64_t column = 0; column < s.width; ++column) {
      const int64_t pixel = row * s.width + column;
      Vector* const here = solved + pixel * s.channels;
      for (int64_t c = 0; c < s.channels; ++c) {
        T* const to = scratch + (pixel * s.channels + c) * kLanes;
        for (int64_t l = 0; l < kLanes; ++l) to[l] = l < lanes ? s.z[place(l, c, pixel)] : T(0);
      }
      int64_t c = 0;
      for (; c + 8 <= s.channels; c += 8) take_neighbours<8>(s, solved, row, column, c, here + c);
      for (; c + 2 <= s.channels; c += 2) take_neighbours<2>(s, solved, row, column, c, here + c);
      for (; c < s.channels; ++c) take_neighbours<1>(s, solved, row, column, c, here + c);
      for (int64_t ci = 0; ci < s.channels; ++ci) {
        const T* w = own + ci * s.channels;
        here[ci] /= w[ci];
        for (int64_t co = ci + 1; co < s.channels; ++co) here[co] -= w[co] * here[ci];
        const T* const from = scratch + (pixel * s.channels + ci) * kLanes;
        for (int64_t l = 0; l < lanes; ++l) s.x[place(l, ci, pixel)] = from[l];
      }
    }
}

template <typename T>
struct Path {
  int64_t lanes;
  void (*solve)(const Solve<T>&, int64_t first, T* scratch);
};

#if defined(__x86_64__)
template <typename T>
__attribute__((target("avx2,fma"))) void solve_avx2(const Solve<T>& s, int64_t first, T* scratch) {
  solve_lanes<T, 32>(s, first, scratch);
}
template <typename T>
__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))) void solve_avx512(
    const Solve<T>& s, int64_t first, T* scratch) {
  solve_lanes<T, 64>(s, first, scratch);
}
#endif
template <typename T>
void solve_baseline(const Solve<T>& s, int64_t first, T* scratch) {
  solve_lanes<T, 16>(s, first, scratch);
}

template <typename T>
Path<T> path() {
#if defined(__x86_64__)
  const CpuCapability level = cpu_capability_level();
  if (level == CpuCapability::avx512) return {64 / sizeof(T), solve_avx512<T>};
  if (level == CpuCapability::avx2) return {32 / sizeof(T), solve_avx2<T>};
#endif
  return {16 / sizeof(T), solve_baseline<T>};
}

Tensor solve(const Tensor& z, const Tensor& weight, bool upper) {
  check_triangular(z, weight);
  const Tensor z_ = wide(z), w = packed_lower(weight, upper);
  const Tensor x = at::empty_like(z_);
  AT_DISPATCH_FLOATING_TYPES(z_.scalar_type(), "triangular_conv2d_solve", [&] {
    const Solve<scalar_t> s = {
        z_.const_data_ptr<scalar_t>(),
        w.const_data_ptr<scalar_t>(),
        x.mutable_data_ptr<scalar_t>(),
        z.size(0),
        z.size(1),
        z.size(2),
        z.size(3),
        weight.size(2),
        weight.size(3),
        upper};
    const Path<scalar_t> path = snf::path<scalar_t>();
    const int64_t groups = (s.images + path.lanes - 1) / path.lanes;
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      const Tensor scratch = at::empty({s.size() * path.lanes}, z_.options());
      for (int64_t group = begin; group < end; ++group)
        path.solve(s, group * path.lanes, scratch.mutable_data_ptr<scalar_t>());
    });
  });
  return x.to(z.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, CPU, m) { m.impl("triangular_conv2d_solve", solve); }

}  // namespace snf

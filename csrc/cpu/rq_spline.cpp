// rq_spline on the CPU: shares tiles of the event out between threads; see rq_spline.inl.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <tuple>

#include "../check.h"
#include "../precision.h"
#include "../spline_binding.h"
#include "cpu_capability.h"
#include "pooled_memory.h"
#include "rq_spline_kernel.h"

namespace snf {

#define SNF_DECLARE(isa)                   \
  namespace isa::rq_spline {               \
  const SplinePath<float>& path_float();   \
  const SplinePath<double>& path_double(); \
  }
SNF_EACH_ISA(SNF_DECLARE)

template <>
const SplinePath<float>& spline_path<float>() {
  return SNF_ON_THIS_CPU(rq_spline::path_float());
}

template <>
const SplinePath<double>& spline_path<double>() {
  return SNF_ON_THIS_CPU(rq_spline::path_double());
}

namespace {

using at::Tensor;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the work is divided. Depends on shapes alone, and so does the order of every sum.
struct Plan {
  int64_t batch, columns, packed, width, rows, tiles, parts;

  explicit Plan(const Tensor& x) {
    batch = x.size(0);
    columns = batch == 0 ? 0 : x.numel() / batch;
    packed = std::max<int64_t>(1, kSplineLanes / std::max<int64_t>(columns, 1));
    packed = std::min(packed, std::max<int64_t>(batch, 1));
    width = packed * columns;
    rows = divide_up(batch, packed);
    tiles = divide_up(width, kSplineLanes);
    // Enough jobs for many threads, with enough rows to outweigh making the tables anew.
    constexpr int64_t kJobs = 64, kRows = 64;
    parts =
        tiles == 0 ? 0 : std::clamp<int64_t>(kJobs / tiles, 1, std::max<int64_t>(rows / kRows, 1));
  }

  template <typename T>
  void place(int64_t tile, int64_t part, SplineJob<T>& job) const {
    job.columns = columns;
    job.first = tile * kSplineLanes;
    job.stride = width;
    job.begin = rows * part / parts;
    job.end = rows * (part + 1) / parts;
    job.total = batch * columns;
    job.lanes = static_cast<int>(std::min<int64_t>(kSplineLanes, width - job.first));
    job.segment = static_cast<int>(packed == 1 ? job.lanes : columns);
  }
};

template <typename T>
std::unique_ptr<T[]> scratch(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(count)]);
}

template <typename T>
SplineJob<T> job_of(
    const Tensor& x, const Tensor& widths, const Tensor& heights, const Tensor& derivatives,
    double tail_bound, bool inverse, bool shared) {
  SplineJob<T> job = {};
  job.x = x.const_data_ptr<T>();
  job.widths = widths.const_data_ptr<T>();
  job.heights = heights.const_data_ptr<T>();
  job.derivatives = derivatives.const_data_ptr<T>();
  job.tail_bound = static_cast<T>(tail_bound);
  job.bins = static_cast<int>(widths.size(-1));
  job.inverse = inverse;
  job.shared = shared;
  return job;
}

// Calls `run` for every tile of every part.
template <typename Run>
void each_job(const Plan& plan, int64_t bins, const Run& run) {
  // A thread is worth waking for some ten thousand elements.
  const int64_t elements =
      plan.batch * plan.columns / std::max<int64_t>(1, plan.tiles * plan.parts);
  const int64_t grain = 1 + (1 << 13) / (1 + elements * bins / 4);
  at::parallel_for(0, plan.tiles * plan.parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i % plan.tiles, i / plan.tiles);
  });
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& widths, const Tensor& heights, const Tensor& derivatives,
    double tail_bound, bool inverse) {
  check_rq_spline(x, widths, heights, derivatives, tail_bound);
  const WithoutAutocast full_precision;
  const auto type = wide_type(x.scalar_type());
  const Tensor v = dense_as(x, type), w = dense_as(widths, type), h = dense_as(heights, type),
               d = dense_as(derivatives, type);
  const Tensor y = pooled_empty(x.sizes(), v.options());
  const Tensor log_abs_det = at::empty({x.size(0)}, v.options());
  const Plan plan(x);
  AT_DISPATCH_FLOATING_TYPES(type, "rq_spline", [&] {
    using T = scalar_t;
    const SplinePath<T>& path = spline_path<T>();
    const auto common = job_of<T>(v, w, h, d, tail_bound, inverse, is_shared(x, widths));
    const auto sums = scratch<T>(plan.tiles * plan.batch);
    T* const to = y.mutable_data_ptr<T>();
    each_job(plan, common.bins, [&](int64_t tile, int64_t part) {
      auto job = common;
      plan.place(tile, part, job);
      job.y = to;
      job.log_sums = sums.get() + tile * plan.batch;
      path.forward(job, scratch<T>(spline_scratch(job.bins)).get());
    });
    T* const total = log_abs_det.mutable_data_ptr<T>();
    std::fill(total, total + plan.batch, T(0));
    for (int64_t tile = 0; tile < plan.tiles; ++tile)
      for (int64_t b = 0; b < plan.batch; ++b) total[b] += sums[tile * plan.batch + b];
  });
  return {y.scalar_type() == x.scalar_type() ? y : y.to(x.scalar_type()), log_abs_det};
}

// The sums over parts, in order, and from them the gradients of shared parameters.
template <typename T>
void finish(const Plan& plan, const SplineJob<T>& common, T* sums, int64_t a_tile) {
  const SplinePath<T>& path = spline_path<T>();
  at::parallel_for(0, plan.tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      T* const total = sums + tile * a_tile;
      for (int64_t part = 1; part < plan.parts; ++part) {
        const T* const more = total + part * plan.tiles * a_tile;
        for (int64_t i = 0; i < a_tile; ++i) total[i] += more[i];
      }
      auto job = common;
      plan.place(tile, 0, job);
      job.table_gradients = total;
      path.finish(job, scratch<T>(spline_scratch(job.bins)).get());
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_log_abs_det, const Tensor& x,
    const Tensor& widths, const Tensor& heights, const Tensor& derivatives, double tail_bound,
    bool inverse, std::array<bool, 4> mask) {
  check_rq_spline(x, widths, heights, derivatives, tail_bound);
  const WithoutAutocast full_precision;
  const auto type = wide_type(x.scalar_type());
  const Tensor v = dense_as(x, type), w = dense_as(widths, type), h = dense_as(heights, type),
               d = dense_as(derivatives, type);
  const OptionalTensor gy = grad_y ? OptionalTensor(dense_as(*grad_y, type)) : std::nullopt;
  const OptionalTensor gl =
      grad_log_abs_det ? OptionalTensor(dense_as(*grad_log_abs_det, type)) : std::nullopt;
  const Plan plan(x);
  const std::array<Tensor, 4> inputs = {v, w, h, d};
  std::array<Tensor, 4> grads;
  // What was not asked for has no elements.
  for (int i = 0; i < 4; ++i)
    grads[i] = !mask[i]          ? at::empty({0}, v.options())
               : plan.tiles == 0 ? at::zeros(inputs[i].sizes(), v.options())
                                 : pooled_empty(inputs[i].sizes(), v.options());
  AT_DISPATCH_FLOATING_TYPES(type, "rq_spline_backward", [&] {
    using T = scalar_t;
    const SplinePath<T>& path = spline_path<T>();
    auto common = job_of<T>(v, w, h, d, tail_bound, inverse, is_shared(x, widths));
    const auto wanted = [&](int i) { return mask[i] ? grads[i].mutable_data_ptr<T>() : nullptr; };
    common.grad_y = gy ? gy->const_data_ptr<T>() : nullptr;
    common.grad_log = gl ? gl->const_data_ptr<T>() : nullptr;
    common.grad_x = wanted(0);
    common.grad_widths = wanted(1);
    common.grad_heights = wanted(2);
    common.grad_derivatives = wanted(3);
    const bool sum = common.shared && common.wants_parameters();
    const int64_t a_tile = 3 * (common.bins - 1) * kSplineLanes;
    const auto sums = scratch<T>(sum ? plan.tiles * plan.parts * a_tile : 0);
    each_job(plan, 3 * common.bins, [&](int64_t tile, int64_t part) {
      auto job = common;
      plan.place(tile, part, job);
      if (sum) job.table_gradients = sums.get() + (part * plan.tiles + tile) * a_tile;
      path.backward(job, scratch<T>(spline_scratch(job.bins)).get());
    });
    if (sum) finish(plan, common, sums.get(), a_tile);
  });
  if (type != x.scalar_type())
    for (Tensor& grad : grads) grad = grad.to(x.scalar_type());
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, CPU, m) {
  m.impl("rq_spline", forward);
  m.impl("rq_spline_backward", backward);
}

}  // namespace snf

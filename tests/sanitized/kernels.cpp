// The CPU's kernels, without torch, for one instruction set (-DISA=...): under AddressSanitizer for
// what they touch, under ThreadSanitizer for what their threads share. Buffers end where the
// tensors would, and every shape runs on threads of its own, whose scratch memory is made for it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "cpu/conv2d_kernel.h"
#include "cpu/image_network_kernel.h"
#include "cpu/rq_spline_kernel.h"
#include "elementwise.h"
#include "elementwise_math.h"

namespace snf::ISA {
const Conv2dPath<float>& choose_float(const Conv2dShape&, const Plane&);
const Conv2dPath<double>& choose_double(const Conv2dShape&, const Plane&);
const NetworkKernel<float>& network_float();
const NetworkKernel<double>& network_double();
template <typename Op, typename T>
void forward(const Op&, const ElementwiseForward<T, T>&, int64_t begin, int64_t end);
template <typename Op, typename T>
void backward(const Op&, const ElementwiseBackward<T, T>&, int64_t begin, int64_t end);
namespace rq_spline {
const SplinePath<float>& path_float();
const SplinePath<double>& path_double();
}  // namespace rq_spline
}  // namespace snf::ISA

namespace {

using namespace snf;

template <typename T>
using Numbers = std::vector<T>;

template <typename T>
Numbers<T> draw(int64_t count, T scale = 1) {
  static std::mt19937 engine(1);
  std::normal_distribution<T> normal(0, scale);
  Numbers<T> values(static_cast<size_t>(count));
  for (T& value : values) value = normal(engine);
  return values;
}

// As at::parallel_for, but always on that many new threads.
void parallel_for(int threads, int64_t end, const std::function<void(int64_t, int64_t)>& run) {
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i)
    all.emplace_back([&, i] { run(end * i / threads, end * (i + 1) / threads); });
  for (std::thread& one : all) one.join();
}

int failures = 0;

// The same bits for any number of threads, and numbers at all.
template <typename T>
void compare(const char* what, const std::function<Numbers<T>(int threads)>& run) {
  const Numbers<T> one = run(1), three = run(3);
  const bool finite = std::all_of(one.begin(), one.end(), [](T v) { return std::isfinite(v); });
  if (one == three && finite) return;
  ++failures;
  std::printf("%s: FAILED\n", what);
}

void append(auto& all, const auto& more) { all.insert(all.end(), more.begin(), more.end()); }

// ---- The convolution ---------------------------------------------------------------------------

template <typename T>
const Conv2dPath<T>& path_of(const Conv2dShape& shape, const Plane& plane) {
  if constexpr (sizeof(T) == 8)
    return ISA::choose_double(shape, plane);
  else
    return ISA::choose_float(shape, plane);
}

template <typename T>
struct Packed {
  Numbers<T> values;
  std::vector<int64_t> offsets;
  KernelSize size;
  Packed(
      const Conv2dPath<T>& path, const Conv2dShape& shape, const Plane& plane,
      const Numbers<T>& kernel, KernelSize size, bool flipped)
      : values(static_cast<size_t>(path.packed_size(shape, size.taps()))),
        offsets(tap_offsets(shape, plane, size)),
        size(size) {
    path.pack(shape, plane, kernel.data(), size.taps(), flipped, values.data());
  }
  PackedKernel<T> view() const { return {values.data(), offsets.data(), size}; }
};

template <typename T>
void convolution(const Conv2dShape& shape, int64_t batch) {
  const Plane plane(shape);
  const Conv2dPath<T>& path = path_of<T>(shape, plane);
  const int64_t size = batch * shape.channels * shape.pixels();
  const int64_t pairs = shape.channels * shape.per_group();
  const int64_t taps_w = shape.weight.taps(), taps_r = shape.inverse.taps();
  const Numbers<T> w = draw<T>(pairs * taps_w, T(0.2)), r = draw<T>(pairs * taps_r, T(0.2));
  const Numbers<T> x = draw<T>(size), dz = draw<T>(size), bias = draw<T>(shape.channels);
  const Numbers<T> q = draw<T>(batch);
  compare<T>("conv2d", [&](int threads) {
    Numbers<T> z(size), e(size), recon(batch), dx(size), dw(pairs * taps_w), dr(pairs * taps_r);
    const Packed<T> pw(path, shape, plane, w, shape.weight, false);
    const Packed<T> pr(path, shape, plane, r, shape.inverse, false);
    const Conv2dForward<T> forward = {shape,       plane,    pw.view(), pr.view(),   x.data(),
                                      bias.data(), z.data(), e.data(),  recon.data()};
    parallel_for(threads, batch, [&](int64_t a, int64_t b) { path.forward(forward, a, b); });
    const Packed<T> fw(path, shape, plane, w, shape.weight, true);
    const Packed<T> fr(path, shape, plane, r, shape.inverse, true);
    const Conv2dBackward<T> backward = {shape,     plane,    fw.view(), fr.view(),   dz.data(),
                                        q.data(),  x.data(), z.data(),  bias.data(), e.data(),
                                        dx.data(), T(0.5),   true,      true,        true};
    const int64_t size_w = path.gradient_size(shape, taps_w);
    const int64_t size_r = path.gradient_size(shape, taps_r);
    std::vector<Numbers<T>> sums_w(batch, Numbers<T>(size_w)), sums_r(batch, Numbers<T>(size_r));
    parallel_for(threads, batch, [&](int64_t a, int64_t b) {
      for (int64_t i = a; i < b; ++i)
        path.backward(backward, i, i + 1, sums_w[i].data(), sums_r[i].data());
    });
    for (int64_t i = 1; i < batch; ++i) {
      for (int64_t j = 0; j < size_w; ++j) sums_w[0][j] += sums_w[i][j];
      for (int64_t j = 0; j < size_r; ++j) sums_r[0][j] += sums_r[i][j];
    }
    path.unpack(shape, taps_w, sums_w[0].data(), dw.data());
    path.unpack(shape, taps_r, sums_r[0].data(), dr.data());
    for (const Numbers<T>* more : {&e, &recon, &dx, &dw, &dr}) append(z, *more);
    return z;
  });
}

template <typename T>
void convolutions() {
  for (const int64_t channels : {1, 2, 3, 6, 16, 24, 66})
    for (const auto& [height, width] : {std::pair{1, 1}, {1, 9}, {4, 3}, {5, 7}})
      for (const bool circular : {false, true})
        for (const auto& [w, r] : {std::pair{1, 1}, {3, 3}, {3, 5}, {5, 1}}) {
          if (channels * height * width * w * r > 4000) continue;
          const int64_t groups = channels % 3 == 0 && w != r ? 3 : 1;
          Conv2dShape shape = {
              channels,           groups, height, width, w == 3 && r == 5 ? 2 : 1, circular, {w, w},
              {r, r == 5 ? 3 : r}};
          if (shape.one_tap()) {
            shape.width = shape.pixels();
            shape.height = 1;
          }
          convolution<T>(shape, 4);
        }
}

// ---- Element by element ------------------------------------------------------------------------

template <typename Op, typename T>
void elementwise(
    const char* name, const Op& op, const ElementwiseShape& shape, int64_t parameters) {
  const int64_t size = shape.samples * shape.event();
  Numbers<T> x = draw<T>(size);
  for (T& v : x) v = std::abs(v) / (1 + std::abs(v));  // what a logit takes too
  const Numbers<T> first = draw<T>(parameters), dy = draw<T>(size), g = draw<T>(shape.samples);
  // A coupling's second parameters lie between the first.
  const bool between = shape.parameters.stride == 2 || shape.parameters.run > shape.length;
  const int64_t apart = shape.runs > 1 ? shape.length : 1;
  const Numbers<T> other = between ? Numbers<T>() : draw<T>(parameters);
  const T* second = between ? first.data() + apart : other.data();
  const bool shared = shape.parameters.sample == 0;
  compare<T>(name, [&](int threads) {
    Numbers<T> y(size), sums(shape.samples), dx(size);
    std::vector<int64_t> iterations(shape.samples);
    Numbers<T> d1(shared ? parameters * shape.samples : parameters), d2(between ? 0 : d1.size());
    const ElementwiseForward<T, T> in = {shape,    x.data(),    first.data(),     second,
                                         y.data(), sums.data(), iterations.data()};
    parallel_for(threads, shape.samples, [&](int64_t a, int64_t b) { ISA::forward(op, in, a, b); });
    const ElementwiseBackward<T, T> back = {
        shape,
        x.data(),
        first.data(),
        second,
        dy.data(),
        g.data(),
        dx.data(),
        parameters > 0 ? d1.data() : nullptr,
        between ? d1.data() + apart : d2.data()};
    parallel_for(
        threads, shape.samples, [&](int64_t a, int64_t b) { ISA::backward(op, back, a, b); });
    for (const Numbers<T>* more : {&sums, &dx, &d1, &d2}) append(y, *more);
    return y;
  });
}

template <typename T>
void elementwise_operators() {
  for (const int64_t length : {1, 5, 300}) {
    const ElementwiseShape plain = {4, 0, 1, length, {}, {}};
    elementwise<SmoothLeakyReLU, T>("leaky", SmoothLeakyReLU(0.3), plain, 0);
    elementwise<SmoothLeakyReLUInverse, T>("leaky inverse", SmoothLeakyReLUInverse(0.3), plain, 0);
    elementwise<Logit, T>("logit", Logit(0.05), plain, 0);
    elementwise<LogitInverse, T>("logit inverse", LogitInverse(0.05), plain, 0);
    elementwise<NormalLogProb, T>("normal", NormalLogProb(), plain, 0);
    const int64_t channels = 3;
    const Places each = {.sample = 0, .run = 1, .stride = 0};
    ElementwiseShape shape = {4, 0, channels, length, each, each};
    shape.gradients.sample = channels;
    elementwise<Actnorm, T>("actnorm", Actnorm(), shape, channels);
    elementwise<ActnormInverse, T>("actnorm inverse", ActnormInverse(), shape, channels);
    const Places own = {.sample = 2 * channels * length, .run = 2 * length, .stride = 1};
    shape = {4, 2 * length, channels, length, own, own};
    const int64_t parameters = 4 * own.sample;
    elementwise<AffineCoupling, T>("coupling", AffineCoupling(), shape, parameters);
    elementwise<AffineCouplingInverse, T>(
        "coupling inverse", AffineCouplingInverse(), shape, parameters);
  }
}

// ---- The spline --------------------------------------------------------------------------------

template <typename T>
const SplinePath<T>& spline() {
  if constexpr (sizeof(T) == 8)
    return ISA::rq_spline::path_double();
  else
    return ISA::rq_spline::path_float();
}

template <typename T>
void rational_quadratic(int64_t batch, int64_t columns, int bins, bool shared, bool inverse) {
  const int64_t size = batch * columns, sets = shared ? columns : size;
  const Numbers<T> x = draw<T>(size, 2), dy = draw<T>(size), g = draw<T>(batch);
  const Numbers<T> widths = draw<T>(sets * bins), heights = draw<T>(sets * bins);
  const Numbers<T> slopes = draw<T>(sets * (bins - 1));
  // As csrc/cpu/rq_spline.cpp divides the work, in one part.
  const int64_t packed = std::min(std::max<int64_t>(1, kSplineLanes / columns), batch);
  const int64_t width = packed * columns, rows = (batch + packed - 1) / packed;
  const int64_t tiles = (width + kSplineLanes - 1) / kSplineLanes;
  compare<T>("rq_spline", [&](int threads) {
    Numbers<T> y(size), sums(tiles * batch), dx(size);
    Numbers<T> dw(sets * bins), dh(sets * bins), dd(sets * (bins - 1));
    Numbers<T> tables(tiles * 3 * (bins - 1) * kSplineLanes);
    const auto job_of = [&](int64_t tile) {
      SplineJob<T> job = {};
      job.x = x.data(), job.widths = widths.data(), job.heights = heights.data();
      job.derivatives = slopes.data(), job.tail_bound = 3, job.bins = bins;
      job.inverse = inverse, job.shared = shared, job.columns = columns;
      job.first = tile * kSplineLanes, job.stride = width, job.begin = 0, job.end = rows;
      job.total = size;
      job.lanes = static_cast<int>(std::min<int64_t>(kSplineLanes, width - job.first));
      job.segment = static_cast<int>(packed == 1 ? job.lanes : columns);
      job.y = y.data(), job.log_sums = sums.data() + tile * batch;
      job.grad_y = dy.data(), job.grad_log = g.data(), job.grad_x = dx.data();
      job.grad_widths = dw.data(), job.grad_heights = dh.data(), job.grad_derivatives = dd.data();
      if (shared) job.table_gradients = tables.data() + tile * 3 * (bins - 1) * kSplineLanes;
      return job;
    };
    for (const auto run : {spline<T>().forward, spline<T>().backward, spline<T>().finish}) {
      if (run == spline<T>().finish && !shared) continue;
      parallel_for(threads, tiles, [&](int64_t a, int64_t b) {
        for (int64_t tile = a; tile < b; ++tile) {
          Numbers<T> scratch(spline_scratch(bins));
          run(job_of(tile), scratch.data());
        }
      });
    }
    for (const Numbers<T>* more : {&sums, &dx, &dw, &dh, &dd}) append(y, *more);
    return y;
  });
}

// ---- A coupling's network ----------------------------------------------------------------------

template <typename T>
void network(NetworkShape shape, int64_t batch) {
  const NetworkKernel<T>* kernel = nullptr;
  if constexpr (sizeof(T) == 8)
    kernel = &ISA::network_double();
  else
    kernel = &ISA::network_float();
  shape.padded = (shape.hidden + kernel->lanes - 1) / kernel->lanes * kernel->lanes;
  const Conv2dShape around = {1, 1, shape.height, shape.width, 1, false, {3, 3}, {3, 3}};
  const Plane plane(around);
  std::vector<int64_t> inputs, outputs, hidden, taps, mirrored;
  for (const int64_t tap : tap_offsets(around, plane, {3, 3})) {
    taps.push_back(tap * shape.padded);
    mirrored.push_back(-tap * shape.padded);
  }
  for (int64_t i = 0; i < shape.inputs; ++i)
    for (const int64_t tap : tap_offsets(around, plane, {3, 3}))
      inputs.push_back(i * plane.size + tap);
  for (int64_t o = 0; o < shape.outputs; ++o)
    for (const int64_t tap : tap_offsets(around, plane, {3, 3}))
      outputs.push_back(o * plane.size - tap);
  for (int64_t h = 0; h < shape.hidden; ++h) hidden.push_back(h);
  const int64_t size = NetworkRows<T>::size(shape), pixels = shape.pixels();
  Numbers<T> weights(size), transposed = draw<T>(shape.hidden * shape.padded, T(0.2));
  const NetworkRows<T> rows(shape, weights.data());
  for (int64_t row = 0; row < (size - shape.outputs) / shape.padded; ++row) {
    const Numbers<T> drawn = draw<T>(shape.hidden, T(0.2));
    std::copy(drawn.begin(), drawn.end(), weights.begin() + row * shape.padded);
  }
  const Numbers<T> x = draw<T>(batch * shape.inputs * pixels);
  const Numbers<T> dy = draw<T>(batch * shape.outputs * pixels);
  compare<T>("image_network", [&](int threads) {
    const NetworkStep<T> step = {
        shape,
        plane,
        {inputs.data(), outputs.data(), hidden.data(), taps.data(), mirrored.data()},
        rows,
        transposed.data(),
        x.data(),
        shape.inputs * pixels};
    Numbers<T> y(batch * shape.outputs * pixels), dx(x.size());
    std::vector<Numbers<T>> grads(batch, Numbers<T>(size));
    parallel_for(
        threads, batch, [&](int64_t a, int64_t b) { kernel->forward(step, a, b, y.data()); });
    parallel_for(threads, batch, [&](int64_t a, int64_t b) {
      for (int64_t i = a; i < b; ++i)
        kernel->backward(step, i, i + 1, dy.data(), dx.data(), grads[i].data());
    });
    append(y, dx);
    for (const Numbers<T>& one : grads) append(y, one);
    return y;
  });
}

template <typename T>
void all() {
  convolutions<T>();
  elementwise_operators<T>();
  for (const int64_t columns : {1, 3, 30, 70, 150})
    for (const int bins : {1, 2, 5})
      for (const bool shared : {true, false})
        for (const bool inverse : {false, true})
          rational_quadratic<T>(7, columns, bins, shared, inverse);
  for (const int64_t hidden : {1, 5, 16, 33})
    for (const auto& [height, width] : {std::pair<int64_t, int64_t>{1, 1}, {4, 5}, {2, 13}})
      network<T>({2, hidden, 3, height, width, 0}, 4);
}

}  // namespace

int main() {
  all<float>();
  all<double>();
  std::printf("%d failed, %s\n", failures, failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

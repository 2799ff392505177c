// The spline's kernels against its formulas in float64, gradients against numerical derivatives.
// Sizes fit nothing evenly; some samples take several blocks, some batches several parts.
// Argument: a seed; or --few, for a short run in two types.
#include "rq_spline.h"

#include <cstdlib>

#include "host_cuda.h"
#include "testing.h"

namespace {

using dense::Numbers;
using snf::SplineShape;
using snf::Wide;
using testing::expect;
using testing::expect_close;
using testing::poisoned;

constexpr double kBound = 3;
constexpr int64_t kMultiprocessors = 3;
int cases = 0;

// ---- The formulas, as published ----------------------------------------------------------------

struct Knots {
  Numbers x, y, slopes;
};

Numbers places(const double* raw, int bins) {
  Numbers out = {-kBound};
  double total = 0, sum = 0;
  for (int k = 0; k < bins; ++k) total += std::exp(raw[k]);
  for (int k = 0; k < bins; ++k) {
    sum += 1e-3 + (1 - 1e-3 * bins) * std::exp(raw[k]) / total;
    out.push_back(2 * kBound * sum - kBound);
  }
  out.back() = kBound;
  return out;
}

Knots knots_of(const double* widths, const double* heights, const double* derivatives, int bins) {
  Knots out = {places(widths, bins), places(heights, bins), {1}};
  const double shift = std::log(std::exp(1 - 1e-3) - 1);
  for (int k = 0; k + 1 < bins; ++k)
    out.slopes.push_back(1e-3 + std::log1p(std::exp(derivatives[k] + shift)));
  out.slopes.push_back(1);
  return out;
}

struct Pair {
  double value, log_slope;
};

Pair forward(const Knots& at, double x) {
  if (!(std::abs(x) <= kBound)) return {x, 0};
  std::size_t k = 0;
  while (k + 2 < at.x.size() && x >= at.x[k + 1]) ++k;
  const double w = at.x[k + 1] - at.x[k], h = at.y[k + 1] - at.y[k], s = h / w;
  const double t = (x - at.x[k]) / w, d0 = at.slopes[k], d1 = at.slopes[k + 1];
  const double below = s + (d0 + d1 - 2 * s) * t * (1 - t);
  const double above = h * (s * t * t + d0 * t * (1 - t));
  const double m = d1 * t * t + 2 * s * t * (1 - t) + d0 * (1 - t) * (1 - t);
  return {at.y[k] + above / below, std::log(s * s * m / (below * below))};
}

// By bisection: no formula is shared with the kernel's.
Pair inverse(const Knots& at, double y) {
  if (!(std::abs(y) <= kBound)) return {y, 0};
  double low = -kBound, high = kBound;
  for (int i = 0; i < 80; ++i) {
    const double middle = (low + high) / 2;
    (forward(at, middle).value > y ? high : low) = middle;
  }
  return {low, -forward(at, low).log_slope};
}

// To fourth order; on the side of 0 alone and to second order where `end` is an end's place.
template <typename Function>
double derivative(const Function& f, double at, double end) {
  if (end != 0) {
    const double h = end > 0 ? -1e-6 : 1e-6;
    return (-3 * f(at) + 4 * f(at + h) - f(at + 2 * h)) / (2 * h);
  }
  constexpr double h = 2e-5;
  return (8 * (f(at + h) - f(at - h)) - (f(at + 2 * h) - f(at - 2 * h))) / (12 * h);
}

// ---- One case ----------------------------------------------------------------------------------

template <typename T>
struct Drawn {
  std::vector<T> device;
  Numbers exact;
  Drawn(std::mt19937& engine, std::size_t count, double scale = 1) {
    Numbers values = dense::draw(engine, count);
    for (double& v : values) v *= scale;
    device = testing::to_device<T>(values);
    for (const T v : device) exact.push_back(testing::wide(v));
  }
  void set(int64_t n, double value) {
    testing::narrow(device[n], value);
    exact[n] = testing::wide(device[n]);
  }
};

bool near_knot(const Numbers& knots, double v) {
  if (std::abs(v) == kBound) return false;  // whose derivative is taken on one side
  for (std::size_t k = 0; k < knots.size(); ++k)
    if (std::abs(knots[k] - v) < 1e-3) return true;
  return false;
}

template <typename Call>
void launching(int64_t kernels, const std::string& name, const Call& call) {
  const int64_t before = host_cuda::launches();
  call();
  expect(host_cuda::launches() - before == kernels, name + "number of launches");
  ++cases;
}

struct Run {
  SplineShape shape;
  bool wants_x = true, wants_parameters = true, value_gradient = true, log_gradient = true;
};

template <typename T>
void run(std::mt19937& engine, const Run& r) {
  using W = Wide<T>;
  const SplineShape& s = r.shape;
  const int bins = s.bins, inner = bins - 1;
  const int64_t count = s.samples * s.event, sets = s.shared ? s.event : count;
  const std::string name = std::to_string(sizeof(T)) + " bytes, " + std::to_string(s.samples) +
                           "x" + std::to_string(s.event) + ", " + std::to_string(bins) + " bins" +
                           (s.shared ? ", shared" : "") + (s.inverse ? ", inverse: " : ": ");
  Drawn<T> x(engine, count, 2);
  const Drawn<T> grad(engine, count), widths(engine, sets * bins, 0.5),
      heights(engine, sets * bins, 0.5), derivatives(engine, sets * inner);
  const Drawn<W> grad_log(engine, s.samples);
  // At the ends, and outside.
  const double special[] = {kBound, -kBound, INFINITY, 3.5};
  for (int64_t i = 0; i < 4 && 7 * i + 5 < count; ++i) x.set(7 * i + 5, special[i]);

  Numbers y, logs(s.samples), dx, dw(sets * bins), dh(sets * bins), dd(sets * inner);
  const auto function = s.inverse ? inverse : forward;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t b = n / s.event, set = s.shared ? n % s.event : n;
    Numbers raw[3] = {
        {widths.exact.begin() + set * bins, widths.exact.begin() + (set + 1) * bins},
        {heights.exact.begin() + set * bins, heights.exact.begin() + (set + 1) * bins},
        {derivatives.exact.begin() + set * inner, derivatives.exact.begin() + (set + 1) * inner}};
    const auto value = [&](double v) {
      return function(knots_of(raw[0].data(), raw[1].data(), raw[2].data(), bins), v);
    };
    // The gradient jumps at a knot, where a numerical derivative is none.
    const Knots at = knots_of(raw[0].data(), raw[1].data(), raw[2].data(), bins);
    while (near_knot(s.inverse ? at.y : at.x, x.exact[n])) x.set(n, x.exact[n] + 0.02);
    const double v = x.exact[n];
    const Pair got = value(v);
    y.push_back(got.value);
    logs[b] += got.log_slope;
    const double dy = r.value_gradient ? grad.exact[n] : 0,
                 dl = r.log_gradient ? grad_log.exact[b] : 0;
    if (!(std::abs(v) <= kBound)) {
      dx.push_back(dy);
      continue;
    }
    const auto loss = [&](double at) {
      const Pair p = value(at);
      return dy * p.value + dl * p.log_slope;
    };
    dx.push_back(derivative(loss, v, std::abs(v) == kBound ? v : 0));
    if (!r.wants_parameters) continue;
    Numbers* const to[3] = {&dw, &dh, &dd};
    for (int kind = 0; kind < 3; ++kind)
      for (std::size_t k = 0; k < raw[kind].size(); ++k) {
        double& p = raw[kind][k];
        const double kept = p;
        const auto loss_of_p = [&](double changed) {
          p = changed;
          return loss(v);
        };
        (*to[kind])[set * raw[kind].size() + k] += derivative(loss_of_p, kept, 0);
        p = kept;
      }
  }

  const snf::SplineInputs<T> from = {
      x.device.data(), widths.device.data(), heights.device.data(), derivatives.device.data()};
  const bool parts = s.event > 4096;
  auto to_y = poisoned<T>(count);
  auto to_logs = poisoned<W>(s.samples);
  auto work = poisoned<W>(snf::spline_forward_workspace(s));
  launching(1 + s.shared + parts, name + "forward, ", [&] {
    snf::spline_forward<T>(s, from, to_y.data(), to_logs.data(), work.data(), nullptr);
  });
  for (int64_t n = 0; n < count; ++n)
    if (std::isinf(y[n])) {
      expect(testing::wide(to_y[n]) == y[n], name + "an infinity");
      y[n] = 0;
      testing::narrow(to_y[n], 0);
    }
  expect_close(to_y, y, testing::tolerance<T>(), name + "y");
  if (bins > 1) expect_close(to_logs, logs, testing::tolerance<W>(), name + "log_abs_det");
  if (bins == 1)  // the identity
    for (const W v : to_logs) expect(std::abs(v) < testing::tolerance<W>(), name + "log_abs_det");

  auto to_x = poisoned<T>(count), to_w = poisoned<T>(sets * bins), to_h = to_w,
       to_d = poisoned<T>(sets * inner);
  snf::SplineGradients<T> g = {
      r.value_gradient ? grad.device.data() : nullptr,
      r.log_gradient ? grad_log.device.data() : nullptr, r.wants_x ? to_x.data() : nullptr};
  if (r.wants_parameters) {
    g.widths = to_w.data();
    g.heights = to_h.data();
    g.derivatives = inner > 0 ? to_d.data() : nullptr;
  }
  work = poisoned<W>(snf::spline_backward_workspace(s, kMultiprocessors));
  launching(s.shared ? 2 + r.wants_parameters : 1, name + "backward, ", [&] {
    snf::spline_backward<T>(s, from, g, work.data(), kMultiprocessors, nullptr);
  });
  // Numerical derivatives have nine digits or so.
  const double tolerance = std::max(testing::tolerance<T>(), 1e-8);
  if (r.wants_x) expect_close(to_x, dx, tolerance, name + "dx");
  if (!r.wants_parameters) return;
  if (bins == 1) {  // whose one size is fixed
    for (const T v : to_w) expect(testing::wide(v) == 0, name + "dwidths");
    for (const T v : to_h) expect(testing::wide(v) == 0, name + "dheights");
    return;
  }
  expect_close(to_w, dw, tolerance, name + "dwidths");
  expect_close(to_h, dh, tolerance, name + "dheights");
  expect_close(to_d, dd, tolerance, name + "dderivatives");
}

template <typename T>
void all(std::mt19937& engine, bool few) {
  struct Size {
    int64_t samples;
    int event, bins;
  };
  // All types run the same code: one of them meets every size and every combination.
  std::vector<Size> sizes = {{1, 77, 2}, {33, 35, 5}};
  if (!few) sizes.insert(sizes.end(), {{1, 1, 5}, {29, 1, 8}, {37, 3, 1}, {7, 131, 8}, {3, 9, 33}});
  for (const bool inverse : {false, true})
    for (const bool shared : {true, false}) {
      for (const Size& z : sizes)
        run<T>(engine, {{z.samples, z.event, z.bins, kBound, inverse, shared}});
      if (few) continue;
      Run r = {{2, 4099, 2, kBound, inverse, shared}};  // several blocks
      r.wants_parameters = false;
      run<T>(engine, r);
      r = {{9, 5, 5, kBound, inverse, shared}};
      r.wants_x = false;
      run<T>(engine, r);
      r.value_gradient = false;
      run<T>(engine, r);
      r.value_gradient = true;
      r.log_gradient = false;
      run<T>(engine, r);
    }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string argument = count > 1 ? arguments[1] : "0";
  const bool few = argument == "--few";
  std::mt19937 engine(few ? 0 : std::atoi(argument.c_str()));
  all<float>(engine, few);
  all<__half>(engine, true);
  if (!few) {
    all<double>(engine, true);
    all<__nv_bfloat16>(engine, true);
  }
  return testing::report("rq_spline", cases);
}

// The element-wise operators' kernels against their formulas in float64, gradients against
// numerical derivatives. Sizes fit nothing evenly, and some samples take several blocks. Argument:
// a seed.
#include "elementwise.h"

#include <cstdlib>
#include <functional>

#include "../elementwise_math.h"
#include "host_cuda.h"
#include "testing.h"

namespace {

using dense::Numbers;
using snf::ElementwiseShape;
using snf::Wide;
using testing::expect;
using testing::expect_close;
using testing::poisoned;

int cases = 0;

// y and log |dy/dx| of x and the two parameters.
struct Pair {
  double y, log_slope;
};
using Formula = std::function<Pair(double, double, double)>;

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

Formula leaky(double a) {
  return [a](double x, double, double) {
    return Pair{a * x + (1 - a) * softplus(x), std::log(a + (1 - a) * sigmoid(x))};
  };
}
Formula leaky_inverse(double a) {
  return [a](double z, double, double) {
    double low = -1e3, high = 1e3;
    for (int i = 0; i < 100; ++i) {
      const double middle = (low + high) / 2;
      (leaky(a)(middle, 0, 0).y > z ? high : low) = middle;
    }
    return Pair{high, -leaky(a)(high, 0, 0).log_slope};
  };
}
Formula logit(double a) {
  return [a](double x, double, double) {
    const double s = a + (1 - 2 * a) * x;
    return Pair{std::log(s / (1 - s)), std::log((1 - 2 * a) / (s * (1 - s)))};
  };
}
Formula logit_inverse(double a) {
  return [a](double y, double, double) {
    const double s = sigmoid(y);
    return Pair{(s - a) / (1 - 2 * a), std::log(s * (1 - s) / (1 - 2 * a))};
  };
}
const Formula kActnorm = [](double x, double c, double s) {
  return Pair{(x - c) / std::exp(s), -s};
};
const Formula kActnormInverse = [](double x, double c, double s) {
  return Pair{x * std::exp(s) + c, s};
};
const Formula kCoupling = [](double x, double raw, double t) {
  const double l = 2 * std::tanh(raw / 2);
  return Pair{x * std::exp(l) + t, l};
};
const Formula kCouplingInverse = [](double x, double raw, double t) {
  const double l = 2 * std::tanh(raw / 2);
  return Pair{(x - t) / std::exp(l), -l};
};
const Formula kNormal = [](double z, double, double) {
  return Pair{0, -0.5 * z * z - 0.5 * std::log(2 * std::acos(-1.0))};
};

template <typename T>
struct Drawn {
  std::vector<T> device;
  Numbers exact;
  Drawn(std::mt19937& engine, std::size_t count, bool unit = false) {
    Numbers values = dense::draw(engine, count);
    if (unit)
      for (double& v : values) v = 0.1 + 0.8 * sigmoid(v);
    device = testing::to_device<T>(values);
    for (const T v : device) exact.push_back(testing::wide(v));
  }
};

template <typename Call>
void launching(int64_t kernels, const std::string& name, const Call& call) {
  const int64_t before = host_cuda::launches();
  call();
  expect(host_cuda::launches() - before == kernels, name + ": number of launches");
  ++cases;
}

// One operator, forward and backward. numbers: of each parameter; apart: from first to second in
// one array of both, 0 where they are two. wanted: gradients of x, of the parameters.
struct Run {
  std::string name;
  ElementwiseShape shape;
  int64_t numbers = 0, apart = 0;
  bool unit = false, wants_x = true, wants_parameters = true, log_gradient = true;
};

template <typename T, typename Op>
void run(std::mt19937& engine, const Op& op, const Formula& formula, const Run& r) {
  using W = Wide<T>;
  const ElementwiseShape& s = r.shape;
  const std::string name = r.name + " " + std::to_string(sizeof(T)) + " bytes, " +
                           std::to_string(s.samples) + "x" + std::to_string(s.event()) + ": ";
  const int64_t event = s.event(), count = s.samples * event;
  const Drawn<T> x(engine, count, r.unit), grad_y(engine, count), one(engine, r.numbers),
      other(engine, r.numbers);
  const Drawn<W> grad_log(engine, s.samples);
  const T *first = one.device.data(), *second = r.apart ? first + r.apart : other.device.data();
  const Numbers& second_exact = r.apart ? one.exact : other.exact;

  Numbers y, logs(s.samples), dx, d_one(r.numbers), d_other(r.numbers);
  Numbers& d_second = r.apart ? d_one : d_other;
  for (int64_t b = 0; b < s.samples; ++b)
    for (int64_t e = 0; e < event; ++e) {
      const double v = x.exact[b * event + e], dy = Op::kOutput ? grad_y.exact[b * event + e] : 0;
      if (e < s.kept) {
        y.push_back(v);
        dx.push_back(dy);
        continue;
      }
      const int64_t run = (e - s.kept) / s.length, i = (e - s.kept) % s.length;
      const int64_t at = b * s.parameters.sample + run * s.parameters.run + i * s.parameters.stride;
      const double p = r.numbers ? one.exact[at] : 0,
                   q = r.numbers ? second_exact[at + r.apart] : 0;
      const Pair value = formula(v, p, q);
      y.push_back(value.y);
      logs[b] += value.log_slope;
      const double g = r.log_gradient ? grad_log.exact[b] : 0, h = 1e-5;
      const auto loss = [&](double v, double p, double q) {
        const Pair f = formula(v, p, q);
        return dy * f.y + g * f.log_slope;
      };
      dx.push_back((loss(v + h, p, q) - loss(v - h, p, q)) / (2 * h));
      if (r.numbers == 0) continue;
      d_one[at] += (loss(v, p + h, q) - loss(v, p - h, q)) / (2 * h);
      d_second[at + r.apart] += (loss(v, p, q + h) - loss(v, p, q - h)) / (2 * h);
    }

  const int64_t parts = snf::elementwise_parts(s);
  auto to_y = poisoned<T>(Op::kOutput ? count : 0);
  auto sums = poisoned<W>(s.samples * parts);
  std::vector<int64_t> iterations(s.samples * parts, -1);
  launching(1, name, [&] {
    snf::elementwise_forward<Op, T>(
        op,
        {s, x.device.data(), first, second, to_y.data(), sums.data(),
         Op::kSolves ? iterations.data() : nullptr},
        nullptr);
  });
  std::vector<W> totals(s.samples);
  for (int64_t i = 0; i < s.samples * parts; ++i) totals[i / parts] += sums[i];
  if (Op::kOutput) expect_close(to_y, y, testing::tolerance<T>(), name + "y");
  expect_close(totals, logs, testing::tolerance<W>(), name + "log_abs_det");
  for (const int64_t n : iterations)
    expect(Op::kSolves ? n >= 1 && n <= 15 : n == -1, name + "iterations " + std::to_string(n));

  // The inverse's backward starts from the root, which a narrow type has rounded.
  const std::vector<T>& from = Op::kSolves ? to_y : x.device;
  auto to_x = poisoned<T>(count);
  auto to_one = poisoned<T>(r.numbers), to_other = poisoned<T>(r.apart ? 0 : r.numbers);
  const bool parameters = r.numbers > 0 && r.wants_parameters;
  const snf::ElementwiseBackward<T, W> backward = {
      s,
      from.data(),
      first,
      second,
      Op::kOutput ? grad_y.device.data() : nullptr,
      r.log_gradient ? grad_log.device.data() : nullptr,
      r.wants_x ? to_x.data() : nullptr,
      parameters ? to_one.data() : nullptr,
      !parameters ? nullptr
      : r.apart   ? to_one.data() + r.apart
                  : to_other.data()};
  const bool shared = r.numbers > 0 && s.parameters.sample == 0;
  if constexpr (std::is_same_v<Op, snf::Actnorm> || std::is_same_v<Op, snf::ActnormInverse>) {
    if (shared && parameters) {
      auto work = poisoned<W>(snf::channel_workspace(s, 3));
      launching(
          2, name, [&] { snf::channel_backward<Op, T>(op, backward, work.data(), 3, nullptr); });
    }
  }
  if (!(shared && parameters))
    launching(1, name, [&] { snf::elementwise_backward<Op, T>(op, backward, nullptr); });
  // Numerical derivatives have ten digits or so.
  const double tolerance = std::max(testing::tolerance<T>(), 1e-8);
  if (r.wants_x) expect_close(to_x, dx, tolerance, name + "dx");
  if (!parameters) return;
  expect_close(to_one, d_one, tolerance, name + "dfirst");
  if (!r.apart) expect_close(to_other, d_other, tolerance, name + "dsecond");
}

ElementwiseShape plain(int64_t samples, int64_t length) {
  return {.samples = samples, .length = length};
}

// As csrc/elementwise_binding.h lays them out.
Run actnorm(int64_t samples, int64_t channels, int64_t pixels) {
  ElementwiseShape s = {.samples = samples, .runs = channels, .length = pixels};
  s.parameters.run = 1;
  if (pixels == 1) {
    s.runs = 1;
    s.length = channels;
    s.parameters.stride = 1;
  }
  s.gradients = s.parameters;
  s.gradients.sample = channels;
  return {.name = "actnorm", .shape = s, .numbers = channels};
}

Run coupling(int64_t samples, int64_t kept, int64_t changed, int64_t pixels) {
  ElementwiseShape s = {
      .samples = samples, .kept = kept * pixels, .runs = changed, .length = pixels};
  s.parameters = {2 * changed * pixels, 2 * pixels, 1};
  if (pixels == 1) {
    s.runs = 1;
    s.length = changed;
    s.parameters.stride = 2;
  }
  s.gradients = s.parameters;
  return {"coupling", s, samples * 2 * changed * pixels, pixels};
}

template <typename T>
void all(std::mt19937& engine) {
  for (const ElementwiseShape& s : {plain(1, 1), plain(3, 333), plain(2, 4097), plain(2, 9001)}) {
    for (const double a : {0.3, 0.05}) {
      run<T>(engine, snf::SmoothLeakyReLU(a), leaky(a), {"leaky", s});
      run<T>(engine, snf::SmoothLeakyReLUInverse(a), leaky_inverse(a), {"leaky inverse", s});
      run<T>(engine, snf::Logit(a), logit(a), {.name = "logit", .shape = s, .unit = true});
      run<T>(engine, snf::LogitInverse(a), logit_inverse(a), {"logit inverse", s});
    }
    run<T>(engine, snf::NormalLogProb(), kNormal, {"normal", s});
  }
  run<T>(
      engine, snf::SmoothLeakyReLU(0.3), leaky(0.3),
      {.name = "leaky, without a gradient of log_abs_det",
       .shape = plain(2, 77),
       .log_gradient = false});
  for (Run r : {actnorm(1, 1, 1), actnorm(33, 7, 1), actnorm(5, 3, 35), actnorm(2, 300, 31)}) {
    run<T>(engine, snf::Actnorm(), kActnorm, r);
    run<T>(engine, snf::ActnormInverse(), kActnormInverse, r);
    r.wants_x = false;
    run<T>(engine, snf::Actnorm(), kActnorm, r);
    r.wants_x = true;
    r.wants_parameters = false;
    run<T>(engine, snf::ActnormInverse(), kActnormInverse, r);
  }
  for (Run r :
       {coupling(1, 0, 1, 1), coupling(7, 2, 3, 1), coupling(3, 3, 2, 35),
        coupling(2, 5, 4, 999)}) {
    run<T>(engine, snf::AffineCoupling(), kCoupling, r);
    run<T>(engine, snf::AffineCouplingInverse(), kCouplingInverse, r);
    r.wants_x = false;
    run<T>(engine, snf::AffineCoupling(), kCoupling, r);
    r.wants_x = true;
    r.wants_parameters = false;
    run<T>(engine, snf::AffineCouplingInverse(), kCouplingInverse, r);
  }
}

}  // namespace

int main(int count, char** arguments) {
  std::mt19937 engine(count > 1 ? std::atoi(arguments[1]) : 0);
  all<float>(engine);
  all<double>(engine);
  all<__half>(engine);
  all<__nv_bfloat16>(engine);
  return testing::report("elementwise", cases);
}

// The element-wise kernels against what they say they compute; the linear layer's step and the
// convolution's inverse term, put together from them, against dense matrices. Sizes fit nothing
// evenly. Argument: a seed.
#include <cstdlib>
#include <stdexcept>

#include "conv2d.h"
#include "device.cuh"
#include "host_cuda.h"
#include "pointwise.h"
#include "testing.h"

namespace {

using dense::Matrix;
using dense::Numbers;
using snf::Wide;
using testing::expect;
using testing::expect_close;
using testing::poisoned;
using testing::to_device;

int cases = 0;

// Numbers as a T holds them, and as the truth starts from.
template <typename T>
struct Drawn {
  std::vector<T> device;
  Numbers exact;
  Drawn(std::mt19937& engine, std::size_t count, double scale = 1)
      : device(to_device<T>(dense::draw(engine, count, scale))) {
    for (const T v : device) exact.push_back(testing::wide(v));
  }
  const T* data() const { return device.data(); }
};

template <typename T>
double sum(const Drawn<T>& values) {
  double total = 0;
  for (const double v : values.exact) total += v;
  return total;
}

// Runs `call`, which must start so many kernels.
template <typename Call>
void launching(int64_t kernels, const std::string& name, const Call& call) {
  const int64_t before = host_cuda::launches();
  call();
  expect(host_cuda::launches() - before == kernels, name + ": number of launches");
  ++cases;
}

// ---- Forward -----------------------------------------------------------------------------------

template <typename T>
void residual(
    std::mt19937& engine, int64_t rows, int columns, int period, bool bias, bool in_place,
    bool reconstruct = true) {
  using W = Wide<T>;
  const std::string name = "residual " + std::to_string(sizeof(T)) + " bytes, " +
                           std::to_string(rows) + "x" + std::to_string(columns) + ": ";
  const std::size_t count = rows * columns;
  const Drawn<T> x(engine, count), c(engine, (columns + period - 1) / period);
  Drawn<W> reconstruction(engine, count), y(engine, count);
  Numbers z_truth, residual_truth, recon_truth(rows);
  for (std::size_t i = 0; i < count; ++i) {
    z_truth.push_back(y.exact[i] + (bias ? c.exact[i % columns / period] : 0));
    residual_truth.push_back(reconstruction.exact[i] - x.exact[i]);
    recon_truth[i / columns] += residual_truth[i] * residual_truth[i];
  }

  auto z = poisoned<T>(count);
  auto error = poisoned<W>(count), log_det = poisoned<W>(rows), recon = poisoned<W>(rows);
  auto work = poisoned<W>(snf::residual_workspace(rows, columns));
  T* to_z = z.data();
  if constexpr (std::is_same_v<T, W>)
    if (in_place) to_z = y.device.data();
  W* const to_error = in_place ? reconstruction.device.data() : error.data();
  launching(columns > snf::kRowPart ? 2 : 1, name, [&] {
    snf::residual<T>(
        {reconstruct ? reconstruction.data() : nullptr, y.data(), x.data(),
         bias ? c.data() : nullptr, to_z, reconstruct ? to_error : nullptr, log_det.data(),
         recon.data(), work.data(), rows, columns, period},
        nullptr);
  });
  if (in_place) error = reconstruction.device;
  if constexpr (std::is_same_v<T, W>)
    if (in_place) z = y.device;
  expect_close(z, z_truth, testing::tolerance<T>(), name + "z");
  expect(log_det == std::vector<W>(rows, 0), name + "log_det");
  if (!reconstruct) return expect(recon == std::vector<W>(rows, 0), name + "recon");
  expect_close(error, residual_truth, testing::tolerance<W>(), name + "residual");
  expect_close(recon, recon_truth, testing::tolerance<W>(), name + "recon");
}

void row_sums(std::mt19937& engine) {
  for (const int rows : {1, 9, 70})
    for (const int columns : {1, 31, 33, 300}) {
      const std::string name = "row sums of " + std::to_string(columns);
      const Drawn<float> in(engine, rows * columns);
      Numbers truth(rows);
      for (int i = 0; i < rows * columns; ++i) truth[i / columns] += in.exact[i];
      auto out = poisoned<float>(rows);
      launching(
          1, name, [&] { snf::row_sums<float>(in.data(), columns, out.data(), rows, nullptr); });
      expect_close(out, truth, 2e-4, name);
    }
}

// ---- Backward ----------------------------------------------------------------------------------

enum Output { kHalf, kPull, kDelta, kY, kFirst, kSecond, kBias, kOutputs };
constexpr unsigned kAll = (1u << kOutputs) - 1, kTransposes = 1u << kFirst | 1u << kSecond;

template <typename T>
struct Case {
  int64_t rows;
  int columns, period = 1;
  unsigned wanted = kAll;
  bool penalty = true, bias = true;
};

template <typename T>
void deltas(std::mt19937& engine, const Case<T>& c) {
  using W = Wide<T>;
  const std::string name = "deltas " + std::to_string(sizeof(T)) + " bytes, " +
                           std::to_string(c.rows) + "x" + std::to_string(c.columns) + " wanted " +
                           std::to_string(c.wanted) + ": ";
  const auto wants = [&](int output) { return (c.wanted >> output & 1) != 0; };
  const std::size_t count = c.rows * c.columns;
  const std::size_t square = c.wanted & kTransposes ? std::size_t(c.columns) * c.columns : 0;
  const Drawn<T> dz(engine, count), z(engine, count), bias(engine, c.columns),
      first(engine, square), second(engine, square);
  const Drawn<W> e(engine, count), q(engine, c.rows), g(engine, c.rows), dx(engine, count);
  Numbers truth[kOutputs];
  for (std::size_t i = 0; i < count; ++i) {
    const double pull = c.penalty ? 2 * q.exact[i / c.columns] * e.exact[i] : 0;
    truth[kHalf].push_back(0.5 * dz.exact[i]);
    truth[kPull].push_back(pull);
    truth[kDelta].push_back(pull - 0.5 * dx.exact[i]);
    truth[kY].push_back(z.exact[i] - (c.bias ? bias.exact[i % c.columns / c.period] : 0));
  }
  truth[kBias].resize(c.columns);
  for (std::size_t i = 0; i < count; ++i) truth[kBias][i % c.columns] += dz.exact[i];
  for (std::size_t i = 0; i < square; ++i) {
    const std::size_t transposed = i % c.columns * c.columns + i / c.columns;
    truth[kFirst].push_back(0.5 * sum(g) * first.exact[transposed]);
    truth[kSecond].push_back(-0.25 * sum(g) * second.exact[transposed]);
  }

  std::vector<W> out[kOutputs];
  for (int i = 0; i < kOutputs; ++i) out[i] = poisoned<W>(truth[i].size());
  auto grad_bias = poisoned<T>(c.columns);
  const auto to = [&](int i) { return wants(i) ? out[i].data() : nullptr; };
  launching(c.wanted == 0 ? 0 : 1, name, [&] {
    snf::deltas<T>(
        {dz.data(),
         z.data(),
         c.bias ? bias.data() : nullptr,
         e.data(),
         c.penalty ? q.data() : nullptr,
         g.data(),
         dx.data(),
         to(kHalf),
         to(kPull),
         to(kDelta),
         to(kY),
         {{first.data(), to(kFirst), 0.5f}, {second.data(), to(kSecond), -0.25f}},
         wants(kBias) ? grad_bias.data() : nullptr,
         c.rows,
         c.columns,
         c.period},
        nullptr);
  });
  for (int i = 0; i < kBias; ++i)
    if (wants(i))
      expect_close(out[i], truth[i], testing::tolerance<W>(), name + "output " + std::to_string(i));
  if (wants(kBias)) expect_close(grad_bias, truth[kBias], testing::tolerance<T>(), name + "bias");
}

// ---- The linear layer --------------------------------------------------------------------------

// out[b] = m v[b] for each row of v, or m' v[b].
template <typename W>
Numbers each(const Matrix& m, const std::vector<W>& v, bool transposed = false) {
  const Numbers wide(v.begin(), v.end());
  Numbers out;
  for (std::size_t b = 0; b < v.size(); b += m.rows) {
    const Numbers row =
        transposed ? dense::transposed_times(m, &wide[b]) : dense::times(m, &wide[b]);
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

// sum + left' right
template <typename W, typename Right>
Numbers plus_product(
    const std::vector<W>& sum, const Numbers& left, const std::vector<Right>& right, int columns) {
  Numbers out(sum.begin(), sum.end());
  for (std::size_t b = 0; b < left.size(); b += columns)
    for (int i = 0; i < columns; ++i)
      for (int j = 0; j < columns; ++j)
        out[i * columns + j] += left[b + i] * testing::wide(right[b + j]);
  return out;
}

template <typename T>
void linear(std::mt19937& engine, int batch, int d) {
  using W = Wide<T>;
  const std::string name = "linear " + std::to_string(sizeof(T)) + " bytes, " +
                           std::to_string(batch) + "x" + std::to_string(d) + ": ";
  const std::size_t count = std::size_t(batch) * d, square = std::size_t(d) * d;
  const Drawn<T> x(engine, count), weight(engine, square, 1 / std::sqrt(d)),
      inverse(engine, square, 1 / std::sqrt(d)), bias(engine, d), dz(engine, count);
  const Drawn<W> g(engine, batch), q(engine, batch);
  Matrix w(d, d), r(d, d);
  w.data = weight.exact;
  r.data = inverse.exact;
  const dense::Step truth =
      dense::step(w, r, {batch, x.exact, bias.exact, dz.exact, g.exact, q.exact});

  const auto y = to_device<W>(each(w, x.exact));
  auto e = to_device<W>(each(r, y));
  auto z = poisoned<T>(count);
  auto log_det = poisoned<W>(batch), recon = poisoned<W>(batch);
  auto work = poisoned<W>(snf::residual_workspace(batch, d));
  snf::residual<T>(
      {e.data(), y.data(), x.data(), bias.data(), z.data(), e.data(), log_det.data(), recon.data(),
       work.data(), batch, d, 1},
      nullptr);
  expect_close(z, truth.z, testing::tolerance<T>(), name + "z");
  expect_close(e, truth.residual, testing::tolerance<W>(), name + "residual");
  expect_close(recon, truth.recon, testing::tolerance<W>(), name + "recon");

  const auto dx = to_device<W>(each(w, dz.exact, /*transposed=*/true));
  auto half = poisoned<W>(count), pull = half, delta = half, y_again = half;
  auto dw = poisoned<W>(square), dr = dw;
  auto dbias = poisoned<T>(d);
  launching(1, name, [&] {
    snf::deltas<T>(
        {dz.data(),
         z.data(),
         bias.data(),
         e.data(),
         q.data(),
         g.data(),
         dx.data(),
         half.data(),
         pull.data(),
         delta.data(),
         y_again.data(),
         {{inverse.data(), dw.data(), 0.5f}, {weight.data(), dr.data(), -0.5f}},
         dbias.data(),
         batch,
         d,
         1},
        nullptr);
  });
  Numbers delta_w = each(r, pull, /*transposed=*/true);
  for (std::size_t i = 0; i < count; ++i) delta_w[i] += half[i];
  expect_close(dx, truth.dx, testing::tolerance<T>(), name + "dx");
  expect_close(
      plus_product(dw, delta_w, x.device, d), truth.dW.data, testing::tolerance<T>(),
      name + "dweight");
  expect_close(
      plus_product(dr, Numbers(delta.begin(), delta.end()), y_again, d), truth.dR.data,
      testing::tolerance<T>(), name + "dweight_inv");
  expect_close(dbias, truth.dbias, testing::tolerance<T>(), name + "dbias");
}

// ---- The convolution's inverse term ------------------------------------------------------------

struct Convolution {
  dense::Layer layer;
  dense::KernelSize weight, inverse;
  bool term = true, wants_weight = true, wants_inverse = true;
  float data_share = 0.5f;
};

template <typename T>
void inverse_term(std::mt19937& engine, const Convolution& c) {
  using W = Wide<T>;
  const dense::Layer& l = c.layer;
  const int batch = 5;
  const std::string name = "inverse term " + std::to_string(sizeof(T)) + " bytes, " +
                           std::to_string(l.channels) + "x" + std::to_string(l.height) + "x" +
                           std::to_string(l.width) + ": ";
  const auto size = [&](dense::KernelSize k) {
    return std::size_t(l.channels) * l.per_group() * k.rows * k.columns;
  };
  const Drawn<T> weight(engine, size(c.weight)), inverse(engine, size(c.inverse));
  const Drawn<W> g(engine, batch), gradients(engine, size(c.weight) + size(c.inverse) + l.channels);
  // What stands in the transposed places of the other kernel's matrix.
  const auto term = [&](dense::KernelSize own, dense::KernelSize other, const Numbers& kernel) {
    const Matrix m = dense::matrix(l, other, kernel);
    Matrix transposed(m.rows, m.columns);
    for (int i = 0; i < m.rows; ++i)
      for (int j = 0; j < m.columns; ++j) transposed(i, j) = m(j, i);
    return dense::onto_kernel(l, own, transposed);
  };
  Numbers dw = term(c.weight, c.inverse, inverse.exact),
          dr = term(c.inverse, c.weight, weight.exact);
  const double scale = c.term ? sum(g) : 0;
  for (std::size_t i = 0; i < dw.size(); ++i)
    dw[i] = c.data_share * scale * dw[i] + gradients.exact[i];
  for (std::size_t i = 0; i < dr.size(); ++i)
    dr[i] = -0.5 * scale * dr[i] + gradients.exact[dw.size() + i];

  auto to_weight = poisoned<T>(dw.size()), to_inverse = poisoned<T>(dr.size());
  const snf::ConvShape shape = {
      batch,
      l.channels,
      l.per_group(),
      {l.height, l.width},
      {c.weight.rows, c.weight.columns},
      {c.inverse.rows, c.inverse.columns},
      l.dilation,
      l.circular};
  launching(1, name, [&] {
    snf::conv2d_inverse_term<T>(
        shape,
        {weight.data(), inverse.data(), c.term ? g.data() : nullptr, gradients.data(),
         c.wants_weight ? to_weight.data() : nullptr, c.wants_inverse ? to_inverse.data() : nullptr,
         c.data_share},
        nullptr);
  });
  if (c.wants_weight) expect_close(to_weight, dw, testing::tolerance<T>(), name + "dweight");
  if (c.wants_inverse) expect_close(to_inverse, dr, testing::tolerance<T>(), name + "dweight_inv");
}

// ---- All of them -------------------------------------------------------------------------------

template <typename T>
void run(std::mt19937& engine) {
  residual<T>(engine, 3, 1, 1, true, false);
  residual<T>(engine, 2, 333, 1, true, true);
  residual<T>(engine, 1, 8192, 64, false, false);
  residual<T>(engine, 2, 8193, 3, true, true);
  residual<T>(engine, 3, 20000, 625, true, false);
  residual<T>(engine, 3, 333, 1, true, true, false);
  residual<T>(engine, 2, 8193, 3, true, false, false);

  deltas<T>(engine, {1, 1});
  deltas<T>(engine, {300, 45});  // more rows than threads
  deltas<T>(engine, {17, 32, 8});
  deltas<T>(engine, {2, 16500, 500, kAll & ~kTransposes});
  deltas<T>(engine, {4, 70, 1, kAll, false, false});

  if (sizeof(T) > 2) linear<T>(engine, 1, 1);  // one number may cancel to less than z's rounding
  linear<T>(engine, 9, 37);

  inverse_term<T>(engine, {{3, 1, 6, 5, 1, false}, {3, 3}, {5, 5}});
  inverse_term<T>(engine, {{6, 2, 4, 7, 2, true}, {3, 5}, {1, 3}});
  inverse_term<T>(engine, {{4, 4, 2, 3, 1, true}, {5, 5}, {3, 3}});  // taps that wrap onto others
  inverse_term<T>(engine, {{2, 1, 1, 1, 1, false}, {1, 1}, {3, 3}, false});
  inverse_term<T>(engine, {{2, 1, 5, 5, 1, false}, {3, 3}, {3, 3}, true, false, true});
  inverse_term<T>(engine, {{2, 1, 5, 5, 1, false}, {3, 3}, {3, 3}, true, true, false});
  inverse_term<T>(engine, {{2, 1, 5, 5, 1, false}, {3, 3}, {5, 5}, true, true, false, 1.0f});
}

// What the kernels compute places with, up to their limits: 2^31 and 2^21.
void dividers() {
  std::mt19937 engine;
  const auto check = [](int64_t n, int64_t divisor, int64_t quotient) {
    expect(quotient == n / divisor, std::to_string(n) + " / " + std::to_string(divisor));
  };
  for (const int divisor : {1, 2, 3, 5, 7, 28, 641, 784, 65537, 1 << 20, 1 << 30, INT32_MAX}) {
    const snf::Divider by(divisor);
    const snf::SmallDivider by_small(divisor);
    for (int i = 0; i < 2000; ++i) {
      const int n = static_cast<int>(engine() >> 1), small = n >> 10;
      for (const int at : {n, n / divisor * divisor, std::max(n / divisor * divisor, 1) - 1})
        check(at, divisor, by(at));
      for (const int at :
           {small, small / divisor * divisor, std::max(small / divisor * divisor, 1) - 1}) {
        int quotient;
        const int rest = by_small.split(at, quotient);
        check(at, divisor, quotient);
        expect(rest == at % divisor, "the rest of a division by " + std::to_string(divisor));
      }
    }
    check(INT32_MAX, divisor, by(INT32_MAX));
  }
}

// More blocks than a grid can number are refused, not counted modulo 2^32.
void too_many_rows() {
  std::string message;
  try {
    snf::residual<float>({.rows = int64_t{1} << 32, .columns = 5, .period = 1}, nullptr);
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  expect(
      message.find("residual_step could not be launched with 4294967296 blocks of 256 threads") !=
          std::string::npos,
      "2^32 rows: " + message);
}

}  // namespace

int main(int count, char** arguments) {
  std::mt19937 engine(count > 1 ? std::atoi(arguments[1]) : 0);
  run<float>(engine);
  run<double>(engine);
  run<__half>(engine);
  run<__nv_bfloat16>(engine);
  for (unsigned wanted = 0; wanted <= kAll; ++wanted) deltas<float>(engine, {2, 33, 1, wanted});
  for (unsigned wanted = 0; wanted < 1u << kFirst; ++wanted)
    deltas<float>(engine, {2, 33, 1, wanted, false, false});
  row_sums(engine);
  dividers();
  too_many_rows();
  return testing::report("pointwise", cases);
}

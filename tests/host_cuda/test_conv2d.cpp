// The convolution kernels against dense matrices: every template instance and every way that a plan
// can divide the work, on shapes that fit nothing evenly. Argument: a seed; or --few, for two small
// cases that go through every barrier (for the tests of the tests).
#include <cstdlib>
#include <set>

#include "conv2d.h"
#include "host_cuda.h"
#include "testing.h"

namespace {

using dense::KernelSize;
using dense::Numbers;
using testing::expect;
using testing::expect_close;
using testing::poisoned;
using testing::rounded;
using testing::to_device;

struct Case {
  int batch;
  dense::Layer layer;
  KernelSize weight, inverse;
  int threads = 128, shared = 227 * 1024, multiprocessors = 132;
  bool bias = true, penalty = true, log_det = true;
  bool wants[4] = {true, true, true, true};  // gradients of x, weight, inverse, bias
  bool reconstruct = true;
  float penalty_share = 1;
};

std::set<std::string> seen;  // what the plans did, so that the table cannot lose a path unnoticed

void note(
    const snf::ConvForwardPlan& f, const snf::ConvBackwardPlan& b, int per_group,
    const char* type) {
  const auto kernel = [](const snf::ConvolutionPlan& c, const snf::CorrelationPlan& d) {
    return std::to_string(d.tap_rows) + "x" + std::to_string(d.tap_columns) +
           (c.kernel.rows == c.kernel.columns ? " square" : "");
  };
  seen.insert(std::string(type) + " block " + std::to_string(f.block));
  seen.insert("taps " + kernel(b.by_weight, b.weight) + " block " + std::to_string(f.block));
  seen.insert(f.tiles.count() > 1 ? "forward tiles" : "forward whole");
  seen.insert(b.tiles.count() > 1 ? "backward tiles" : "backward whole");
  if (f.by_weight.splits > 1) seen.insert("shares of a convolution");
  if (b.weight.splits > 1) seen.insert("shares of a weight gradient");
  if (b.weight.items * b.weight.splits > b.correlating_threads) seen.insert("rounds");
  if (b.weight.segments > 1) seen.insert("segments");
  seen.insert(f.by_weight.laid_down ? "weights laid down" : "weights staged");
  seen.insert(b.by_weight.laid_down ? "weights laid down" : "weights staged");
  if (f.by_weight.chunk < per_group || b.by_weight.chunk < per_group)
    seen.insert("weights in chunks");
}

template <typename T>
void run(const Case& c, std::mt19937& engine, const char* type) {
  const dense::Layer& l = c.layer;
  const int d = l.features(), pixels = l.height * l.width;
  const auto size = [&](KernelSize k) {
    return std::size_t(l.channels) * l.per_group() * k.rows * k.columns;
  };
  const auto kernel = [&](KernelSize k) {
    return rounded<T>(dense::draw(engine, size(k), 1 / std::sqrt(double(size(k)) / l.channels)));
  };
  const Numbers weight = kernel(c.weight), inverse = kernel(c.inverse);
  const Numbers bias = c.bias ? rounded<T>(dense::draw(engine, l.channels)) : Numbers(l.channels);
  dense::Inputs in = {
      c.batch,
      rounded<T>(dense::draw(engine, std::size_t(c.batch) * d)),
      {},
      rounded<T>(dense::draw(engine, std::size_t(c.batch) * d)),
      c.log_det ? rounded<float>(dense::draw(engine, c.batch)) : Numbers(c.batch),
      c.penalty ? rounded<float>(dense::draw(engine, c.batch)) : Numbers(c.batch)};
  in.data_share = c.reconstruct ? 0.5 : 1;
  in.penalty_share = c.penalty_share;
  for (const double value : bias) in.bias.insert(in.bias.end(), pixels, value);
  const dense::Step truth =
      dense::step(dense::matrix(l, c.weight, weight), dense::matrix(l, c.inverse, inverse), in);

  const snf::ConvShape shape = {
      c.batch,
      l.channels,
      l.per_group(),
      {l.height, l.width},
      {c.weight.rows, c.weight.columns},
      {c.inverse.rows, c.inverse.columns},
      l.dilation,
      l.circular};
  const snf::DeviceLimits limits = {c.shared, c.multiprocessors, c.threads};
  host_cuda::device().sharedMemPerBlockOptin = c.shared;
  const snf::ConvShape planned = c.reconstruct ? shape : snf::without_inverse(shape);
  const snf::ConvForwardPlan forward = snf::plan_forward(planned, limits);
  const snf::ConvBackwardPlan backward = snf::plan_backward(planned, limits);
  const std::string name = std::string(type) + " " + std::to_string(c.batch) + "x" +
                           std::to_string(l.channels) + "x" + std::to_string(l.height) + "x" +
                           std::to_string(l.width) + " k" + std::to_string(c.weight.rows) + " r" +
                           std::to_string(c.inverse.rows) + ": ";
  expect(forward.fits && backward.fits, name + "no plan");
  if (!forward.fits || !backward.fits) return;
  note(forward, backward, l.per_group(), type);

  const auto x = to_device<T>(in.x), w = to_device<T>(weight), r = to_device<T>(inverse),
             b = to_device<T>(bias), dz = to_device<T>(in.grad_z);
  const auto g = to_device<float>(in.grad_log_det), q = to_device<float>(in.grad_recon);
  auto z = poisoned<T>(x.size());
  auto residual = poisoned<float>(x.size()), recon = poisoned<float>(c.batch),
       log_det = poisoned<float>(c.batch);
  auto work = poisoned<float>(forward_workspace(forward, shape));
  int64_t before = host_cuda::launches();
  conv2d_forward<T>(
      shape, forward,
      {x.data(), w.data(), r.data(), c.bias ? b.data() : nullptr, z.data(),
       c.reconstruct ? residual.data() : nullptr, log_det.data(), recon.data(), work.data()},
      nullptr);
  expect(host_cuda::launches() - before <= 2, name + "launches of forward");
  const double tolerance = testing::tolerance<T>();
  expect_close(z, truth.z, tolerance, name + "z");
  if (c.reconstruct) {
    expect_close(residual, truth.residual, 2e-4, name + "residual");
    expect_close(recon, truth.recon, 2e-4, name + "recon");
  } else {
    expect(recon == std::vector<float>(c.batch, 0.0f), name + "recon");
  }
  expect(log_det == std::vector<float>(c.batch, 0.0f), name + "log_det");

  // Half precision rounds z, from which backward takes y: start it from the exact z's rounding.
  auto dx = poisoned<T>(x.size()), dw = poisoned<T>(w.size()), dr = poisoned<T>(r.size()),
       db = poisoned<T>(l.channels);
  const auto wanted = [&](int i, std::vector<T>& t) { return c.wants[i] ? t.data() : nullptr; };
  work = poisoned<float>(backward_workspace(backward, shape));
  before = host_cuda::launches();
  conv2d_backward<T>(
      shape, backward,
      {dz.data(), x.data(), c.reconstruct ? z.data() : nullptr, w.data(), r.data(),
       c.bias ? b.data() : nullptr, c.log_det ? g.data() : nullptr, c.penalty ? q.data() : nullptr,
       c.reconstruct ? residual.data() : nullptr, wanted(0, dx), wanted(1, dw), wanted(2, dr),
       wanted(3, db), work.data(), static_cast<float>(in.data_share), c.penalty_share},
      nullptr);
  expect(host_cuda::launches() - before <= 3, name + "launches of backward");
  Numbers dbias(l.channels);
  for (int i = 0; i < d; ++i) dbias[i / pixels] += truth.dbias[i];
  if (c.wants[0]) expect_close(dx, truth.dx, tolerance, name + "dx");
  if (c.wants[1])
    expect_close(dw, dense::onto_kernel(l, c.weight, truth.dW), tolerance, name + "dweight");
  if (c.wants[2])
    expect_close(dr, dense::onto_kernel(l, c.inverse, truth.dR), tolerance, name + "dweight_inv");
  if (c.wants[3]) expect_close(db, dbias, tolerance, name + "dbias");
}

std::vector<Case> table() {
  // batch, {channels, groups, height, width, dilation, circular}, weight, inverse, ...
  std::vector<Case> cases;
  // Square kernels of each size and any mixture of them, few and many channels.
  for (const int channels : {1, 2, 3, 5, 8})
    for (const int k : {1, 3, 5, 7})
      cases.push_back({3, {channels, 1, 6, 5, 1, false}, {k, k}, {k, k}});
  for (const int k : {1, 3, 5, 7, 9})
    for (const int r : {3, 7})
      if (k != r) cases.push_back({2, {3, 1, 7, 6, 1, k == 5}, {k, k}, {r, r}});
  // What no template is made for: rectangles, dilation, wrapping onto itself.
  cases.push_back({2, {2, 1, 5, 6, 1, false}, {1, 5}, {3, 1}});
  cases.push_back({2, {4, 1, 5, 6, 1, true}, {3, 5}, {5, 3}});
  cases.push_back({2, {2, 1, 7, 8, 2, false}, {3, 3}, {5, 5}});
  cases.push_back({2, {6, 2, 7, 8, 3, true}, {3, 3}, {3, 3}});
  cases.push_back({2, {2, 1, 3, 2, 2, true}, {5, 5}, {3, 3}});
  cases.push_back({2, {4, 2, 1, 1, 1, true}, {3, 3}, {5, 5}});
  // Groups: whole blocks, part of a block, depthwise.
  for (const int groups : {2, 3, 6, 12})
    cases.push_back({2, {12, groups, 4, 5, 1, groups == 3}, {3, 3}, {3, 3}});
  cases.push_back({2, {10, 2, 4, 5, 1, false}, {3, 3}, {5, 5}});
  // Slim images, one sample, one pixel.
  cases.push_back({1, {1, 1, 1, 1, 1, false}, {3, 3}, {3, 3}});
  cases.push_back({1, {3, 1, 1, 17, 1, false}, {3, 3}, {3, 3}});
  cases.push_back({2, {3, 1, 19, 1, 1, false}, {5, 5}, {3, 3}});
  // The shapes of the paper.
  cases.push_back({2, {1, 1, 28, 28, 1, false}, {3, 3}, {3, 3}, 512});
  cases.push_back({2, {4, 1, 14, 14, 1, false}, {3, 3}, {5, 5}, 512});
  cases.push_back({2, {16, 1, 7, 7, 1, false}, {3, 3}, {3, 3}, 512});
  cases.push_back({1, {12, 1, 16, 16, 1, false}, {3, 3}, {3, 3}, 512});
  cases.push_back({1, {12, 1, 16, 16, 1, false}, {1, 1}, {1, 1}, 512, 64 * 1024});
  cases.push_back({2, {24, 1, 8, 8, 1, false}, {3, 3}, {3, 3}, 512, 99 * 1024});
  cases.push_back({2, {48, 1, 4, 4, 1, false}, {3, 3}, {3, 3}, 512});
  cases.push_back({2, {48, 1, 4, 4, 1, false}, {3, 3}, {3, 3}, 512, 64 * 1024});
  // Tiles with a halo: little shared memory, or few threads.
  for (const bool circular : {false, true}) {
    cases.push_back({2, {3, 1, 21, 13, 1, circular}, {3, 3}, {3, 3}, 64, 16 * 1024});
    cases.push_back({2, {1, 1, 30, 33, 1, circular}, {5, 5}, {3, 3}, 96, 14 * 1024});
    cases.push_back({2, {4, 2, 17, 18, 2, circular}, {3, 3}, {5, 5}, 256, 40 * 1024});
    cases.push_back({2, {2, 1, 18, 11, 1, circular}, {7, 7}, {3, 3}, 64, 24 * 1024});
  }
  // Weights in chunks of input channels, the last of them smaller.
  cases.push_back({2, {6, 1, 4, 5, 1, false}, {5, 5}, {5, 5}, 64, 10 * 1024});
  // Few multiprocessors: a block adds up several images.
  cases.push_back({9, {3, 1, 5, 4, 1, false}, {3, 3}, {3, 3}, 96, 24 * 1024, 2});
  cases.push_back({7, {4, 1, 11, 9, 1, true}, {3, 3}, {3, 3}, 64, 20 * 1024, 1});
  // What is absent.
  for (int left_out = 0; left_out < 7; ++left_out) {
    Case c = {2, {3, 1, 5, 6, 1, false}, {3, 3}, {3, 3}};
    if (left_out < 4) c.wants[left_out] = false;
    if (left_out == 4) c.bias = false;
    if (left_out == 5) c.penalty = false;
    if (left_out == 6) c.log_det = false;
    cases.push_back(c);
  }
  // One gradient alone, of several images to a block.
  for (int only = 0; only < 4; ++only)
    for (const bool penalty : {false, true}) {
      Case c = {9, {2, 1, 5, 6, 1, false}, {3, 3}, {3, 3}, 128, 227 * 1024, 1};
      for (int i = 0; i < 4; ++i) c.wants[i] = i == only;
      c.penalty = penalty;
      cases.push_back(c);
    }
  // Shares of the penalty, the inverse's gradient wanted or not.
  for (const float share : {0.0f, 0.3f})
    for (const bool wants_inverse : {true, false}) {
      Case c = {9, {3, 1, 5, 6, 1, false}, {3, 3}, {5, 5}, 128, 227 * 1024, 4};
      c.wants[2] = wants_inverse;
      c.penalty_share = share;
      cases.push_back(c);
    }
  // Nothing reconstructed: whole images, tiles, weights in chunks, one gradient alone.
  for (Case c :
       {Case{9, {3, 1, 5, 6, 1, false}, {3, 3}, {5, 5}, 128, 227 * 1024, 4},
        Case{2, {4, 2, 17, 18, 2, true}, {3, 3}, {5, 5}, 256, 24 * 1024},
        Case{2, {6, 1, 4, 5, 1, false}, {5, 5}, {3, 3}, 64, 8 * 1024},
        Case{2, {2, 1, 7, 8, 1, false}, {1, 1}, {3, 3}}})
    for (const bool alone : {false, true}) {
      c.reconstruct = c.penalty = c.wants[2] = false;
      c.wants[0] = c.wants[3] = !alone;
      cases.push_back(c);
    }
  // Without the convolutions in between, the bias's sum must still end before grad_z is changed.
  cases.push_back({2, {3, 1, 7, 9, 1, false}, {3, 3}, {3, 3}});
  cases.back().penalty = cases.back().wants[0] = cases.back().wants[2] = false;
  return cases;
}

void covers_everything() {
  for (const char* type : {"float", "half", "bfloat16"})
    for (const char* block : {" block 1", " block 4"})
      expect(seen.contains(std::string(type) + block), std::string("not covered: ") + type + block);
  for (const char* block : {" block 1", " block 4"})
    for (const char* taps :
         {"taps 3x3 square", "taps 1x5 square", "taps 1x7 square", "taps 1x1 square", "taps 1x1"})
      expect(seen.contains(std::string(taps) + block), std::string("not covered: ") + taps + block);
  for (const char* what :
       {"forward tiles", "forward whole", "backward tiles", "backward whole",
        "shares of a convolution", "shares of a weight gradient", "rounds", "segments",
        "weights laid down", "weights staged", "weights in chunks"})
    expect(seen.contains(what), std::string("not covered: ") + what);
}

// Indices past 2^31 are only a matter of arithmetic here.
void large_shapes() {
  const snf::DeviceLimits limits = {227 * 1024, 132};
  const snf::ConvShape many = {int64_t{1} << 33, 3, 3, {32, 32}, {3, 3}, {3, 3}, 1, false};
  const auto plan = snf::plan_backward(many, limits);
  expect(plan.fits && plan.blocks <= 4 * 132, "a large batch shares few blocks");
  const snf::ConvShape wide = {1, 512, 512, {4, 4}, {3, 3}, {3, 3}, 1, false};
  expect(!snf::plan_forward(wide, limits).fits, "many weights are not for these kernels");
  const snf::ConvShape far = {1, 1, 1, {8, 8}, {3, 3}, {3, 3}, 1 << 29, true};
  expect(!snf::plan_forward(far, limits).fits, "a huge dilation is not for these kernels");
}

}  // namespace

int main(int count, char** arguments) {
  const std::string argument = count > 1 ? arguments[1] : "";
  std::mt19937 engine(std::atoi(argument.c_str()));
  if (argument == "--few") {  // weights laid down, and in chunks
    run<float>({2, {3, 1, 6, 5, 1, false}, {3, 3}, {3, 3}, 64}, engine, "float");
    run<float>({2, {6, 1, 4, 5, 1, false}, {5, 5}, {5, 5}, 64, 10 * 1024}, engine, "float");
    return testing::report("conv2d", 2);
  }
  std::vector<Case> cases = table();
#if defined(__SANITIZE_THREAD__)  // minutes, and no path that smaller cases do not take
  std::erase_if(cases, [](const Case& c) { return c.threads > 256 && c.layer.channels > 4; });
#endif
  for (const Case& c : cases) run<float>(c, engine, "float");
  // Not those with one pixel or one weight: a single sum may cancel to less than z's rounding.
  for (std::size_t i = 2; i < cases.size(); i += 6) {
    run<__half>(cases[i], engine, "half");
    run<__nv_bfloat16>(cases[i], engine, "bfloat16");
  }
  covers_everything();
  large_shapes();
  return testing::report("conv2d", static_cast<int>(cases.size()));
}

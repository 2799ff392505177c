// The substitution on the device against one over the dense matrix, in an order of its own. Sizes
// cover images in shared memory and in a workspace, more pixels a wave than warps, and more
// channels than lanes. Argument: a seed.
#include <cstdlib>

#include "device.cuh"
#include "host_cuda.h"
#include "testing.h"
#include "triangular_conv2d.h"

namespace {

using dense::Numbers;
using testing::expect;
using testing::expect_close;

int cases = 0;

struct Shape {
  int images, channels, height, width, rows, columns;
  bool reversed = false;
  bool workspace = false;  // in place of shared memory
};

template <typename T>
void solves(std::mt19937& engine, const Shape& s) {
  using W = snf::Wide<T>;
  const std::string name = "triangular " + std::to_string(sizeof(T)) + " bytes, " +
                           std::to_string(s.channels) + "x" + std::to_string(s.height) + "x" +
                           std::to_string(s.width) + ": ";
  const int taps = s.rows * s.columns, pixels = s.height * s.width;
  const int size = s.channels * pixels;
  Numbers weight = dense::draw(engine, std::size_t(taps) * s.channels * s.channels, 1);
  for (double& w : weight) w *= 0.3 / (s.channels * taps);
  const auto element = [&](int a, int b, int ci, int co) -> double& {
    return weight[(std::size_t(a * s.columns + b) * s.channels + ci) * s.channels + co];
  };
  for (int c = 0; c < s.channels; ++c)
    element(s.rows - 1, s.columns - 1, c, c) = c % 2 == 0 ? 1.25 : -0.75;
  weight = testing::rounded<W>(weight);
  const Numbers z = testing::rounded<T>(dense::draw(engine, std::size_t(s.images) * size, 1));

  // Unknown i of an image is channel i % C of pixel i / C; what stands before it is solved.
  Numbers truth(z.size());
  for (int image = 0; image < s.images; ++image) {
    const auto place = [&](int i) {
      const int at = i % s.channels * pixels + i / s.channels;
      return std::size_t(image) * size + (s.reversed ? size - 1 - at : at);
    };
    for (int i = 0; i < size; ++i) {
      const int co = i % s.channels, h = i / s.channels / s.width, w = i / s.channels % s.width;
      double rest = z[place(i)];
      for (int j = 0; j < i; ++j) {
        const int down = h - j / s.channels / s.width, right = w - j / s.channels % s.width;
        if (down < 0 || right < 0 || down >= s.rows || right >= s.columns) continue;
        rest -=
            element(s.rows - 1 - down, s.columns - 1 - right, j % s.channels, co) * truth[place(j)];
      }
      truth[place(i)] = rest / element(s.rows - 1, s.columns - 1, co, co);
    }
  }

  const std::vector<T> device_z = testing::to_device<T>(z);
  const std::vector<W> device_weight = testing::to_device<W>(weight);
  std::vector<T> x = testing::poisoned<T>(z.size());
  std::vector<W> workspace = testing::poisoned<W>(z.size());
  const int64_t before = host_cuda::launches();
  snf::triangular_solve<T>(
      {device_z.data(), device_weight.data(), x.data(), s.workspace ? workspace.data() : nullptr,
       s.images, s.channels, s.height, s.width, s.rows, s.columns, s.reversed},
      nullptr);
  expect(host_cuda::launches() - before == 1, name + "number of launches");
  expect_close(x, truth, testing::tolerance<T>(), name + "x");
  ++cases;
}

template <typename T>
void run(std::mt19937& engine) {
  for (const bool reversed : {false, true}) {
    solves<T>(engine, {3, 2, 5, 4, 2, 2, reversed});
    solves<T>(engine, {2, 3, 1, 7, 2, 3, reversed});
    solves<T>(engine, {2, 3, 6, 1, 3, 1, reversed});
    solves<T>(engine, {1, 4, 2, 3, 4, 5, reversed});  // larger than the image
    solves<T>(engine, {2, 1, 1, 1, 1, 1, reversed});
    solves<T>(engine, {1, 70, 3, 2, 2, 2, reversed});   // more channels than lanes
    solves<T>(engine, {1, 1, 19, 18, 2, 2, reversed});  // more pixels than warps
  }
  solves<T>(engine, {3, 35, 3, 4, 2, 2, true, true});
  // Whole images where they fit into 48 KiB.
  constexpr int kPixels = 48 * 1024 / sizeof(snf::Wide<T>);
  expect(snf::triangular_workspace<T>(3, 1, 1, kPixels) == 0, "an image that fits");
  expect(snf::triangular_workspace<T>(3, 1, 1, kPixels + 1) == 3 * (kPixels + 1), "and one not");
}

}  // namespace

int main(int count, char** arguments) {
  std::mt19937 engine(count > 1 ? std::atoi(arguments[1]) : 0);
  run<float>(engine);
  run<double>(engine);
  run<__half>(engine);
  run<__nv_bfloat16>(engine);
  return testing::report("triangular_conv2d", cases);
}

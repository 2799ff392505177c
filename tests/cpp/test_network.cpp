// image_network against torch's convolutions in float64: values, gradients and an error message.
#include <ATen/ATen.h>

#include <sstream>

#include "expect.h"
#include "formula.h"

namespace {

using at::Tensor;
using formula::Tensors;

Tensor network(const Tensors& in) {
  return formula::call<
      Tensor, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, const Tensor&>(
      "snf_ext::image_network", in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7]);
}

struct Case {
  int64_t batch, inputs, hidden, outputs, height, width;
};

Tensors arguments(const Case& c) {
  const auto random = [](at::IntArrayRef shape, double scale) {
    return scale * at::randn(shape, at::kDouble);
  };
  return {
      random({c.batch, c.inputs, c.height, c.width}, 1),
      random({c.hidden, c.inputs, 3, 3}, 0.3),
      random({c.hidden}, 0.3),
      random({c.hidden, c.hidden, 1, 1}, 0.3),
      random({c.hidden}, 0.3),
      random({c.outputs, c.hidden, 3, 3}, 0.3),
      random({c.outputs}, 0.3),
      random({c.outputs, 1, 1}, 0.2)};
}

void values_and_gradients(const Case& c) {
  std::ostringstream name;
  name << "image_network " << c.batch << 'x' << c.inputs << 'x' << c.height << 'x' << c.width
       << ", " << c.hidden << " hidden, " << c.outputs << " out";
  formula::compare(
      name.str(), arguments(c), [](const Tensors& in) { return Tensors{network(in)}; },
      [](const Tensors& in) {
        const Tensor first = at::conv2d(in[0], in[1], in[2], 1, 1).relu();
        const Tensor middle = at::conv2d(first, in[3], in[4]).relu();
        return Tensors{at::conv2d(middle, in[5], in[6], 1, 1) * (3 * in[7]).exp()};
      });
}

void messages() {
  Tensors in = arguments({2, 3, 5, 4, 6, 7});
  in[3] = at::randn({5, 4, 1, 1}, at::kDouble);
  expect::throws([&] { network(in); }, "weight_2 must have shape", "another middle convolution");
}

}  // namespace

int main() {
  at::manual_seed(0);
  // Hidden channels under, at and over the vector widths; images of one pixel and of one row.
  for (const Case& c :
       {Case{1, 1, 1, 1, 1, 1},
        {3, 2, 5, 4, 1, 9},
        {2, 3, 8, 6, 7, 4},
        {2, 2, 16, 4, 14, 14},
        {17, 4, 17, 8, 3, 5},
        {1, 6, 33, 2, 8, 8},
        {2, 5, 70, 3, 4, 6}})
    values_and_gradients(c);
  messages();
  return expect::report("test_network");
}

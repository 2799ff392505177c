// A coupling's network on the CPU: weights rearranged for the kernels, images shared out to
// threads, weight gradients summed in a fixed order.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "../check_network.h"
#include "../precision.h"
#include "cpu_capability.h"
#include "image_network_kernel.h"
#include "pooled_memory.h"

namespace snf {

#define SNF_DECLARE(isa)                         \
  namespace isa {                                \
  const NetworkKernel<float>& network_float();   \
  const NetworkKernel<double>& network_double(); \
  }
SNF_EACH_ISA(SNF_DECLARE)

template <>
const NetworkKernel<float>& network_kernel<float>() {
  return SNF_ON_THIS_CPU(network_float());
}

template <>
const NetworkKernel<double>& network_kernel<double>() {
  return SNF_ON_THIS_CPU(network_double());
}

namespace {

using at::Tensor;
using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
constexpr int64_t kTaps = NetworkShape::kTaps;

// In the kernels' precision; the images may be apart, as a slice of channels leaves them.
Tensor images(const Tensor& x) {
  const Tensor t = x.to(wide_type(x.scalar_type()));
  return t.size(0) > 0 && t.select(0, 0).is_contiguous() ? t : t.contiguous();
}

// Everything that a kernel is given.
template <typename T>
struct Prepared {
  const NetworkKernel<T>& kernel = network_kernel<T>();
  NetworkShape shape;
  Plane plane;
  std::vector<T> scales;  // exp(3 log_scale), which the last convolution takes in
  std::vector<T> numbers, transposed;
  std::vector<int64_t> inputs, outputs, hidden, taps, mirrored;

  Prepared(const Tensor& x, const NetworkWeights& w)
      : shape(shape_of(x, w)),
        plane({1, 1, shape.height, shape.width, 1, false, {3, 3}, {3, 3}}),
        numbers(NetworkRows<T>::size(shape)),
        transposed(shape.hidden * shape.padded) {
    const std::vector<int64_t> around =
        tap_offsets({1, 1, shape.height, shape.width, 1, false, {3, 3}, {3, 3}}, plane, {3, 3});
    for (int64_t tap : around) {
      taps.push_back(tap * shape.padded);
      mirrored.push_back(-tap * shape.padded);
    }
    for (int64_t i = 0; i < shape.inputs; ++i)
      for (int64_t tap : around) inputs.push_back(i * plane.size + tap);
    for (int64_t o = 0; o < shape.outputs; ++o)
      for (int64_t tap : around) outputs.push_back(o * plane.size - tap);
    for (int64_t h = 0; h < shape.hidden; ++h) hidden.push_back(h);

    const Tensor logs = wide(w.log_scale);
    for (int64_t o = 0; o < shape.outputs; ++o)
      scales.push_back(std::exp(3 * logs.const_data_ptr<T>()[o]));
    pack(w);
  }

  NetworkStep<T> step(const Tensor& x) {
    return {
        shape,
        plane,
        {inputs.data(), outputs.data(), hidden.data(), taps.data(), mirrored.data()},
        NetworkRows<T>(shape, numbers.data()),
        transposed.data(),
        x.const_data_ptr<T>(),
        x.stride(0)};
  }

 private:
  NetworkShape shape_of(const Tensor& x, const NetworkWeights& w) const {
    const int64_t hidden = w.weight_1.size(0), lanes = kernel.lanes;
    return {x.size(1), hidden,    w.weight_3.size(0),
            x.size(2), x.size(3), (hidden + lanes - 1) / lanes * lanes};
  }

  void pack(const NetworkWeights& w) {
    const NetworkRows<T> to(shape, numbers.data());
    const int64_t hidden = shape.hidden, padded = shape.padded;
    const Tensor first = wide(w.weight_1), middle = wide(w.weight_2), last = wide(w.weight_3);
    const Tensor biases[] = {wide(w.bias_1), wide(w.bias_2), wide(w.bias_3)};
    const T* from = first.const_data_ptr<T>();
    for (int64_t h = 0; h < hidden; ++h)
      for (int64_t j = 0; j < shape.first(); ++j) to.first[j * padded + h] = *from++;
    from = middle.const_data_ptr<T>();
    for (int64_t o = 0; o < hidden; ++o)
      for (int64_t i = 0; i < hidden; ++i)
        to.middle[i * padded + o] = transposed[o * padded + i] = *from++;
    from = last.const_data_ptr<T>();
    for (int64_t o = 0; o < shape.outputs; ++o)
      for (int64_t h = 0; h < hidden; ++h)
        for (int64_t tap = 0; tap < kTaps; ++tap)
          to.last[(o * kTaps + tap) * padded + h] = scales[o] * *from++;
    std::copy_n(biases[0].const_data_ptr<T>(), hidden, to.bias_first);
    std::copy_n(biases[1].const_data_ptr<T>(), hidden, to.bias_middle);
    for (int64_t o = 0; o < shape.outputs; ++o)
      to.bias_last[o] = scales[o] * biases[2].const_data_ptr<T>()[o];
  }
};

Tensor forward(
    const Tensor& x, const Tensor& weight_1, const Tensor& bias_1, const Tensor& weight_2,
    const Tensor& bias_2, const Tensor& weight_3, const Tensor& bias_3, const Tensor& log_scale) {
  const NetworkWeights w = {weight_1, bias_1, weight_2, bias_2, weight_3, bias_3, log_scale};
  check_image_network(x, w);
  const Tensor in = images(x);
  const Tensor y = pooled_empty({x.size(0), weight_3.size(0), x.size(2), x.size(3)}, in.options());
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "image_network", [&] {
    Prepared<scalar_t> prepared(in, w);
    const NetworkStep<scalar_t> step = prepared.step(in);
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, in.size(0), 1, [&](int64_t begin, int64_t end) {
      prepared.kernel.forward(step, begin, end, out);
    });
  });
  return y.to(x.scalar_type());
}

// Rows of the kernels to gradients of the weights. Those of the scales follow from those of what
// they scale: sum of y dy = sum of w dw + b db, as y is linear in both.
template <typename T>
void unpack(const Prepared<T>& prepared, T* sums, const std::array<Tensor, 7>& to) {
  const NetworkShape& s = prepared.shape;
  const int64_t padded = s.padded;
  const NetworkRows<T> from(s, sums);
  T* out = to[0].mutable_data_ptr<T>();
  for (int64_t h = 0; h < s.hidden; ++h)
    for (int64_t j = 0; j < s.first(); ++j) *out++ = from.first[j * padded + h];
  std::copy_n(from.bias_first, s.hidden, to[1].mutable_data_ptr<T>());
  out = to[2].mutable_data_ptr<T>();
  for (int64_t o = 0; o < s.hidden; ++o)
    for (int64_t i = 0; i < s.hidden; ++i) *out++ = from.middle[i * padded + o];
  std::copy_n(from.bias_middle, s.hidden, to[3].mutable_data_ptr<T>());
  out = to[4].mutable_data_ptr<T>();
  const T* own = prepared.numbers.data() + (from.last - sums);  // scaled weights, and biases
  const T* own_bias = prepared.numbers.data() + (from.bias_last - sums);
  for (int64_t o = 0; o < s.outputs; ++o) {
    double total = static_cast<double>(own_bias[o]) * from.bias_last[o];
    for (int64_t h = 0; h < s.hidden; ++h)
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        const int64_t at = (o * kTaps + tap) * padded + h;
        *out++ = prepared.scales[o] * from.last[at];
        total += static_cast<double>(own[at]) * from.last[at];
      }
    to[5].mutable_data_ptr<T>()[o] = prepared.scales[o] * from.bias_last[o];
    to[6].mutable_data_ptr<T>()[o] = static_cast<T>(3 * total);
  }
}

Eight backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight_1, const Tensor& bias_1,
    const Tensor& weight_2, const Tensor& bias_2, const Tensor& weight_3, const Tensor& bias_3,
    const Tensor& log_scale, std::array<bool, 8> mask) {
  const NetworkWeights w = {weight_1, bias_1, weight_2, bias_2, weight_3, bias_3, log_scale};
  const Tensor in = images(x), dy = wide(grad_y);
  const bool weights = std::any_of(mask.begin() + 1, mask.end(), [](bool one) { return one; });
  const Tensor dx = mask[0] ? pooled_empty(x.sizes(), in.options()) : Tensor();
  std::array<Tensor, 7> to;
  const Tensor* like[] = {&weight_1, &bias_1, &weight_2, &bias_2, &weight_3, &bias_3, &log_scale};
  for (size_t i = 0; i < to.size(); ++i)
    if (weights) to[i] = at::empty(like[i]->sizes(), in.options());

  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "image_network_backward", [&] {
    Prepared<scalar_t> prepared(in, w);
    const NetworkStep<scalar_t> step = prepared.step(in);
    const int64_t batch = in.size(0), size = NetworkRows<scalar_t>::size(prepared.shape);
    // Fixed by the shapes, so that the sums do not depend on the number of threads.
    const int64_t parts = std::clamp<int64_t>(batch, 1, 16);
    const Tensor room = at::zeros({weights ? parts : 0, size}, in.options());
    scalar_t* sums = room.mutable_data_ptr<scalar_t>();
    const scalar_t* from = dy.const_data_ptr<scalar_t>();
    scalar_t* grad_x = mask[0] ? dx.mutable_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        prepared.kernel.backward(
            step, batch * part / parts, batch * (part + 1) / parts, from, grad_x,
            weights ? sums + part * size : nullptr);
    });
    if (!weights) return;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
    unpack(prepared, sums, to);
  });

  // What was not asked for has no elements.
  const auto output = [&](size_t i, const Tensor& grad) {
    return mask[i] ? grad.to(x.scalar_type()) : at::empty({0}, x.options());
  };
  return {output(0, dx),    output(1, to[0]), output(2, to[1]), output(3, to[2]),
          output(4, to[3]), output(5, to[4]), output(6, to[5]), output(7, to[6])};
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, CPU, m) {
  m.impl("image_network", forward);
  m.impl("image_network_backward", backward);
}

}  // namespace snf

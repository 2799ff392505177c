// Ground truth in float64 by dense matrices, sharing no code with the operators.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace dense {

using at::Tensor;

// Where the elements of a convolution's kernel stand in the layer's matrix: entry i of the three
// lists says that kernel element `elements[i]` stands at `rows[i]`, `columns[i]`.
struct Places {
  Tensor rows, columns, elements;
};

struct Image {
  int64_t channels, height, width;
  int64_t size() const { return channels * height * width; }
};

inline Places places(
    at::IntArrayRef kernel, const Image& image, int64_t dilation, int64_t groups, bool circular) {
  const auto [channels, height, width] = image;
  const int64_t per_group = channels / groups;
  std::vector<int64_t> rows, columns, elements;
  const auto wrap = [circular](int64_t at, int64_t extent) {
    return circular ? ((at % extent) + extent) % extent : at;
  };
  for (int64_t o = 0; o < channels; ++o)
    for (int64_t i = 0; i < per_group; ++i)
      for (int64_t a = 0; a < kernel[2]; ++a)
        for (int64_t b = 0; b < kernel[3]; ++b)
          for (int64_t h = 0; h < height; ++h)
            for (int64_t w = 0; w < width; ++w) {
              const int64_t c = o / per_group * per_group + i;
              const int64_t from_h = wrap(h + (a - kernel[2] / 2) * dilation, height);
              const int64_t from_w = wrap(w + (b - kernel[3] / 2) * dilation, width);
              if (from_h < 0 || from_h >= height || from_w < 0 || from_w >= width) continue;
              rows.push_back((o * height + h) * width + w);
              columns.push_back((c * height + from_h) * width + from_w);
              elements.push_back(((o * per_group + i) * kernel[2] + a) * kernel[3] + b);
            }
  return {
      at::tensor(rows, at::kLong), at::tensor(columns, at::kLong), at::tensor(elements, at::kLong)};
}

// The layer's matrix T(kernel).
inline Tensor matrix(const Tensor& kernel, const Places& where, int64_t size) {
  const Tensor values = kernel.detach().to(at::kDouble).flatten().index({where.elements});
  return at::zeros({size, size}, at::kDouble)
      .index_put_({where.rows, where.columns}, values, /*accumulate=*/true);
}

// A gradient with respect to the matrix, summed to the kernel's elements.
inline Tensor to_kernel(const Tensor& grad_matrix, const Places& where, at::IntArrayRef kernel) {
  const Tensor values = grad_matrix.index({where.rows, where.columns});
  return at::zeros(kernel, at::kDouble)
      .flatten()
      .index_add_(0, where.elements, values)
      .view(kernel);
}

// One step of a layer with matrix W and learned inverse R on rows x; no bias.
struct Step {
  Tensor y, recon, dx, dW, dR;
};

// The equation set, written out sample by sample. dz (B, D), g and q (B,) are the gradients that
// arrive at z, log_det and recon.
inline Step step(
    const Tensor& x, const Tensor& W, const Tensor& R, const Tensor& dz, const Tensor& g,
    const Tensor& q) {
  const Tensor y = x.mm(W.t()), e = y.mm(R.t()) - x, dx = dz.mm(W);
  Tensor dW = 0.5 * g.sum() * R.t(), dR = -0.5 * g.sum() * W.t();
  for (int64_t b = 0; b < x.size(0); ++b) {
    dW = dW + at::outer(0.5 * dz[b] + 2 * q[b] * R.t().mv(e[b]), x[b]);
    dR = dR + at::outer(-0.5 * dx[b] + 2 * q[b] * e[b], y[b]);
  }
  return {y, e.square().sum(1), dx, dW, dR};
}

}  // namespace dense

// snf_linear on the CPU: six matrix products (three without a reconstruction) and a few passes over
// the batch.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "../check.h"
#include "../precision.h"
#include "pooled_memory.h"
#include "total.h"

namespace snf {
namespace {

using at::Tensor;

Tensor rows(const Tensor& t, int64_t features) { return wide(t).view({-1, features}); }

template <typename T>
void row_sums_of_squares(const Tensor& values, Tensor& sums) {
  const int64_t columns = values.size(1);
  const T* in = values.const_data_ptr<T>();
  T* out = sums.mutable_data_ptr<T>();
  at::parallel_for(0, values.size(0), 1 + (1 << 15) / columns, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* v = in + row * columns;
      T lanes[16] = {};
      int64_t i = 0;
      for (; i + 16 <= columns; i += 16)
        for (int k = 0; k < 16; ++k) lanes[k] += v[i + k] * v[i + k];
      for (; i < columns; ++i) lanes[i % 16] += v[i] * v[i];
      T sum = 0;
      for (const T lane : lanes) sum += lane;
      out[row] = sum;
    }
  });
}

// By blocks of columns, so that the order of the terms does not depend on the threads.
template <typename T>
void column_sums(const Tensor& values, Tensor& sums) {
  constexpr int64_t kBlock = 64;
  const int64_t batch = values.size(0), columns = values.size(1);
  const int64_t blocks = (columns + kBlock - 1) / kBlock;
  const T* in = values.const_data_ptr<T>();
  T* out = sums.mutable_data_ptr<T>();
  const int64_t grain = 1 + (1 << 14) / (kBlock * std::max<int64_t>(batch, 1));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kBlock; first < std::min(end * kBlock, columns); first += kBlock) {
      const int64_t width = std::min(kBlock, columns - first);
      double block[kBlock] = {};
      for (int64_t row = 0; row < batch; ++row) {
        const T* v = in + row * columns + first;
        for (int64_t i = 0; i < width; ++i) block[i] += v[i];
      }
      for (int64_t i = 0; i < width; ++i) out[first + i] = static_cast<T>(block[i]);
    }
  });
}

// The square tile of kTile rows at `in`, transposed and scaled.
constexpr int64_t kTile = 4;
template <typename T>
void scaled_transpose_tile(const T* in, int64_t stride, T scale, T* out) {
  typedef T Row __attribute__((vector_size(kTile * sizeof(T)), aligned(alignof(T))));
  Row row[kTile];
  for (int a = 0; a < kTile; ++a) row[a] = scale * *reinterpret_cast<const Row*>(in + a * stride);
  const Row low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Row low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Row high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Row high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const auto put = [&](int64_t b, Row r) { *reinterpret_cast<Row*>(out + b * stride) = r; };
  put(0, __builtin_shufflevector(low01, low23, 0, 1, 4, 5));
  put(1, __builtin_shufflevector(low01, low23, 2, 3, 6, 7));
  put(2, __builtin_shufflevector(high01, high23, 0, 1, 4, 5));
  put(3, __builtin_shufflevector(high01, high23, 2, 3, 6, 7));
}

// out = scale * in', both square. Goes down a panel of `in` one cache line
// wide; the hardware does not foresee steps of a whole row, so lines are asked for ahead.
template <typename T>
void scaled_transpose(const T* in, int64_t features, T scale, T* out) {
  constexpr int64_t kPanel = 64 / sizeof(T), kAhead = 32;
  at::parallel_for(0, features, 64, [&](int64_t first, int64_t last) {
    for (int64_t i0 = first; i0 < last; i0 += kPanel) {
      const int64_t i1 = std::min(last, i0 + kPanel);
      for (int64_t j = 0; j < features; j += kTile) {
        const int64_t j1 = std::min(features, j + kTile);
        if (j + kAhead + kTile <= features)
          for (int64_t a = 0; a < kTile; ++a) {
            __builtin_prefetch(in + (j + kAhead + a) * features + i0);
            const int64_t row = i0 + (j + a) % kPanel;
            if (row < i1) __builtin_prefetch(out + row * features + j + kAhead, 1);
          }
        for (int64_t i = i0; i < i1; i += kTile) {
          if (i + kTile <= i1 && j + kTile <= features) {
            scaled_transpose_tile(in + j * features + i, features, scale, out + i * features + j);
            continue;
          }
          for (int64_t a = i; a < std::min(i1, i + kTile); ++a)
            for (int64_t b = j; b < j1; ++b) out[a * features + b] = scale * in[b * features + a];
        }
      }
    }
  });
}

// delta' x + scale * other', if there is a scale: laid down as the accumulator of the product.
Tensor weight_gradient(
    const Tensor& delta, const Tensor& x, std::optional<double> scale, const Tensor& other) {
  const int64_t features = x.size(1);
  Tensor grad = pooled_empty({features, features}, x.options());
  if (!scale) return at::mm_out(grad, delta.t(), x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "snf_linear_backward", [&] {
    scaled_transpose<scalar_t>(
        other.const_data_ptr<scalar_t>(), features, static_cast<scalar_t>(*scale),
        grad.mutable_data_ptr<scalar_t>());
  });
  return grad.addmm_(delta.t(), x);
}

Tensor product(const Tensor& a, const Tensor& b) {
  Tensor out = pooled_empty({a.size(0), b.size(1)}, a.options());
  return at::mm_out(out, a, b);
}

// What the products of backward need of the batch, in one pass.
struct Deltas {
  Tensor pull;    // 2 q e
  Tensor weight;  // dz / 2, to which the product pull R is added
  Tensor y;       // z - c
};

template <typename T>
void fill_deltas(
    const Tensor& dz, const Tensor& q, const Tensor& residual, const Tensor& z,
    const OptionalTensor& bias, Deltas& out) {
  const int64_t columns = dz.size(1);
  const T *dz_ = dz.const_data_ptr<T>(), *q_ = q.const_data_ptr<T>(),
          *e_ = residual.const_data_ptr<T>(), *z_ = z.const_data_ptr<T>();
  const T* c_ = bias ? bias->const_data_ptr<T>() : nullptr;
  T *pull = out.pull.mutable_data_ptr<T>(), *half = out.weight.mutable_data_ptr<T>();
  T* y = bias ? out.y.mutable_data_ptr<T>() : nullptr;
  at::parallel_for(0, dz.size(0), 1 + (1 << 14) / columns, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * columns;
      const T twice = 2 * q_[row];
      for (int64_t i = 0; i < columns; ++i) pull[at + i] = twice * e_[at + i];
      for (int64_t i = 0; i < columns; ++i) half[at + i] = T(0.5) * dz_[at + i];
      if (c_ != nullptr)
        for (int64_t i = 0; i < columns; ++i) y[at + i] = z_[at + i] - c_[i];
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const Tensor& weight_inv, const OptionalTensor& bias,
    bool reconstruct) {
  check_linear(x, weight, weight_inv, bias);
  const WithoutAutocast full_precision;
  const Tensor flat = rows(x, weight.size(0));
  Tensor z = product(flat, wide(weight).t());
  const auto batch = x.sizes().slice(0, x.dim() - 1);
  Tensor residual = at::empty({0}, flat.options()), recon = at::zeros(batch, flat.options());
  if (reconstruct) {
    residual = pooled_empty(flat.sizes(), flat.options());
    at::addmm_out(residual, flat, z, wide(weight_inv).t(), /*beta=*/-1);
    AT_DISPATCH_FLOATING_TYPES(flat.scalar_type(), "snf_linear_forward", [&] {
      row_sums_of_squares<scalar_t>(residual, recon);
    });
    residual = residual.view(x.sizes());
  }
  if (bias) z.add_(*bias);
  return {
      z.to(x.scalar_type()).view(x.sizes()), at::zeros(batch, recon.options()), recon, residual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_z, const OptionalTensor& grad_log_det, const OptionalTensor& grad_recon,
    const Tensor& x, const OptionalTensor& z, const OptionalTensor& residual, const Tensor& weight,
    const Tensor& weight_inv, const OptionalTensor& bias, double penalty_share,
    std::array<bool, 4> mask) {
  const WithoutAutocast full_precision;
  const bool reconstructs = z && residual;
  mask[2] = mask[2] && reconstructs;
  const int64_t features = weight.size(0);
  const Tensor dz = rows(grad_z, features), flat = rows(x, features);
  const Tensor w = wide(weight), r = wide(weight_inv);
  // Two weights share the gradient through z and log_det, or the forward one has all of it.
  const double share = reconstructs ? 0.5 : 1.0;
  // A gradient of 0 counts too: 0 times an infinite weight is no number.
  std::optional<double> term, minus_term;
  if (grad_log_det) {
    term = share * total(grad_log_det);
    minus_term = -*term;
  }
  const auto type = x.scalar_type();
  Tensor dx, dw, dr, dc;
  if (mask[0] || mask[2]) dx = product(dz, w);
  if (grad_recon && reconstructs && (mask[2] || penalty_share != 0)) {
    const auto like = [&] { return pooled_empty(dz.sizes(), dz.options()); };
    const Tensor out = rows(*z, features), e = residual->view({-1, features});
    Deltas deltas = {like(), like(), bias ? like() : out};
    AT_DISPATCH_FLOATING_TYPES(dz.scalar_type(), "snf_linear_backward", [&] {
      fill_deltas<scalar_t>(
          dz, *per_sample(grad_recon, dz.scalar_type()), e, out, wide(bias), deltas);
    });
    if (mask[1]) {
      if (penalty_share != 0) deltas.weight.addmm_(deltas.pull, r, /*beta=*/1, penalty_share);
      dw = weight_gradient(deltas.weight, flat, term, r);
    }
    if (mask[2]) dr = weight_gradient(deltas.pull.sub_(dx, 0.5), deltas.y, minus_term, w);
  } else {
    if (mask[1]) dw = weight_gradient(reconstructs ? dz * share : dz, flat, term, r);
    if (mask[2]) {
      const Tensor out = rows(*z, features);
      dr = weight_gradient(dx * -0.5, bias ? out - wide(*bias) : out, minus_term, w);
    }
  }
  if (mask[3]) {
    dc = at::empty({features}, dz.options());
    AT_DISPATCH_FLOATING_TYPES(
        dz.scalar_type(), "snf_linear_backward", [&] { column_sums<scalar_t>(dz, dc); });
  }
  if (mask[0]) dx = dx.view(x.sizes());
  // What was not asked for has no elements; outputs of an operator may not share memory.
  const auto output = [&](bool wanted, const Tensor& t) {
    return wanted ? t.to(type) : at::empty({0}, x.options());
  };
  return {output(mask[0], dx), output(mask[1], dw), output(mask[2], dr), output(mask[3], dc)};
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, CPU, m) {
  m.impl("snf_linear_forward", forward);
  m.impl("snf_linear_backward", backward);
}

}  // namespace snf

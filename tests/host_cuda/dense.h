// Ground truth in float64 by dense matrices, sharing no code with the kernels and needing no torch.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace dense {

using Numbers = std::vector<double>;

struct Matrix {
  int rows, columns;
  Numbers data;
  Matrix(int rows, int columns) : rows(rows), columns(columns), data(std::size_t(rows) * columns) {}
  double& operator()(int i, int j) { return data[std::size_t(i) * columns + j]; }
  double operator()(int i, int j) const { return data[std::size_t(i) * columns + j]; }
};

struct Layer {
  int channels, groups, height, width, dilation;
  bool circular;
  int per_group() const { return channels / groups; }
  int features() const { return channels * height * width; }
};

struct KernelSize {
  int rows, columns;
};

// visit(row, column, element): every place of the layer's matrix where a kernel element stands.
template <typename Visit>
void places(const Layer& l, KernelSize k, const Visit& visit) {
  const auto wrap = [&](int at, int extent) {
    return l.circular ? ((at % extent) + extent) % extent : at;
  };
  int element = 0;
  for (int o = 0; o < l.channels; ++o)
    for (int i = 0; i < l.per_group(); ++i)
      for (int a = 0; a < k.rows; ++a)
        for (int b = 0; b < k.columns; ++b, ++element)
          for (int h = 0; h < l.height; ++h)
            for (int w = 0; w < l.width; ++w) {
              const int c = o / l.per_group() * l.per_group() + i;
              const int y = wrap(h + (a - k.rows / 2) * l.dilation, l.height);
              const int x = wrap(w + (b - k.columns / 2) * l.dilation, l.width);
              if (y < 0 || y >= l.height || x < 0 || x >= l.width) continue;
              visit((o * l.height + h) * l.width + w, (c * l.height + y) * l.width + x, element);
            }
}

inline Matrix matrix(const Layer& l, KernelSize k, const Numbers& kernel) {
  Matrix t(l.features(), l.features());
  places(l, k, [&](int row, int column, int element) { t(row, column) += kernel[element]; });
  return t;
}

inline Numbers onto_kernel(const Layer& l, KernelSize k, const Matrix& gradient) {
  Numbers out(std::size_t(l.channels) * l.per_group() * k.rows * k.columns);
  places(l, k, [&](int row, int column, int element) { out[element] += gradient(row, column); });
  return out;
}

inline Numbers times(const Matrix& m, const double* v) {
  Numbers out(m.rows);
  for (int i = 0; i < m.rows; ++i)
    for (int j = 0; j < m.columns; ++j) out[i] += m(i, j) * v[j];
  return out;
}

inline Numbers transposed_times(const Matrix& m, const double* v) {
  Numbers out(m.columns);
  for (int i = 0; i < m.rows; ++i)
    for (int j = 0; j < m.columns; ++j) out[j] += m(i, j) * v[i];
  return out;
}

// One step, written out sample by sample from the one equation set: the weight takes data_share of
// the gradients through z and log_det and penalty_share of recon's, the inverse half and all.
struct Step {
  Numbers z, residual, recon, dx;
  Matrix dW, dR;
  Numbers dbias;  // of each feature
};

struct Inputs {
  int batch;
  Numbers x, bias, grad_z, grad_log_det, grad_recon;  // bias: of each feature
  double data_share = 0.5, penalty_share = 1;
};

inline Step step(const Matrix& W, const Matrix& R, const Inputs& in) {
  const int d = W.rows;
  Step s = {{}, {}, {}, {}, Matrix(d, d), Matrix(d, d), Numbers(d)};
  double total = 0;
  for (int b = 0; b < in.batch; ++b) {
    const double* const x = &in.x[std::size_t(b) * d];
    const double* const dz = &in.grad_z[std::size_t(b) * d];
    const double q = in.grad_recon[b];
    const Numbers y = times(W, x), dx = transposed_times(W, dz);
    Numbers e = times(R, y.data());
    double recon = 0;
    for (int i = 0; i < d; ++i) {
      e[i] -= x[i];
      recon += e[i] * e[i];
    }
    const Numbers back = transposed_times(R, e.data());
    for (int i = 0; i < d; ++i) {
      s.z.push_back(y[i] + in.bias[i]);
      s.residual.push_back(e[i]);
      s.dx.push_back(dx[i]);
      s.dbias[i] += dz[i];
      for (int j = 0; j < d; ++j) {
        s.dW(i, j) += (in.data_share * dz[i] + 2 * q * in.penalty_share * back[i]) * x[j];
        s.dR(i, j) += (-0.5 * dx[i] + 2 * q * e[i]) * y[j];
      }
    }
    s.recon.push_back(recon);
    total += in.grad_log_det[b];
  }
  for (int i = 0; i < d; ++i)
    for (int j = 0; j < d; ++j) {
      s.dW(i, j) += in.data_share * total * R(j, i);
      s.dR(i, j) -= 0.5 * total * W(j, i);
    }
  return s;
}

inline Numbers draw(std::mt19937& engine, std::size_t count, double scale = 1) {
  std::normal_distribution<double> normal;
  Numbers out(count);
  for (double& value : out) value = scale * normal(engine);
  return out;
}

}  // namespace dense

#include "check.h"
#include "check_elementwise.h"
#include "check_network.h"

#include <limits>
#include <sstream>
#include <vector>

namespace snf {
namespace {

std::string dtype_name(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kByte: return "torch.uint8";
    case at::kChar: return "torch.int8";
    case at::kShort: return "torch.int16";
    case at::kInt: return "torch.int32";
    case at::kLong: return "torch.int64";
    case at::kBool: return "torch.bool";
    case at::kHalf: return "torch.float16";
    case at::kBFloat16: return "torch.bfloat16";
    case at::kFloat: return "torch.float32";
    case at::kDouble: return "torch.float64";
    case at::kComplexFloat: return "torch.complex64";
    case at::kComplexDouble: return "torch.complex128";
    default: return c10::toString(t.scalar_type());
  }
}

void check_floating(const at::Tensor& x) {
  TORCH_CHECK_TYPE(
      at::isFloatingType(x.scalar_type()), "x must be a floating-point tensor; got ",
      dtype_name(x));
}

void check_bias(const OptionalTensor& bias, int64_t size, const char* letter) {
  TORCH_CHECK_VALUE(
      !bias || (bias->dim() == 1 && bias->size(0) == size), "bias must have shape [", letter,
      "] = [", size, "]; got ", bias->sizes());
}

void check_alike(const at::Tensor& x, const char* name, const OptionalTensor& other) {
  if (!other) return;
  TORCH_CHECK_TYPE(
      other->scalar_type() == x.scalar_type(), name, " must have the dtype of x, ", dtype_name(x),
      "; got ", dtype_name(*other));
  TORCH_CHECK_VALUE(
      other->device() == x.device(), name, " must be on the device of x, ", x.device(), "; got ",
      other->device());
}

// As Python writes it, for the numbers that are refused: 0.0, -1.5, inf, nan.
std::string python_float(double value) {
  std::ostringstream text;
  text.precision(12);
  text << value;
  const std::string plain = text.str();
  return plain.find_first_of(".enf") == std::string::npos ? plain + ".0" : plain;
}

}  // namespace

void check_linear(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_inv,
    const OptionalTensor& bias) {
  check_floating(x);
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && weight.size(0) == weight.size(1),
      "weight must be a square matrix [D, D]; got ", weight.sizes());
  const int64_t features = weight.size(0);
  TORCH_CHECK_VALUE(
      x.dim() >= 1 && x.size(-1) == features, "x must have shape [..., D] with D = ", features,
      "; got ", x.sizes());
  TORCH_CHECK_VALUE(
      weight_inv.sizes() == weight.sizes(), "weight_inv must have shape [D, D] = ", weight.sizes(),
      "; got ", weight_inv.sizes());
  check_bias(bias, features, "D");
  check_alike(x, "weight", weight);
  check_alike(x, "weight_inv", weight_inv);
  check_alike(x, "bias", bias);
}

void check_conv2d(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_inv,
    const OptionalTensor& bias, int64_t dilation, int64_t groups) {
  check_floating(x);
  TORCH_CHECK_VALUE(x.dim() == 4, "x must have shape [B, C, H, W]; got ", x.sizes());
  const int64_t channels = x.size(1);
  TORCH_CHECK_VALUE(
      x.size(2) >= 1 && x.size(3) >= 1, "x must have at least one pixel; got ", x.sizes());
  TORCH_CHECK_VALUE(
      1 <= dilation && dilation < int64_t{1} << 31, "dilation must be in [1, 2^31); got ",
      dilation);
  TORCH_CHECK_VALUE(
      groups >= 1 && channels % groups == 0, "groups must divide the channels C = ", channels,
      "; got ", groups);
  const std::initializer_list<std::pair<const char*, const at::Tensor&>> kernels = {
      {"weight", weight}, {"weight_inv", weight_inv}};
  for (const auto& [name, kernel] : kernels) {
    TORCH_CHECK_VALUE(
        kernel.dim() == 4 && kernel.size(0) == channels && kernel.size(1) * groups == channels,
        name, " must have shape [C, C/groups, k, k] = [", channels, ", ", channels / groups,
        ", k, k]; got ", kernel.sizes());
    TORCH_CHECK_VALUE(
        kernel.size(2) % 2 == 1 && kernel.size(3) % 2 == 1, name,
        " must have an odd kernel size, so that the shape is kept (Squeeze changes the "
        "resolution); got ",
        kernel.sizes());
  }
  check_bias(bias, channels, "C");
  check_alike(x, "weight", weight);
  check_alike(x, "weight_inv", weight_inv);
  check_alike(x, "bias", bias);
}

void check_penalty_share(double share) {
  TORCH_CHECK_VALUE(
      0 <= share && share <= 1, "penalty_share must be in [0, 1]; got ", python_float(share));
}

void check_triangular(const at::Tensor& z, const at::Tensor& weight) {
  TORCH_CHECK_TYPE(
      at::isFloatingType(z.scalar_type()), "z must be a floating-point tensor; got ",
      dtype_name(z));
  TORCH_CHECK_VALUE(z.dim() == 4, "z must have shape [B, C, H, W]; got ", z.sizes());
  const int64_t channels = z.size(1);
  TORCH_CHECK_VALUE(
      channels >= 1 && z.size(2) >= 1 && z.size(3) >= 1,
      "z must have at least one channel and pixel; got ", z.sizes());
  TORCH_CHECK_VALUE(
      weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == channels &&
          weight.size(2) >= 1 && weight.size(3) >= 1,
      "weight must have shape [C, C, kh, kw] = [", channels, ", ", channels, ", kh, kw]; got ",
      weight.sizes());
  TORCH_CHECK_TYPE(
      weight.scalar_type() == z.scalar_type(), "weight must have the dtype of z, ", dtype_name(z),
      "; got ", dtype_name(weight));
  TORCH_CHECK_VALUE(
      weight.device() == z.device(), "weight must be on the device of z, ", z.device(), "; got ",
      weight.device());
}

void check_rq_spline(
    const at::Tensor& x, const at::Tensor& widths, const at::Tensor& heights,
    const at::Tensor& derivatives, double tail_bound) {
  check_floating(x);
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must have shape [B, ...]; got ", x.sizes());
  const at::IntArrayRef event = x.sizes().slice(1);
  const int64_t bins = widths.dim() == 0 ? 0 : widths.size(-1);
  TORCH_CHECK_VALUE(
      1 <= bins && bins <= 999, "widths must have 1 to 999 bins in its last dimension; got ", bins);
  const at::IntArrayRef sets = widths.sizes().slice(0, widths.dim() - 1);
  const bool own = sets.size() == event.size() + 1 && sets.slice(1) == event &&
                   (sets[0] == 1 || sets[0] == x.size(0));
  TORCH_CHECK_VALUE(
      sets == event || own, "widths must have shape [..., K] with [...] = ", event,
      " (shared by the batch) or ", x.sizes(), " (one set an element); got ", widths.sizes());
  TORCH_CHECK_VALUE(
      heights.sizes() == widths.sizes(), "heights must have the shape of widths, ", widths.sizes(),
      "; got ", heights.sizes());
  std::vector<int64_t> inner = widths.sizes().vec();
  inner.back() = bins - 1;
  TORCH_CHECK_VALUE(
      derivatives.sizes() == at::IntArrayRef(inner),
      "derivatives must have shape [..., K - 1] = ", at::IntArrayRef(inner), "; got ",
      derivatives.sizes());
  TORCH_CHECK_VALUE(
      1e-30 <= tail_bound && tail_bound <= 1e30,  // its multiples are numbers in float32 too
      "tail_bound must be in [1e-30, 1e30]; got ", python_float(tail_bound));
  check_alike(x, "widths", widths);
  check_alike(x, "heights", heights);
  check_alike(x, "derivatives", derivatives);
}

void check_batch(const at::Tensor& x, const char* name) {
  TORCH_CHECK_TYPE(
      at::isFloatingType(x.scalar_type()), name, " must be a floating-point tensor; got ",
      dtype_name(x));
  TORCH_CHECK_VALUE(x.dim() >= 1, name, " must have shape [B, ...]; got ", x.sizes());
}

void check_alpha(double alpha) {
  TORCH_CHECK_VALUE(0 < alpha && alpha <= 1, "alpha must be in (0, 1]; got ", alpha);
}

void check_alpha(double alpha, double low, double high) {
  TORCH_CHECK_VALUE(
      low <= alpha && alpha < high, "alpha must be in [", low, ", ", high, "); got ", alpha);
}

void check_image_network(const at::Tensor& x, const NetworkWeights& w) {
  check_floating(x);
  TORCH_CHECK_VALUE(x.dim() == 4, "x must have shape [B, C, H, W]; got ", x.sizes());
  TORCH_CHECK_VALUE(
      x.size(2) >= 1 && x.size(3) >= 1, "x must have at least one pixel; got ", x.sizes());
  TORCH_CHECK_VALUE(
      w.weight_1.dim() == 4 && w.weight_1.size(0) >= 1,
      "weight_1 must have shape [N, C, 3, 3] with N at least 1; got ", w.weight_1.sizes());
  TORCH_CHECK_VALUE(
      w.weight_3.dim() == 4 && w.weight_3.size(0) >= 1,
      "weight_3 must have shape [T, N, 3, 3] with T at least 1; got ", w.weight_3.sizes());
  const int64_t inputs = x.size(1), hidden = w.weight_1.size(0), outputs = w.weight_3.size(0);
  struct Wanted {
    const char *name, *letters;
    const at::Tensor& tensor;
    std::vector<int64_t> shape;
  };
  const std::vector<Wanted> all = {
      {"weight_1", "N, C, 3, 3", w.weight_1, {hidden, inputs, 3, 3}},
      {"bias_1", "N", w.bias_1, {hidden}},
      {"weight_2", "N, N, 1, 1", w.weight_2, {hidden, hidden, 1, 1}},
      {"bias_2", "N", w.bias_2, {hidden}},
      {"weight_3", "T, N, 3, 3", w.weight_3, {outputs, hidden, 3, 3}},
      {"bias_3", "T", w.bias_3, {outputs}},
      {"log_scale", "T, 1, 1", w.log_scale, {outputs, 1, 1}}};
  for (const Wanted& one : all) {
    TORCH_CHECK_VALUE(
        one.tensor.sizes() == at::IntArrayRef(one.shape), one.name, " must have shape [",
        one.letters, "] = ", at::IntArrayRef(one.shape), "; got ", one.tensor.sizes());
    check_alike(x, one.name, one.tensor);
  }
}

void check_actnorm(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& log_scale) {
  check_floating(x);
  TORCH_CHECK_VALUE(x.dim() >= 2, "x must have shape [B, C, ...]; got ", x.sizes());
  const std::initializer_list<std::pair<const char*, const at::Tensor&>> vectors = {
      {"shift", shift}, {"log_scale", log_scale}};
  for (const auto& [name, vector] : vectors)
    TORCH_CHECK_VALUE(
        vector.dim() == 1 && vector.size(0) == x.size(1), name, " must have shape [C] = [",
        x.size(1), "]; got ", vector.sizes());
  check_alike(x, "shift", shift);
  check_alike(x, "log_scale", log_scale);
}

void check_affine_coupling(const at::Tensor& x, const at::Tensor& params) {
  check_floating(x);
  TORCH_CHECK_VALUE(x.dim() >= 2, "x must have shape [B, C, ...]; got ", x.sizes());
  const bool fits = params.dim() == x.dim() && params.size(0) == x.size(0) &&
                    params.sizes().slice(2) == x.sizes().slice(2);
  TORCH_CHECK_VALUE(
      fits && params.size(1) % 2 == 0 && 2 <= params.size(1) && params.size(1) <= 2 * x.size(1),
      "params must have shape [B, 2T, ...] with T from 1 to C, for x of ", x.sizes(), "; got ",
      params.sizes());
  check_alike(x, "params", params);
}

}  // namespace snf

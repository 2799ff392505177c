// The operators' schemas. Each public operator runs, with gradients, over a forward operator that
// also gives what backward needs, and a backward operator; those two have one file a device.
// Without reconstruct the forward operator's residual has no elements, and the backward operator,
// given neither it nor z, has no gradient for weight_inv.
#include <torch/library.h>

TORCH_LIBRARY(snf_ext, m) {
  m.def(
      "snf_linear(Tensor x, Tensor weight, Tensor weight_inv, Tensor? bias=None,"
      " bool reconstruct=True, float penalty_share=1.0)"
      " -> (Tensor z, Tensor log_det, Tensor recon)");
  m.def(
      "snf_linear_forward(Tensor x, Tensor weight, Tensor weight_inv, Tensor? bias,"
      " bool reconstruct) -> (Tensor z, Tensor log_det, Tensor recon, Tensor residual)");
  m.def(
      "snf_linear_backward(Tensor grad_z, Tensor? grad_log_det, Tensor? grad_recon, Tensor x,"
      " Tensor? z, Tensor? residual, Tensor weight, Tensor weight_inv, Tensor? bias,"
      " float penalty_share, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");

  m.def(
      "snf_conv2d(Tensor x, Tensor weight, Tensor weight_inv, Tensor? bias=None, int dilation=1,"
      " int groups=1, bool circular=False, bool reconstruct=True, float penalty_share=1.0)"
      " -> (Tensor z, Tensor log_det, Tensor recon)");
  m.def(
      "snf_conv2d_forward(Tensor x, Tensor weight, Tensor weight_inv, Tensor? bias, int dilation,"
      " int groups, bool circular, bool reconstruct)"
      " -> (Tensor z, Tensor log_det, Tensor recon, Tensor residual)");
  m.def(
      "snf_conv2d_backward(Tensor grad_z, Tensor? grad_log_det, Tensor? grad_recon, Tensor x,"
      " Tensor? z, Tensor? residual, Tensor weight, Tensor weight_inv, Tensor? bias, int dilation,"
      " int groups, bool circular, float penalty_share, bool[4] output_mask) -> (Tensor, Tensor, "
      "Tensor, Tensor)");

  m.def(
      "debias_linear(Tensor v, Tensor weight, Tensor weight_inv, float[] scales, float share)"
      " -> (Tensor gradient, Tensor growth)");
  m.def(
      "debias_conv2d(Tensor v, Tensor weight, Tensor weight_inv, int dilation, int groups,"
      " bool circular, float[] scales, float share) -> (Tensor gradient, Tensor growth)");
  m.def("with_gradient(Tensor log_det, Tensor weight, Tensor gradient) -> Tensor");

  m.def(
      "image_network(Tensor x, Tensor weight_1, Tensor bias_1, Tensor weight_2, Tensor bias_2,"
      " Tensor weight_3, Tensor bias_3, Tensor log_scale) -> Tensor");
  m.def(
      "image_network_backward(Tensor grad_y, Tensor x, Tensor weight_1, Tensor bias_1,"
      " Tensor weight_2, Tensor bias_2, Tensor weight_3, Tensor bias_3, Tensor log_scale,"
      " bool[8] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // No backward of its own: gradients are registered in snf_ext/ops/triangular.py.
  m.def("triangular_conv2d_solve(Tensor z, Tensor weight, bool upper=False) -> Tensor");

  m.def(
      "rq_spline(Tensor x, Tensor widths, Tensor heights, Tensor derivatives, float tail_bound,"
      " bool inverse=False) -> (Tensor y, Tensor log_abs_det)");
  m.def(
      "rq_spline_backward(Tensor? grad_y, Tensor? grad_log_abs_det, Tensor x, Tensor widths,"
      " Tensor heights, Tensor derivatives, float tail_bound, bool inverse, bool[4] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor)");

  m.def("smooth_leaky_relu(Tensor x, float alpha) -> (Tensor y, Tensor log_abs_det)");
  m.def(
      "smooth_leaky_relu_backward(Tensor grad_y, Tensor? grad_log_abs_det, Tensor x, float alpha)"
      " -> Tensor");
  m.def(
      "smooth_leaky_relu_inverse(Tensor z, float alpha)"
      " -> (Tensor x, Tensor log_abs_det, Tensor iterations)");
  m.def(
      "smooth_leaky_relu_inverse_backward(Tensor grad_x, Tensor? grad_log_abs_det, Tensor x,"
      " float alpha) -> Tensor");
  m.def(
      "actnorm(Tensor x, Tensor shift, Tensor log_scale, bool inverse=False)"
      " -> (Tensor y, Tensor log_abs_det)");
  m.def(
      "actnorm_backward(Tensor grad_y, Tensor? grad_log_abs_det, Tensor x, Tensor shift,"
      " Tensor log_scale, bool inverse, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  m.def(
      "affine_coupling(Tensor x, Tensor params, bool inverse=False)"
      " -> (Tensor y, Tensor log_abs_det)");
  m.def(
      "affine_coupling_backward(Tensor grad_y, Tensor? grad_log_abs_det, Tensor x, Tensor params,"
      " bool inverse, bool[2] output_mask) -> (Tensor, Tensor)");
  m.def("logit(Tensor x, float alpha, bool inverse=False) -> (Tensor y, Tensor log_abs_det)");
  m.def(
      "logit_backward(Tensor grad_y, Tensor? grad_log_abs_det, Tensor x, float alpha, bool inverse)"
      " -> Tensor");
  m.def("normal_log_prob(Tensor z) -> Tensor");
  m.def("normal_log_prob_backward(Tensor grad_log_prob, Tensor z) -> Tensor");
}

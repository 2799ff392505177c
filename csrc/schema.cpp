// The operators' schemas. Each public operator runs, with gradients, over a forward operator that
// also gives what backward needs, and a backward operator; those two have one file a device.
#include <torch/library.h>

TORCH_LIBRARY(snf_ext, m) {
  m.def(
      "snf_linear(Tensor x, Tensor weight, Tensor weight_inv, Tensor? bias=None)"
      " -> (Tensor z, Tensor log_det, Tensor recon)");
  m.def(
      "snf_linear_forward(Tensor x, Tensor weight, Tensor weight_inv, Tensor? bias)"
      " -> (Tensor z, Tensor log_det, Tensor recon, Tensor residual)");
  m.def(
      "snf_linear_backward(Tensor grad_z, Tensor? grad_log_det, Tensor? grad_recon, Tensor x,"
      " Tensor z, Tensor residual, Tensor weight, Tensor weight_inv, Tensor? bias,"
      " bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");

  m.def(
      "snf_conv2d(Tensor x, Tensor weight, Tensor weight_inv, Tensor? bias=None, int dilation=1,"
      " int groups=1, bool circular=False) -> (Tensor z, Tensor log_det, Tensor recon)");
  m.def(
      "snf_conv2d_forward(Tensor x, Tensor weight, Tensor weight_inv, Tensor? bias, int dilation,"
      " int groups, bool circular) -> (Tensor z, Tensor log_det, Tensor recon, Tensor residual)");
  m.def(
      "snf_conv2d_backward(Tensor grad_z, Tensor? grad_log_det, Tensor? grad_recon, Tensor x,"
      " Tensor z, Tensor residual, Tensor weight, Tensor weight_inv, Tensor? bias, int dilation,"
      " int groups, bool circular, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");

  // No backward of its own: gradients are registered in snf_ext/ops/triangular.py.
  m.def("triangular_conv2d_solve(Tensor z, Tensor weight, bool upper=False) -> Tensor");

  m.def(
      "rq_spline(Tensor x, Tensor widths, Tensor heights, Tensor derivatives, float tail_bound,"
      " bool inverse=False) -> (Tensor y, Tensor log_abs_det)");
  m.def(
      "rq_spline_backward(Tensor? grad_y, Tensor? grad_log_abs_det, Tensor x, Tensor widths,"
      " Tensor heights, Tensor derivatives, float tail_bound, bool inverse, bool[4] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}

// In a build without CUDA: an explanation in place of the dispatcher's own message.
#ifndef SNF_WITH_CUDA

#include <torch/library.h>

namespace {

void explain(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().name(),
      " got a CUDA tensor, but this snf_ext was built for the CPU only. Rebuild it with CUDA "
      "(FORCE_CUDA=1 pip install --no-build-isolation .), or call the function of the same name "
      "in snf_ext.ops or snf_ext.reference, which runs in plain torch on any device");
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, CUDA, m) {
  for (const char* name :
       {"snf_linear_forward", "snf_linear_backward", "snf_conv2d_forward", "snf_conv2d_backward",
        "triangular_conv2d_solve", "rq_spline", "rq_spline_backward", "smooth_leaky_relu",
        "smooth_leaky_relu_backward", "smooth_leaky_relu_inverse",
        "smooth_leaky_relu_inverse_backward", "actnorm", "actnorm_backward", "affine_coupling",
        "affine_coupling_backward", "logit", "logit_backward", "normal_log_prob",
        "normal_log_prob_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&explain>());
}

#endif

// Argument checks of a coupling's network; see check.h.
#pragma once

#include <ATen/core/Tensor.h>

namespace snf {

// The weights, biases and log-scales: conv 3x3, 1x1 and 3x3.
struct NetworkWeights {
  const at::Tensor &weight_1, &bias_1, &weight_2, &bias_2, &weight_3, &bias_3, &log_scale;
};

void check_image_network(const at::Tensor& x, const NetworkWeights& weights);

}  // namespace snf

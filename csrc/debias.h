// What the learned inverse lacks, estimated on probes.
#pragma once

#include <tuple>

#include "check.h"

namespace snf {

void check_debias(
    const at::Tensor& v, const at::Tensor& weight, const at::Tensor& weight_inv, int64_t dilation,
    int64_t groups, at::ArrayRef<double> scales);

// share / P of the gradient in W of sum_p <v_p, W u_p>, u = sum_k scales[k-1] R E^k v with
// E = I - W R, or zeros where E does not shrink the probes; and ||E^K v|| / ||E^(K-1) v||. By the
// layer's own operators, on any device.
std::tuple<at::Tensor, at::Tensor> debias_conv2d(
    const at::Tensor& v, const at::Tensor& weight, const at::Tensor& weight_inv, int64_t dilation,
    int64_t groups, bool circular, at::ArrayRef<double> scales, double share);

}  // namespace snf

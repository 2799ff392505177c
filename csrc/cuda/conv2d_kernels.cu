// Launches of the fused convolution kernels.
#include "conv2d.h"

#include "conv2d_backward.cuh"
#include "conv2d_finish.cuh"
#include "conv2d_forward.cuh"
#include "pointwise.h"

namespace snf {
namespace {

ConvGeometry geometry(const ConvShape& s) {
  return {s.channels, s.per_group, s.image.rows, s.image.columns, s.dilation, s.circular};
}

std::size_t bytes(int floats) { return static_cast<std::size_t>(floats) * sizeof(float); }

template <typename T>
void finish(const Finish<T>& p, cudaStream_t stream) {
  const int64_t width = int64_t{p.kernels[0].order.outputs(p.kernels[0].block)} +
                        p.kernels[1].order.outputs(p.kernels[1].block) + p.geometry.channels;
  launch(
      "conv2d_finish", conv2d_finish<T>, (width + kWarp - 1) / kWarp, kWarp * kFinishRows,
      kWarp * kFinishRows * sizeof(Wide<T>), stream, p);
}

}  // namespace

int64_t forward_workspace(const ConvForwardPlan& plan, const ConvShape& shape) {
  return plan.tiles.count() == 1 ? 0 : shape.batch * plan.tiles.count();
}

int64_t backward_workspace(const ConvBackwardPlan& plan, const ConvShape& shape) {
  return int64_t{plan.blocks} * plan.partial_floats(shape.channels);
}

template <typename T>
void conv2d_forward(
    const ConvShape& shape, const ConvForwardPlan& plan, const ConvForwardArguments<T>& a,
    cudaStream_t stream) {
  const int tiles = plan.tiles.count();
  const bool sums_tiles = tiles > 1 && a.residual != nullptr;
  const ConvForward<T> p = {plan,         geometry(shape),
                            a.x,          a.weight,
                            a.weight_inv, a.bias,
                            a.z,          a.residual,
                            a.log_det,    sums_tiles ? a.workspace : a.recon};
  const auto kernel =
      plan.block == kChannelBlock ? conv2d_forward<kChannelBlock, T> : conv2d_forward<1, T>;
  launch(
      "conv2d_forward", kernel, shape.batch * tiles, plan.threads, bytes(plan.shared_floats),
      stream, p);
  if (sums_tiles) row_sums<float>(a.workspace, tiles, a.recon, shape.batch, stream);
}

template <typename T>
void conv2d_backward(
    const ConvShape& shape, const ConvBackwardPlan& plan, const ConvBackwardArguments<T>& a,
    cudaStream_t stream) {
  const bool wants_weight = a.grad_weight != nullptr, wants_inverse = a.grad_weight_inv != nullptr;
  const bool wants_bias = a.grad_bias != nullptr,
             reduces = wants_weight || wants_inverse || wants_bias;
  const ConvBackward<T> p = {
      plan,
      geometry(shape),
      shape.batch * plan.tiles.count(),
      a.grad_z,
      a.x,
      a.z,
      a.weight,
      a.weight_inv,
      a.bias,
      a.grad_recon,
      a.residual,
      a.grad_x,
      reduces ? a.workspace : nullptr,
      wants_weight,
      wants_inverse,
      wants_bias,
      a.data_share,
      a.penalty_share};
  const auto kernel =
      plan.block == kChannelBlock ? conv2d_backward<kChannelBlock, T> : conv2d_backward<1, T>;
  launch(
      "conv2d_backward", kernel, plan.blocks, plan.threads, bytes(plan.shared_floats), stream, p);
  if (!reduces) return;
  finish<T>(
      {geometry(shape),
       {{plan.weight, plan.block, shape.weight_inv, a.weight_inv, a.grad_weight, a.data_share},
        {plan.weight_inv, plan.block, shape.weight, a.weight, a.grad_weight_inv, -0.5f}},
       a.grad_bias,
       a.workspace,
       plan.blocks,
       a.grad_log_det,
       shape.batch},
      stream);
}

template <typename T>
void conv2d_inverse_term(
    const ConvShape& shape, const InverseTermArguments<T>& a, cudaStream_t stream) {
  // One row of partial gradients, in the order of the kernels themselves.
  const auto order = [&](Size kernel) {
    CorrelationPlan p = {};
    p.kernel = kernel;
    p.tap_rows = p.tap_columns = 1;
    p.tap_groups = kernel.count();
    p.items = shape.channels * shape.per_group * kernel.count();
    return p;
  };
  finish<T>(
      {geometry(shape),
       {{order(shape.weight), 1, shape.weight_inv, a.weight_inv, a.grad_weight, a.data_share},
        {order(shape.weight_inv), 1, shape.weight, a.weight, a.grad_weight_inv, -0.5f}},
       nullptr,
       a.gradients,
       1,
       a.grad_log_det,
       shape.batch},
      stream);
}

#define SNF_INSTANTIATE(T)                                                                       \
  template void conv2d_forward(                                                                  \
      const ConvShape&, const ConvForwardPlan&, const ConvForwardArguments<T>&, cudaStream_t);   \
  template void conv2d_backward(                                                                 \
      const ConvShape&, const ConvBackwardPlan&, const ConvBackwardArguments<T>&, cudaStream_t); \
  template void conv2d_inverse_term(const ConvShape&, const InverseTermArguments<T>&, cudaStream_t);
SNF_INSTANTIATE(float)
SNF_INSTANTIATE(__half)
SNF_INSTANTIATE(__nv_bfloat16)
template void conv2d_inverse_term(
    const ConvShape&, const InverseTermArguments<double>&, cudaStream_t);

}  // namespace snf

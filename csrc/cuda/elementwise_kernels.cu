// Launches of the element-wise operators.
#include "elementwise_kernels.cuh"

namespace snf {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t channels_of(const ElementwiseShape& s) {
  return s.parameters.stride == 0 ? s.runs : s.length;
}

// Enough blocks to fill the device; no block's elements outgrow 31 bits.
ChannelBlocks channel_blocks(const ElementwiseShape& s, int64_t multiprocessors) {
  const int64_t channels = channels_of(s), pixels = s.event() / channels;
  const int64_t wanted = divide_up(4 * multiprocessors, channels);
  const int64_t useful = divide_up(s.samples * pixels, 4 * kElementThreads);
  const int64_t shares = wanted < useful ? wanted : useful;
  int64_t each = divide_up(s.samples, shares);
  const int64_t most = (int64_t{1} << 30) / pixels;
  if (each > most) each = most < 1 ? 1 : most;
  return {channels, pixels, each};
}

int64_t shares_of(const ElementwiseShape& s, const ChannelBlocks& blocks) {
  return divide_up(s.samples, blocks.each);
}

constexpr std::size_t kScratch = kElementThreads / kWarp * sizeof(double);

}  // namespace

int64_t elementwise_parts(const ElementwiseShape& s) { return divide_up(s.event(), kSamplePart); }

template <typename Op, typename T>
void elementwise_forward(
    const Op& op, const ElementwiseForward<T, Wide<T>>& a, cudaStream_t stream) {
  const int64_t parts = elementwise_parts(a.shape);
  launch(
      "elementwise_forward_step", elementwise_forward_step<Op, T>, a.shape.samples * parts,
      kElementThreads, kScratch, stream, op, a, Divider(static_cast<int>(a.shape.length)),
      static_cast<int>(parts));
}

template <typename Op, typename T>
void elementwise_backward(
    const Op& op, const ElementwiseBackward<T, Wide<T>>& a, cudaStream_t stream) {
  const int64_t parts = elementwise_parts(a.shape);
  launch(
      "elementwise_backward_step", elementwise_backward_step<Op, T>, a.shape.samples * parts,
      kElementThreads, 0, stream, op, a, Divider(static_cast<int>(a.shape.length)),
      static_cast<int>(parts));
}

int64_t channel_workspace(const ElementwiseShape& s, int64_t multiprocessors) {
  return 2 * channels_of(s) * shares_of(s, channel_blocks(s, multiprocessors));
}

template <typename Op, typename T>
void channel_backward(
    const Op& op, const ElementwiseBackward<T, Wide<T>>& a, Wide<T>* workspace,
    int64_t multiprocessors, cudaStream_t stream) {
  const ChannelBlocks blocks = channel_blocks(a.shape, multiprocessors);
  const int64_t shares = shares_of(a.shape, blocks);
  launch(
      "channel_backward_step", channel_backward_step<Op, T>, blocks.channels * shares,
      kElementThreads, kScratch, stream, op, a, blocks, Divider(static_cast<int>(blocks.pixels)),
      shares, workspace);
  launch(
      "channel_finish", channel_finish<T>, divide_up(2 * blocks.channels, kElementThreads),
      kElementThreads, 0, stream, static_cast<const Wide<T>*>(workspace), blocks.channels, shares,
      a.grad_first, a.grad_second);
}

#define SNF_INSTANTIATE_FOR(OP, T)                                     \
  template void elementwise_forward(                                   \
      const OP&, const ElementwiseForward<T, Wide<T>>&, cudaStream_t); \
  template void elementwise_backward(                                  \
      const OP&, const ElementwiseBackward<T, Wide<T>>&, cudaStream_t);
#define SNF_INSTANTIATE(OP)       \
  SNF_INSTANTIATE_FOR(OP, float)  \
  SNF_INSTANTIATE_FOR(OP, double) \
  SNF_INSTANTIATE_FOR(OP, __half) \
  SNF_INSTANTIATE_FOR(OP, __nv_bfloat16)
SNF_ELEMENTWISE(SNF_INSTANTIATE)

#define SNF_INSTANTIATE_CHANNELS(T)                                                             \
  template void channel_backward(                                                               \
      const Actnorm&, const ElementwiseBackward<T, Wide<T>>&, Wide<T>*, int64_t, cudaStream_t); \
  template void channel_backward(                                                               \
      const ActnormInverse&, const ElementwiseBackward<T, Wide<T>>&, Wide<T>*, int64_t,         \
      cudaStream_t);
SNF_INSTANTIATE_CHANNELS(float)
SNF_INSTANTIATE_CHANNELS(double)
SNF_INSTANTIATE_CHANNELS(__half)
SNF_INSTANTIATE_CHANNELS(__nv_bfloat16)

}  // namespace snf

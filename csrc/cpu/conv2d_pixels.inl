// Convolutions with vectors along the pixels: for few channels, and for 1x1 kernels.
//
// Each channel is a padded plane. A tap shifts a plane, so an output vector is a sum of unaligned
// input vectors, each shared by several output channels. A plane is computed as one flat run,
// whatever the image's width; what lands in the gaps between rows is thrown away. It ends with the
// last pixel: its last vectors are moved back to do so, and some pixels are computed twice.

namespace snf {
namespace SNF_ISA {
namespace pixels {

constexpr int kMaxRun = SNF_ACCUMULATORS / 4;  // vectors along a plane
constexpr int kMaxOutputs = 8;                 // output channels
constexpr int kMaxTaps = 9;                    // (input channel, tap) pairs of a weight gradient

inline int64_t run_limit() { return kMaxRun; }

// Output channels that share the loaded inputs, so that outputs * run fills the registers.
inline int64_t output_limit(int64_t run) {
  const int64_t fit = SNF_ACCUMULATORS / run;
  return fit < kMaxOutputs ? fit : kMaxOutputs;
}

// A plane's vectors in runs, none longer than the plane.
template <typename T>
inline Parts runs(const Plane& plane) {
  constexpr int64_t lanes = Lanes<T>::count;
  const int64_t whole = plane.length / lanes;
  return Parts((plane.length + lanes - 1) / lanes, whole < run_limit() ? whole : run_limit());
}

template <typename T>
inline Parts outputs(const Conv2dShape& shape, const Plane& plane) {
  return Parts(shape.per_group(), output_limit(runs<T>(plane).largest()));
}

// Packed order: group, block of output channels, input channel, tap, output channel.
template <typename T>
void pack(
    const Conv2dShape& shape, const Plane& plane, const T* kernel, int64_t taps, bool flipped,
    T* out) {
  const int64_t width = shape.per_group();
  const Parts blocks = outputs<T>(shape, plane);
  for (int64_t group = 0; group < shape.groups; ++group) {
    const T* source = kernel + group * width * width * taps;
    int64_t first = 0;
    for (int64_t block = 0; block < blocks.count; first += blocks[block], ++block)
      for (int64_t i = 0; i < width; ++i)
        for (int64_t tap = 0; tap < taps; ++tap)
          for (int64_t o = first; o < first + blocks[block]; ++o)
            *out++ = flipped ? source[(i * width + o) * taps + taps - 1 - tap]
                             : source[(o * width + i) * taps + tap];
  }
}

// One block: kOutputs planes, kRun vectors of each, of gain * kernel * in + scale * start (0 if
// null). The kernel's (input channel, tap) pairs are at least one.
template <typename T, int kOutputs, int kRun>
void convolve_block(
    const T* in, int64_t plane_size, const T* weight, const int64_t* offsets, int64_t pairs, T gain,
    const T* start, T scale, T* out) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t lanes = Lanes<T>::count;
  Vector sum[kOutputs][kRun];
  for (int o = 0; o < kOutputs; ++o)
    for (int t = 0; t < kRun; ++t) sum[o][t] = Vector{};
  int64_t pair = 0;
  do {
    const T* source = in + offsets[pair];
    Vector value[kRun];
    for (int t = 0; t < kRun; ++t) value[t] = load(source + t * lanes);
    for (int o = 0; o < kOutputs; ++o)
      for (int t = 0; t < kRun; ++t) sum[o][t] += weight[o] * value[t];
    weight += kOutputs;
  } while (++pair < pairs);
  for (int o = 0; o < kOutputs; ++o)
    for (int t = 0; t < kRun; ++t) {
      const int64_t at = o * plane_size + t * lanes;
      const Vector from = start == nullptr ? Vector{} : scale * load(start + at);
      store(out + at, from + gain * sum[o][t]);
    }
}

template <typename T>
using ConvolveBlock = decltype(&convolve_block<T, 1, 1>);

template <typename T, int kRun>
ConvolveBlock<T> convolve_block_of(int64_t outputs) {
  switch (outputs) {
    case 1: return convolve_block<T, 1, kRun>;
    case 2: return convolve_block<T, 2, kRun>;
    case 3: return convolve_block<T, 3, kRun>;
    case 4: return convolve_block<T, 4, kRun>;
    default: break;
  }
  if constexpr (5 * kRun <= SNF_ACCUMULATORS)
    if (outputs == 5) return convolve_block<T, 5, kRun>;
  if constexpr (6 * kRun <= SNF_ACCUMULATORS)
    if (outputs == 6) return convolve_block<T, 6, kRun>;
  if constexpr (7 * kRun <= SNF_ACCUMULATORS)
    if (outputs == 7) return convolve_block<T, 7, kRun>;
  if constexpr (8 * kRun <= SNF_ACCUMULATORS)
    if (outputs == 8) return convolve_block<T, 8, kRun>;
  __builtin_unreachable();
}

template <typename T>
ConvolveBlock<T> convolve_block_of(int64_t outputs, int64_t run) {
  switch (run) {
    case 1: return convolve_block_of<T, 1>(outputs);
    case 2: return convolve_block_of<T, 2>(outputs);
    case 3: return convolve_block_of<T, 3>(outputs);
    default: break;
  }
  if constexpr (kMaxRun > 3) {
    if (run == 4) return convolve_block_of<T, 4>(outputs);
    if (run == 5) return convolve_block_of<T, 5>(outputs);
    if (run == 6) return convolve_block_of<T, 6>(outputs);
  }
  __builtin_unreachable();
}

// out = gain * kernel * in + scale * start, on planes; `out` is left with garbage in its gaps.
template <typename T>
void convolve(
    const Conv2dShape& shape, const Plane& plane, const PackedKernel<T>& kernel, const T* in,
    T gain, const T* start, T scale, T* out) {
  const int64_t width = shape.per_group(), pairs = width * kernel.size.taps();
  const Parts spans = runs<T>(plane), blocks = outputs<T>(shape, plane);
  const T* weight = kernel.values;
  for (int64_t group = 0; group < shape.groups; ++group) {
    const int64_t base = group * width * plane.size + plane.lead;
    int64_t first = 0;
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t size = blocks[block];
      int64_t t = 0;
      for (int64_t span = 0; span < spans.count; ++span) {
        const int64_t run = spans[span] * Lanes<T>::count;
        if (t + run > plane.length) t = plane.length - run;
        const int64_t into = base + first * plane.size + t;
        convolve_block_of<T>(size, spans[span])(
            in + base + t, plane.size, weight, kernel.offsets, pairs, gain,
            start == nullptr ? nullptr : start + into, scale, out + into);
        t += run;
      }
      weight += pairs * size;
      first += size;
    }
  }
}

// One block of a weight gradient: kOutputs delta planes against kTaps shifted input planes, over
// several images `stride` apart.
template <typename T, int kOutputs, int kTaps>
void correlate_block(
    const T* delta, const T* in, int64_t images, int64_t stride, int64_t plane_size, int64_t length,
    const int64_t* shifts, T* grad, int64_t grad_stride) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t lanes = Lanes<T>::count;
  Vector sum[kOutputs][kTaps];
  for (int o = 0; o < kOutputs; ++o)
    for (int j = 0; j < kTaps; ++j) sum[o][j] = Vector{};
  const int64_t rest = length % lanes, whole = length - rest;
  // The last vector overlaps the one before. What is counted already is left out on both sides, not
  // multiplied by 0: it may be infinite.
  const auto fresh = last_lanes<T>(rest) > T(0);
  const auto add = [&]<bool kLast>(int64_t t) {
    Vector d[kOutputs];
    for (int o = 0; o < kOutputs; ++o) {
      d[o] = load(delta + o * plane_size + t);
      if constexpr (kLast) d[o] = fresh ? d[o] : Vector{};
    }
    for (int j = 0; j < kTaps; ++j) {
      Vector value = load(in + shifts[j] + t);
      if constexpr (kLast) value = fresh ? value : Vector{};
      for (int o = 0; o < kOutputs; ++o) sum[o][j] += d[o] * value;
    }
  };
  for (int64_t image = 0; image < images; ++image, delta += stride, in += stride) {
    for (int64_t t = 0; t < whole; t += lanes) add.template operator()<false>(t);
    if (rest > 0) add.template operator()<true>(length - lanes);
  }
  for (int o = 0; o < kOutputs; ++o)
    for (int j = 0; j < kTaps; ++j) grad[o * grad_stride + j] += sum_of_lanes<T>(sum[o][j]);
}

template <typename T>
using CorrelateBlock = decltype(&correlate_block<T, 1, 1>);

template <typename T, int kOutputs>
CorrelateBlock<T> correlate_block_of(int64_t taps) {
  switch (taps) {
    case 1: return correlate_block<T, kOutputs, 1>;
    case 2: return correlate_block<T, kOutputs, 2>;
    case 3: return correlate_block<T, kOutputs, 3>;
    default: break;
  }
  if constexpr (4 * kOutputs <= SNF_ACCUMULATORS)
    if (taps == 4) return correlate_block<T, kOutputs, 4>;
  if constexpr (5 * kOutputs <= SNF_ACCUMULATORS)
    if (taps == 5) return correlate_block<T, kOutputs, 5>;
  if constexpr (6 * kOutputs <= SNF_ACCUMULATORS)
    if (taps == 6) return correlate_block<T, kOutputs, 6>;
  if constexpr (7 * kOutputs <= SNF_ACCUMULATORS)
    if (taps == 7) return correlate_block<T, kOutputs, 7>;
  if constexpr (8 * kOutputs <= SNF_ACCUMULATORS)
    if (taps == 8) return correlate_block<T, kOutputs, 8>;
  if constexpr (9 * kOutputs <= SNF_ACCUMULATORS)
    if (taps == 9) return correlate_block<T, kOutputs, 9>;
  __builtin_unreachable();
}

template <typename T>
CorrelateBlock<T> correlate_block_of(int64_t outputs, int64_t taps) {
  switch (outputs) {
    case 1: return correlate_block_of<T, 1>(taps);
    case 2: return correlate_block_of<T, 2>(taps);
    case 3: return correlate_block_of<T, 3>(taps);
    case 4: return correlate_block_of<T, 4>(taps);
    default: __builtin_unreachable();
  }
}

// grad += weight gradient of the images, of the kernel's shape (C, C/groups, taps).
template <typename T>
void correlate(
    const Conv2dShape& shape, const Plane& plane, const PackedKernel<T>& kernel, const T* delta,
    const T* in, int64_t images, T* grad) {
  const int64_t width = shape.per_group(), stride = shape.channels * plane.size;
  const int64_t pairs = width * kernel.size.taps();
  const Parts blocks(width, 4);
  const int64_t fit = SNF_ACCUMULATORS / blocks.largest();
  const Parts tap_blocks(pairs, fit < kMaxTaps ? fit : kMaxTaps);
  for (int64_t group = 0; group < shape.groups; ++group) {
    const int64_t base = group * width * plane.size + plane.lead;
    int64_t pair = 0;
    for (int64_t tap_block = 0; tap_block < tap_blocks.count; ++tap_block) {
      const int64_t count = tap_blocks[tap_block];
      int64_t o = 0;
      for (int64_t block = 0; block < blocks.count; ++block) {
        correlate_block_of<T>(blocks[block], count)(
            delta + base + o * plane.size, in + base, images, stride, plane.size, plane.length,
            kernel.offsets + pair, grad + (group * width + o) * pairs + pair, pairs);
        o += blocks[block];
      }
      pair += count;
    }
  }
}

// Gaps between rows and the rest of the computed run.
template <typename T>
void clear_gaps(const Conv2dShape& shape, const Plane& plane, T* planes) {
  const int64_t used = (shape.height - 1) * plane.pitch + shape.width;
  for (int64_t c = 0; c < shape.channels; ++c) {
    T* pixels = planes + c * plane.size + plane.lead;
    // Down the columns: a gap is one or two numbers wide, for which a call of memset is too much.
    for (int64_t i = shape.width; i < plane.pitch; ++i)
      for (int64_t row = 0; row + 1 < shape.height; ++row) pixels[row * plane.pitch + i] = T(0);
    for (int64_t i = used; i < plane.length; ++i) pixels[i] = T(0);
  }
}

// Makes planes fit to be convolved: zeros, or the wrapped image, all around the pixels.
template <typename T>
void fill_halo(const Conv2dShape& shape, const Plane& plane, T* planes) {
  clear_gaps(shape, plane, planes);
  if (!shape.circular) return;
  for (int64_t c = 0; c < shape.channels; ++c) {
    T* pixels = planes + c * plane.size + plane.lead;
    for (int64_t row = 0; row < shape.height; ++row)
      for (int64_t i = 1; i <= plane.halo_columns; ++i) {
        T* line = pixels + row * plane.pitch;
        line[-i] = line[wrap(-i, shape.width)];
        line[shape.width - 1 + i] = line[wrap(i - 1, shape.width)];
      }
    const int64_t line_size = shape.width + 2 * plane.halo_columns;
    for (int64_t i = 1; i <= plane.halo_rows; ++i) {
      T* above = pixels - i * plane.pitch - plane.halo_columns;
      T* below = pixels + (shape.height - 1 + i) * plane.pitch - plane.halo_columns;
      const T* from = pixels - plane.halo_columns;
      const T* last = from + wrap(-i, shape.height) * plane.pitch;
      const T* first = from + wrap(i - 1, shape.height) * plane.pitch;
      for (int64_t j = 0; j < line_size; ++j) {
        above[j] = last[j];
        below[j] = first[j];
      }
    }
  }
}

// to = f(from) for rows of `width` numbers, `from_pitch` and `to_pitch` apart, in whole vectors:
// past its end a row but the last reaches into the next one, which is written after it.
template <typename T, typename F>
void copy_rows(
    int64_t rows, int64_t width, const T* from, int64_t from_pitch, T* to, int64_t to_pitch,
    const F& f) {
  constexpr int64_t lanes = Lanes<T>::count;
  const int64_t rounded = (width + lanes - 1) / lanes * lanes;
  if (rounded - width <= width)
    for (; rows > 1; --rows, from += from_pitch, to += to_pitch)
      for (int64_t i = 0; i < rounded; i += lanes) store(to + i, f(load(from + i)));
  for (; rows > 0; --rows, from += from_pitch, to += to_pitch)
    for (int64_t i = 0; i < width; ++i) to[i] = f(from[i]);
}

// planes = image - shift[channel], with its halo.
template <typename T>
void load_image(
    const Conv2dShape& shape, const Plane& plane, const T* image, const T* shift, T* planes) {
  for (int64_t c = 0; c < shape.channels; ++c) {
    const T minus = shift == nullptr ? T(0) : shift[c];
    copy_rows(
        shape.height, shape.width, image + c * shape.pixels(), shape.width,
        planes + c * plane.size + plane.lead, plane.pitch,
        [=](auto value) { return value - minus; });
  }
  fill_halo(shape, plane, planes);
}

// image = planes + shift[channel].
template <typename T>
void store_image(
    const Conv2dShape& shape, const Plane& plane, const T* planes, const T* shift, T* image) {
  for (int64_t c = 0; c < shape.channels; ++c) {
    const T plus = shift == nullptr ? T(0) : shift[c];
    copy_rows(
        shape.height, shape.width, planes + c * plane.size + plane.lead, plane.pitch,
        image + c * shape.pixels(), shape.width, [=](auto value) { return value + plus; });
  }
}

// Zeros around the computed run of each plane. Loading an image and clearing its gaps does the
// rest, so this is needed once for a buffer.
template <typename T>
void clear_surroundings(const Plane& plane, T* planes, int64_t count) {
  for (int64_t p = 0; p < count; ++p, planes += plane.size) {
    for (int64_t i = 0; i < plane.lead; ++i) planes[i] = T(0);
    for (int64_t i = plane.lead + plane.length; i < plane.size; ++i) planes[i] = T(0);
  }
}

// Planes of an image: itself where it can be, or else a copy.
template <typename T>
const T* planes_of(const Conv2dShape& shape, const Plane& plane, const T* image, T* copy) {
  if (plane.bare) return image;
  load_image<T>(shape, plane, image, nullptr, copy);
  return copy;
}

template <typename T>
void forward(const Conv2dForward<T>& step, int64_t begin, int64_t end) {
  const Conv2dShape& shape = step.shape;
  const Plane& plane = step.plane;
  const int64_t volume = shape.channels * plane.size, image_size = shape.channels * shape.pixels();
  T* copies = workspace<T>(3 * volume);
  clear_surroundings(plane, copies, 2 * shape.channels);
  for (int64_t image = begin; image < end; ++image) {
    const int64_t at = image * image_size;
    const T* x = planes_of(shape, plane, step.x + at, copies);
    T* y = plane.bare && step.bias == nullptr ? step.z + at : copies + volume;
    convolve<T>(shape, plane, step.weight, x, T(1), nullptr, T(0), y);
    if (y != step.z + at) store_image(shape, plane, y, step.bias, step.z + at);
    step.recon[image] = T(0);
    if (step.residual == nullptr) continue;
    fill_halo(shape, plane, y);
    T* e = plane.bare ? step.residual + at : copies + 2 * volume;
    convolve<T>(shape, plane, step.inverse, y, T(1), x, T(-1), e);
    if (!plane.bare) store_image<T>(shape, plane, e, nullptr, step.residual + at);
    step.recon[image] = sum_of_squares(step.residual + at, image_size);
  }
}

template <typename T>
void backward(
    const Conv2dBackward<T>& step, int64_t begin, int64_t end, T* grad_weight, T* grad_inverse) {
  const Conv2dShape& shape = step.shape;
  const Plane& plane = step.plane;
  const int64_t volume = shape.channels * plane.size, image_size = shape.channels * shape.pixels();
  const int64_t vectors = (plane.length + Lanes<T>::count - 1) / Lanes<T>::count;
  const int64_t together =
      images_together<T>((64 + vectors - 1) / vectors, 4 * volume, end - begin);
  const bool want_dx = step.grad_x != nullptr || step.want_inverse;
  const bool penalty = step.grad_recon != nullptr;
  // Several images' inputs of the weight gradients, where they lie or copied.
  const bool copy_x = !plane.bare, copy_y = !plane.bare || step.bias != nullptr;

  const int64_t buffers = 3 + 4 * together;
  T* dz_copy = workspace<T>(buffers * volume);
  T *e_copy = dz_copy + volume, *x_copies = e_copy + volume;
  T *y_copies = x_copies + together * volume, *delta_w = y_copies + together * volume;
  T *delta_r = delta_w + together * volume, *dx_planes = delta_r + together * volume;
  clear_surroundings(plane, dz_copy, (2 + 2 * together) * shape.channels);

  for (int64_t first = begin; first < end; first += together) {
    const int64_t images = end - first < together ? end - first : together;
    for (int64_t k = 0; k < images; ++k) {
      const int64_t image = first + k, at = image * image_size;
      T *own_w = delta_w + k * volume, *own_r = delta_r + k * volume;
      const T* dz = planes_of(shape, plane, step.grad_z + at, dz_copy);
      const T* e = penalty ? planes_of(shape, plane, step.residual + at, e_copy) : nullptr;
      const T pull = penalty ? T(2) * step.grad_recon[image] : T(0);
      T* dx = plane.bare && step.grad_x != nullptr ? step.grad_x + at : dx_planes;
      if (want_dx) {
        convolve<T>(shape, plane, step.weight_flipped, dz, T(1), nullptr, T(0), dx);
        if (step.grad_x != nullptr && !plane.bare)
          store_image<T>(shape, plane, dx, nullptr, step.grad_x + at);
      }
      if (step.want_weight) {
        if (step.pulls_weight)
          convolve<T>(shape, plane, step.inverse_flipped, e, pull, dz, step.data_share, own_w);
        else
          for (int64_t i = 0; i < volume; ++i) own_w[i] = step.data_share * dz[i];
        clear_gaps(shape, plane, own_w);
        if (copy_x) load_image<T>(shape, plane, step.x + at, nullptr, x_copies + k * volume);
      }
      if (step.want_inverse) {
        if (penalty)
          for (int64_t i = 0; i < volume; ++i) own_r[i] = pull * e[i] - T(0.5) * dx[i];
        else
          for (int64_t i = 0; i < volume; ++i) own_r[i] = T(-0.5) * dx[i];
        clear_gaps(shape, plane, own_r);
        if (copy_y) load_image<T>(shape, plane, step.z + at, step.bias, y_copies + k * volume);
      }
    }
    const int64_t at = first * image_size;
    if (step.want_weight)
      correlate<T>(
          shape, plane, step.weight_flipped, delta_w, copy_x ? x_copies : step.x + at, images,
          grad_weight);
    if (step.want_inverse)
      correlate<T>(
          shape, plane, step.inverse_flipped, delta_r, copy_y ? y_copies : step.z + at, images,
          grad_inverse);
  }
}

template <typename T>
int64_t packed_size(const Conv2dShape& shape, int64_t taps) {
  return shape.channels * shape.per_group() * taps;
}

// Gradients are summed in the kernel's own order.
template <typename T>
void unpack(const Conv2dShape& shape, int64_t taps, const T* packed, T* grad) {
  for (int64_t i = 0; i < packed_size<T>(shape, taps); ++i) grad[i] = packed[i];
}

template <typename T>
constexpr Conv2dPath<T> path = {packed_size<T>, pack<T>,        forward<T>,
                                backward<T>,    packed_size<T>, unpack<T>};

}  // namespace pixels
}  // namespace SNF_ISA
}  // namespace snf

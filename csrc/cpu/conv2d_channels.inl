// Convolutions with vectors along the channels: for many channels on small images.
//
// A padded plane holds, for each pixel, all channels of one group, filled up with zeros to whole
// vectors. An output pixel is a sum over taps and input channels of one input number times a vector
// of weights, which several pixels share; a weight gradient is the same with pixels summed over.
// Output channels are done in one panel of up to four vectors or in two, so that registers are left
// for several pixels. Groups are independent convolutions, done one after the other.

namespace snf {
namespace SNF_ISA {
namespace channels {

constexpr int kMaxVectors = 8;  // of one group's channels

template <typename T>
inline int64_t vector_count(const Conv2dShape& shape) {
  return (shape.per_group() + Lanes<T>::count - 1) / Lanes<T>::count;
}

// Calls f<kVectors, kPanels>() with a group's panels and the vectors in each.
template <typename T, typename F>
decltype(auto) with_panels(const Conv2dShape& shape, const F& f) {
  switch (vector_count<T>(shape)) {
    case 1: return f.template operator()<1, 1>();
    case 2: return f.template operator()<2, 1>();
    case 3: return f.template operator()<3, 1>();
    case 4: return f.template operator()<4, 1>();
    case 5:
    case 6: return f.template operator()<3, 2>();
    default: return f.template operator()<4, 2>();
  }
}

template <typename T, int kVectors, int kPanels>
constexpr int64_t kPadded = kPanels * kVectors * Lanes<T>::count;

template <typename T>
inline int64_t padded_channels(const Conv2dShape& shape) {
  return with_panels<T>(
      shape, []<int kVectors, int kPanels>() { return kPadded<T, kVectors, kPanels>; });
}

template <typename T>
int64_t packed_size(const Conv2dShape& shape, int64_t taps) {
  return shape.channels * padded_channels<T>(shape) * taps;
}

// Packed order: group, panel, tap, input channel, the panel's output channels (padded).
template <typename T>
void pack(
    const Conv2dShape& shape, const Plane&, const T* kernel, int64_t taps, bool flipped, T* out) {
  const int64_t width = shape.per_group(), padded = padded_channels<T>(shape);
  const int64_t panel =
      with_panels<T>(shape, []<int kVectors, int>() { return kPadded<T, kVectors, 1>; });
  for (int64_t group = 0; group < shape.groups; ++group, kernel += width * width * taps)
    for (int64_t first = 0; first < padded; first += panel)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t i = 0; i < width; ++i)
          for (int64_t o = first; o < first + panel; ++o)
            *out++ = o >= width ? T(0)
                     : flipped  ? kernel[(i * width + o) * taps + taps - 1 - tap]
                                : kernel[(o * width + i) * taps + tap];
}

// One panel of kPixels neighbours of one row: out = scale * start + sum of taps; start may be null
// for 0.
template <typename T, int kVectors, int kPanels, int kPixels>
void convolve_block(
    const T* in, int64_t inputs, const T* weight, const int64_t* offsets, int64_t taps,
    const T* start, T scale, T* out) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t lanes = Lanes<T>::count, padded = kPadded<T, kVectors, kPanels>;
  Vector sum[kPixels][kVectors];
  for (int p = 0; p < kPixels; ++p)
    for (int v = 0; v < kVectors; ++v)
      sum[p][v] = start == nullptr ? Vector{} : scale * load(start + p * padded + v * lanes);
  for (int64_t tap = 0; tap < taps; ++tap) {
    const T* source = in + offsets[tap] * padded;
    for (int64_t i = 0; i < inputs; ++i, weight += kVectors * lanes) {
      Vector w[kVectors];
      for (int v = 0; v < kVectors; ++v) w[v] = load(weight + v * lanes);
      for (int p = 0; p < kPixels; ++p) {
        const T value = source[p * padded + i];
        for (int v = 0; v < kVectors; ++v) sum[p][v] += value * w[v];
      }
    }
  }
  for (int p = 0; p < kPixels; ++p)
    for (int v = 0; v < kVectors; ++v) store(out + p * padded + v * lanes, sum[p][v]);
}

template <typename T>
using ConvolveBlock = decltype(&convolve_block<T, 1, 1, 1>);

template <int kVectors>
constexpr int kMaxPixels = SNF_ACCUMULATORS / kVectors;

// The block of `pixels` (1 to kMaxPixels) neighbours.
template <typename T, int kVectors, int kPanels, int kPixels = kMaxPixels<kVectors>>
ConvolveBlock<T> convolve_block_of(int64_t pixels) {
  if constexpr (kPixels > 1)
    if (pixels < kPixels) return convolve_block_of<T, kVectors, kPanels, kPixels - 1>(pixels);
  return convolve_block<T, kVectors, kPanels, kPixels>;
}

// How many rows below the centre a tap lies.
inline int64_t tap_row(const Conv2dShape& shape, KernelSize size, int64_t tap) {
  return (tap / size.columns - size.rows / 2) * shape.dilation;
}

// The rows of an image from which a tap `down` rows below is still inside it.
struct Inside {
  int64_t begin, end;
  Inside(const Conv2dShape& shape, int64_t down)
      : begin(shape.circular || down > 0 ? 0 : -down),
        end(shape.circular || down < 0 ? shape.height : shape.height - down) {}
  bool holds(int64_t row) const { return row >= begin && row < end; }
};

// out = scale * start + kernel * in, on the pixels of padded planes. Rows of taps that fall outside
// the image are left out, which is much of the work when the image is small.
template <typename T, int kVectors, int kPanels>
void convolve(
    const Conv2dShape& shape, const Plane& plane, const T* weight, const PackedKernel<T>& kernel,
    const T* in, const T* start, T scale, T* out) {
  constexpr int64_t padded = kPadded<T, kVectors, kPanels>, panel = padded / kPanels;
  const Parts spans(shape.width, kMaxPixels<kVectors>);
  const KernelSize size = kernel.size;
  const int64_t tap_weights = shape.per_group() * panel;
  for (int64_t c = 0; c < padded; c += panel, weight += size.taps() * tap_weights)
    for (int64_t row = 0; row < shape.height; ++row) {
      int64_t first = 0, last = size.taps();
      while (!Inside(shape, tap_row(shape, size, first)).holds(row)) first += size.columns;
      while (!Inside(shape, tap_row(shape, size, last - 1)).holds(row)) last -= size.columns;
      int64_t column = 0;
      for (int64_t span = 0; span < spans.count; column += spans[span], ++span) {
        const int64_t at = (plane.lead + row * plane.pitch + column) * padded;
        convolve_block_of<T, kVectors, kPanels>(spans[span])(
            in + at, shape.per_group(), weight + first * tap_weights, kernel.offsets + first,
            last - first, start == nullptr ? nullptr : start + at + c, scale, out + at + c);
      }
    }
}

// Input channels whose gradients are kept in registers together: a power of two.
template <int kVectors>
constexpr int inputs_together() {
  int n = 1;
  while (2 * n * kVectors <= SNF_ACCUMULATORS && n < 16) n *= 2;
  return n;
}

template <typename T, int kVectors, int kPanels>
inline int64_t group_gradient_size(const Conv2dShape& shape, int64_t taps) {
  constexpr int64_t step = inputs_together<kVectors>();
  const int64_t inputs = (shape.per_group() + step - 1) / step * step;
  return taps * inputs * kPadded<T, kVectors, kPanels>;
}

// grad += weight gradient of several images `stride` apart, in packed order with the input channels
// rounded up.
template <typename T, int kVectors, int kPanels>
void correlate(
    const Conv2dShape& shape, const Plane& plane, const PackedKernel<T>& kernel, const T* delta,
    const T* in, int64_t images, int64_t stride, T* grad) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t lanes = Lanes<T>::count, padded = kPadded<T, kVectors, kPanels>;
  constexpr int64_t panel = padded / kPanels;
  constexpr int kInputs = inputs_together<kVectors>();
  for (int64_t c = 0; c < padded; c += panel)
    for (int64_t tap = 0; tap < kernel.size.taps(); ++tap) {
      const Inside rows(shape, tap_row(shape, kernel.size, tap));
      for (int64_t i = 0; i < shape.per_group(); i += kInputs, grad += kInputs * panel) {
        Vector sum[kInputs][kVectors];
        for (int j = 0; j < kInputs; ++j)
          for (int v = 0; v < kVectors; ++v) sum[j][v] = load(grad + j * panel + v * lanes);
        for (int64_t image = 0; image < images; ++image)
          for (int64_t row = rows.begin; row < rows.end; ++row) {
            const int64_t at = image * stride + (plane.lead + row * plane.pitch) * padded;
            const T* d = delta + at + c;
            const T* x = in + at + kernel.offsets[tap] * padded + i;
            for (int64_t column = 0; column < shape.width; ++column, d += padded, x += padded) {
              Vector deltas[kVectors];
              for (int v = 0; v < kVectors; ++v) deltas[v] = load(d + v * lanes);
              for (int j = 0; j < kInputs; ++j)
                for (int v = 0; v < kVectors; ++v) sum[j][v] += x[j] * deltas[v];
            }
          }
        for (int j = 0; j < kInputs; ++j)
          for (int v = 0; v < kVectors; ++v) store(grad + j * panel + v * lanes, sum[j][v]);
      }
    }
}

// Packed order to the kernel's.
template <typename T, int kVectors, int kPanels>
void unpack_groups(const Conv2dShape& shape, int64_t taps, const T* packed, T* grad) {
  constexpr int64_t panel = kPadded<T, kVectors, 1>, step = inputs_together<kVectors>();
  const int64_t width = shape.per_group(), inputs = (width + step - 1) / step * step;
  const int64_t group_size = group_gradient_size<T, kVectors, kPanels>(shape, taps);
  for (int64_t group = 0; group < shape.groups; ++group, packed += group_size)
    for (int64_t o = 0; o < width; ++o) {
      const T* from = packed + o / panel * taps * inputs * panel + o % panel;
      for (int64_t i = 0; i < width; ++i)
        for (int64_t tap = 0; tap < taps; ++tap) *grad++ = from[(tap * inputs + i) * panel];
    }
}

// Wraps the image around a circular plane; a zero-padded one keeps the zeros it was made with.
template <typename T>
void fill_halo(const Conv2dShape& shape, const Plane& plane, int64_t padded, T* planes) {
  if (!shape.circular) return;
  const int64_t rows = plane.halo_rows, columns = plane.halo_columns;
  for (int64_t row = -rows; row < shape.height + rows; ++row)
    for (int64_t column = -columns; column < shape.width + columns; ++column) {
      const bool inside = row >= 0 && row < shape.height && column >= 0 && column < shape.width;
      if (inside) continue;
      const int64_t from = wrap(row, shape.height) * plane.pitch + wrap(column, shape.width);
      T* to = planes + (plane.lead + row * plane.pitch + column) * padded;
      const T* source = planes + (plane.lead + from) * padded;
      for (int64_t c = 0; c < padded; ++c) to[c] = source[c];
    }
}

// planes = scale * image - shift[channel], with its halo.
template <typename T>
void load_image(
    const Conv2dShape& shape, const Plane& plane, int64_t padded, const T* image, T scale,
    const T* shift, T* planes) {
  const int64_t width = shape.per_group(), pixels = shape.pixels();
  for (int64_t row = 0; row < shape.height; ++row)
    for (int64_t column = 0; column < shape.width; ++column) {
      T* to = planes + (plane.lead + row * plane.pitch + column) * padded;
      const T* from = image + row * shape.width + column;
      for (int64_t c = 0; c < width; ++c)
        to[c] = scale * from[c * pixels] - (shift == nullptr ? T(0) : shift[c]);
    }
  fill_halo(shape, plane, padded, planes);
}

// image = planes + shift[channel].
template <typename T>
void store_image(
    const Conv2dShape& shape, const Plane& plane, int64_t padded, const T* planes, const T* shift,
    T* image) {
  const int64_t width = shape.per_group();
  for (int64_t c = 0; c < width; ++c) {
    const T plus = shift == nullptr ? T(0) : shift[c];
    for (int64_t row = 0; row < shape.height; ++row, image += shape.width) {
      const T* from = planes + (plane.lead + row * plane.pitch) * padded + c;
      for (int64_t column = 0; column < shape.width; ++column)
        image[column] = from[column * padded] + plus;
    }
  }
}

template <typename T>
void clear(T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = T(0);
}

// Past a buffer's end, `correlate` may read input channels that round the group up.
constexpr int64_t kSlack = 16;

template <typename T, int kVectors, int kPanels>
void forward_images(const Conv2dForward<T>& step, int64_t begin, int64_t end) {
  const Conv2dShape& shape = step.shape;
  const Plane& plane = step.plane;
  constexpr int64_t padded = kPadded<T, kVectors, kPanels>;
  const int64_t volume = plane.size * padded, width = shape.per_group();
  const int64_t group_size = width * shape.pixels();
  T* x = workspace<T>(3 * volume);
  T *y = x + volume, *e = y + volume;
  clear(x, 2 * volume);
  for (int64_t image = begin; image < end; ++image) {
    T recon = 0;
    for (int64_t group = 0; group < shape.groups; ++group) {
      const int64_t at = (image * shape.groups + group) * group_size;
      const int64_t kernel = group * width * padded;
      load_image<T>(shape, plane, padded, step.x + at, T(1), nullptr, x);
      convolve<T, kVectors, kPanels>(
          shape, plane, step.weight.values + kernel * step.weight.size.taps(), step.weight, x,
          nullptr, T(0), y);
      const T* bias = step.bias == nullptr ? nullptr : step.bias + group * width;
      store_image(shape, plane, padded, y, bias, step.z + at);
      if (step.residual == nullptr) continue;
      fill_halo(shape, plane, padded, y);
      convolve<T, kVectors, kPanels>(
          shape, plane, step.inverse.values + kernel * step.inverse.size.taps(), step.inverse, y, x,
          T(-1), e);
      store_image<T>(shape, plane, padded, e, nullptr, step.residual + at);
      recon += sum_of_squares(step.residual + at, group_size);
    }
    step.recon[image] = recon;
  }
}

template <typename T, int kVectors, int kPanels>
void backward_images(
    const Conv2dBackward<T>& step, int64_t begin, int64_t end, T* grad_weight, T* grad_inverse) {
  const Conv2dShape& shape = step.shape;
  const Plane& plane = step.plane;
  constexpr int64_t padded = kPadded<T, kVectors, kPanels>;
  const int64_t volume = plane.size * padded, width = shape.per_group();
  const int64_t group_size = width * shape.pixels();
  const int64_t taps_w = step.weight_flipped.size.taps(), taps_r = step.inverse_flipped.size.taps();
  const int64_t size_w = group_gradient_size<T, kVectors, kPanels>(shape, taps_w);
  const int64_t size_r = group_gradient_size<T, kVectors, kPanels>(shape, taps_r);
  const int64_t together =
      images_together<T>((64 + shape.pixels() - 1) / shape.pixels(), 4 * volume, end - begin);
  const bool want_dx = step.grad_x != nullptr || step.want_inverse;
  const bool penalty = step.grad_recon != nullptr;

  const int64_t planes = (2 + 4 * together) * volume + kSlack;
  T* dz = workspace<T>(planes);
  T *pull = dz + volume, *x = pull + volume, *y = x + together * volume;
  T *delta_w = y + together * volume, *delta_r = delta_w + together * volume;
  clear(dz, planes);
  for (int64_t group = 0; group < shape.groups; ++group) {
    const int64_t kernel = group * width * padded;
    const T* bias = step.bias == nullptr ? nullptr : step.bias + group * width;
    for (int64_t first = begin; first < end; first += together) {
      const int64_t images = end - first < together ? end - first : together;
      for (int64_t k = 0; k < images; ++k) {
        const int64_t image = first + k, at = (image * shape.groups + group) * group_size;
        T *own_w = delta_w + k * volume, *own_r = delta_r + k * volume;
        load_image<T>(shape, plane, padded, step.grad_z + at, T(1), nullptr, dz);
        if (penalty)
          load_image<T>(
              shape, plane, padded, step.residual + at, T(2) * step.grad_recon[image], nullptr,
              pull);
        if (want_dx) {
          convolve<T, kVectors, kPanels>(
              shape, plane, step.weight_flipped.values + kernel * taps_w, step.weight_flipped, dz,
              nullptr, T(0), own_r);
          if (step.grad_x != nullptr)
            store_image<T>(shape, plane, padded, own_r, nullptr, step.grad_x + at);
        }
        if (step.want_weight) {
          if (step.pulls_weight)
            convolve<T, kVectors, kPanels>(
                shape, plane, step.inverse_flipped.values + kernel * taps_r, step.inverse_flipped,
                pull, dz, step.data_share, own_w);
          else
            for (int64_t i = 0; i < volume; ++i) own_w[i] = step.data_share * dz[i];
          load_image<T>(shape, plane, padded, step.x + at, T(1), nullptr, x + k * volume);
        }
        if (step.want_inverse) {
          for (int64_t i = 0; i < volume; ++i)
            own_r[i] = (penalty ? pull[i] : T(0)) - T(0.5) * own_r[i];
          load_image<T>(shape, plane, padded, step.z + at, T(1), bias, y + k * volume);
        }
      }
      if (step.want_weight)
        correlate<T, kVectors, kPanels>(
            shape, plane, step.weight_flipped, delta_w, x, images, volume, grad_weight);
      if (step.want_inverse)
        correlate<T, kVectors, kPanels>(
            shape, plane, step.inverse_flipped, delta_r, y, images, volume, grad_inverse);
    }
    grad_weight += step.want_weight ? size_w : 0;
    grad_inverse += step.want_inverse ? size_r : 0;
  }
}

template <typename T>
void forward(const Conv2dForward<T>& step, int64_t begin, int64_t end) {
  with_panels<T>(step.shape, [&]<int kVectors, int kPanels>() {
    forward_images<T, kVectors, kPanels>(step, begin, end);
  });
}

template <typename T>
void backward(
    const Conv2dBackward<T>& step, int64_t begin, int64_t end, T* grad_weight, T* grad_inverse) {
  with_panels<T>(step.shape, [&]<int kVectors, int kPanels>() {
    backward_images<T, kVectors, kPanels>(step, begin, end, grad_weight, grad_inverse);
  });
}

template <typename T>
int64_t gradient_size(const Conv2dShape& shape, int64_t taps) {
  return with_panels<T>(shape, [&]<int kVectors, int kPanels>() {
    return shape.groups * group_gradient_size<T, kVectors, kPanels>(shape, taps);
  });
}

template <typename T>
void unpack(const Conv2dShape& shape, int64_t taps, const T* packed, T* grad) {
  with_panels<T>(shape, [&]<int kVectors, int kPanels>() {
    unpack_groups<T, kVectors, kPanels>(shape, taps, packed, grad);
  });
}

template <typename T>
constexpr Conv2dPath<T> path = {packed_size<T>, pack<T>,          forward<T>,
                                backward<T>,    gradient_size<T>, unpack<T>};

}  // namespace channels
}  // namespace SNF_ISA
}  // namespace snf

// The kernels of a coupling's network, compiled once for each instruction set; see
// conv2d_vector.inl and image_network_kernel.h.

namespace snf {
namespace SNF_ISA {
namespace network {

constexpr int kMaxVectors = 2;  // of hidden channels in one block
constexpr int kMaxOutputs = 4;
constexpr int kMost = SNF_ACCUMULATORS < 12 ? SNF_ACCUMULATORS : 12;  // vectors kept in registers

// A block's function, by its run-time size: 1 to kMost of whatever the last parameter counts.
template <template <int> class Block, int kSize>
auto block_of(int64_t size) {
  if constexpr (kSize > 1)
    if (size < kSize) return block_of<Block, kSize - 1>(size);
  return Block<kSize>::run;
}

// Hidden channels of kPixels neighbours from `count` numbers near each: a sum of number times row.
// Begins at `start` and ends with a ReLU; or, given `mask`, at 0, kept where the mask is positive.
template <typename T, int kVectors, int kPixels>
void expand_block(
    const T* numbers, int64_t stride, const int64_t* offsets, int64_t count, const T* rows,
    int64_t padded, const T* start, const T* mask, T* out) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t lanes = Lanes<T>::count;
  Vector sum[kPixels][kVectors];
  for (int p = 0; p < kPixels; ++p)
    for (int v = 0; v < kVectors; ++v)
      sum[p][v] = start == nullptr ? Vector{} : load(start + v * lanes);
  for (int64_t j = 0; j < count; ++j, rows += padded) {
    const T* source = numbers + offsets[j];
    Vector row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(rows + v * lanes);
    for (int p = 0; p < kPixels; ++p) {
      const T value = source[p * stride];
      for (int v = 0; v < kVectors; ++v) sum[p][v] += value * row[v];
    }
  }
  for (int p = 0; p < kPixels; ++p)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = p * padded + v * lanes;
      const Vector sign = mask == nullptr ? sum[p][v] : load(mask + at);
      store(out + at, sign <= T(0) ? Vector{} : sum[p][v]);  // NaN goes on
    }
}

template <typename T, int kVectors>
struct ExpandBlock {
  template <int kPixels>
  struct Of {
    static constexpr auto run = expand_block<T, kVectors, kPixels>;
  };
};

template <typename T, int kVectors>
void expand_vectors(
    const NetworkShape& shape, const Plane& plane, const T* numbers, int64_t stride,
    const int64_t* offsets, int64_t count, const T* rows, const T* start, const T* mask, T* out) {
  constexpr int kPixels = kMost / kVectors;
  const Parts spans(shape.width, kPixels);
  for (int64_t row = 0; row < shape.height; ++row) {
    int64_t at = plane.lead + row * plane.pitch;
    for (int64_t span = 0; span < spans.count; at += spans[span], ++span)
      block_of<ExpandBlock<T, kVectors>::template Of, kPixels>(spans[span])(
          numbers + at * stride, stride, offsets, count, rows, shape.padded, start,
          mask == nullptr ? nullptr : mask + at * shape.padded, out + at * shape.padded);
  }
}

// All hidden channels of an image.
template <typename T>
void expand(
    const NetworkShape& shape, const Plane& plane, const T* numbers, int64_t stride,
    const int64_t* offsets, int64_t count, const T* rows, const T* start, const T* mask, T* out) {
  const Parts blocks(shape.padded / Lanes<T>::count, kMaxVectors);
  int64_t first = 0;
  for (int64_t block = 0; block < blocks.count; first += blocks[block] * Lanes<T>::count, ++block)
    (blocks[block] == 1
         ? expand_vectors<T, 1>
         : expand_vectors<T, 2>)(shape, plane, numbers, stride, offsets, count, rows + first,
                                 start == nullptr ? nullptr : start + first,
                                 mask == nullptr ? nullptr : mask + first, out + first);
}

// Lanes are added up for kOutputs numbers of kPixels neighbours: of hidden channels times rows,
// over all taps.
template <typename T, int kOutputs, int kPixels>
void reduce_block(
    const T* hidden, const int64_t* offsets, const T* rows, int64_t padded, const T* start, T* out,
    int64_t apart) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t lanes = Lanes<T>::count, taps = NetworkShape::kTaps;
  Vector sum[kOutputs][kPixels];
  for (int o = 0; o < kOutputs; ++o)
    for (int p = 0; p < kPixels; ++p) sum[o][p] = Vector{};
  for (int64_t tap = 0; tap < taps; ++tap, rows += padded) {
    const T* source = hidden + offsets[tap];
    for (int64_t v = 0; v < padded; v += lanes) {
      Vector value[kPixels];
      for (int p = 0; p < kPixels; ++p) value[p] = load(source + p * padded + v);
      for (int o = 0; o < kOutputs; ++o) {
        const Vector row = load(rows + o * taps * padded + v);
        for (int p = 0; p < kPixels; ++p) sum[o][p] += row * value[p];
      }
    }
  }
  for (int o = 0; o < kOutputs; ++o)
    for (int p = 0; p < kPixels; ++p)
      out[o * apart + p] = (start == nullptr ? T(0) : start[o]) + sum_of_lanes<T>(sum[o][p]);
}

template <typename T, int kOutputs>
struct ReduceBlock {
  template <int kPixels>
  struct Of {
    static constexpr auto run = reduce_block<T, kOutputs, kPixels>;
  };
};

template <typename T, int kOutputs>
void reduce_outputs(
    const NetworkShape& shape, const Plane& plane, const T* hidden, const int64_t* offsets,
    const T* rows, const T* start, T* out) {
  constexpr int kPixels = kMost / kOutputs < 6 ? kMost / kOutputs : 6;
  const Parts spans(shape.width, kPixels);
  for (int64_t row = 0; row < shape.height; ++row) {
    int64_t column = 0;
    for (int64_t span = 0; span < spans.count; column += spans[span], ++span)
      block_of<ReduceBlock<T, kOutputs>::template Of, kPixels>(spans[span])(
          hidden + (plane.lead + row * plane.pitch + column) * shape.padded, offsets, rows,
          shape.padded, start, out + row * shape.width + column, shape.pixels());
  }
}

// A dense image of `outputs` channels. offsets: of the taps, in numbers of a hidden plane.
template <typename T>
void reduce(
    const NetworkShape& shape, const Plane& plane, const T* hidden, const int64_t* offsets,
    const T* rows, int64_t outputs, const T* start, T* out) {
  const Parts blocks(outputs, kMaxOutputs);
  int64_t first = 0;
  for (int64_t block = 0; block < blocks.count; first += blocks[block], ++block) {
    const T* own = start == nullptr ? nullptr : start + first;
    const T* from = rows + first * NetworkShape::kTaps * shape.padded;
    T* to = out + first * shape.pixels();
    switch (blocks[block]) {
      case 1: reduce_outputs<T, 1>(shape, plane, hidden, offsets, from, own, to); break;
      case 2: reduce_outputs<T, 2>(shape, plane, hidden, offsets, from, own, to); break;
      case 3: reduce_outputs<T, 3>(shape, plane, hidden, offsets, from, own, to); break;
      default: reduce_outputs<T, 4>(shape, plane, hidden, offsets, from, own, to);
    }
  }
}

// kNumbers rows of a weight gradient: over the pixels, numbers near each times its hidden channels.
template <typename T, int kVectors, int kNumbers>
void correlate_block(
    const NetworkShape& shape, const Plane& plane, const T* numbers, int64_t stride,
    const int64_t* offsets, const T* hidden, T* rows) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t lanes = Lanes<T>::count;
  const int64_t padded = shape.padded;
  Vector sum[kNumbers][kVectors];
  for (int j = 0; j < kNumbers; ++j)
    for (int v = 0; v < kVectors; ++v) sum[j][v] = load(rows + j * padded + v * lanes);
  const T* sources[kNumbers];
  for (int64_t row = 0; row < shape.height; ++row) {
    const int64_t at = plane.lead + row * plane.pitch;
    for (int j = 0; j < kNumbers; ++j) sources[j] = numbers + at * stride + offsets[j];
    const T* channels = hidden + at * padded;
    for (int64_t column = 0; column < shape.width; ++column, channels += padded) {
      Vector value[kVectors];
      for (int v = 0; v < kVectors; ++v) value[v] = load(channels + v * lanes);
      for (int j = 0; j < kNumbers; ++j)
        for (int v = 0; v < kVectors; ++v) sum[j][v] += sources[j][column * stride] * value[v];
    }
  }
  for (int j = 0; j < kNumbers; ++j)
    for (int v = 0; v < kVectors; ++v) store(rows + j * padded + v * lanes, sum[j][v]);
}

template <typename T, int kVectors>
struct CorrelateBlock {
  template <int kNumbers>
  struct Of {
    static constexpr auto run = correlate_block<T, kVectors, kNumbers>;
  };
};

template <typename T, int kVectors>
void correlate_vectors(
    const NetworkShape& shape, const Plane& plane, const T* numbers, int64_t stride,
    const int64_t* offsets, int64_t count, const T* hidden, T* rows) {
  constexpr int kNumbers = kMost / kVectors;
  const Parts blocks(count, kNumbers);
  int64_t first = 0;
  for (int64_t block = 0; block < blocks.count; first += blocks[block], ++block)
    block_of<CorrelateBlock<T, kVectors>::template Of, kNumbers>(blocks[block])(
        shape, plane, numbers, stride, offsets + first, hidden, rows + first * shape.padded);
}

// rows += the weight gradient of one image.
template <typename T>
void correlate(
    const NetworkShape& shape, const Plane& plane, const T* numbers, int64_t stride,
    const int64_t* offsets, int64_t count, const T* hidden, T* rows) {
  const Parts blocks(shape.padded / Lanes<T>::count, kMaxVectors);
  int64_t first = 0;
  for (int64_t block = 0; block < blocks.count; first += blocks[block] * Lanes<T>::count, ++block)
    (blocks[block] == 1 ? correlate_vectors<T, 1>
                        : correlate_vectors<T, 2>)(shape, plane, numbers, stride, offsets, count,
                                                   hidden + first, rows + first);
}

// row += the sum of hidden channels over the pixels.
template <typename T>
void add_pixels(const NetworkShape& shape, const Plane& plane, const T* hidden, T* row) {
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t v = 0; v < shape.padded; v += lanes) {
    typename Lanes<T>::Vector sum = load(row + v);
    for (int64_t y = 0; y < shape.height; ++y) {
      const T* channels = hidden + (plane.lead + y * plane.pitch) * shape.padded + v;
      for (int64_t x = 0; x < shape.width; ++x) sum += load(channels + x * shape.padded);
    }
    store(row + v, sum);
  }
}

// sums[o] += the sum of each output's plane, which is clear around its pixels.
template <typename T>
void add_planes(const NetworkShape& shape, const Plane& plane, const T* planes, T* sums) {
  for (int64_t o = 0; o < shape.outputs; ++o) {
    typename Lanes<T>::Vector sum = {};
    const T* own = planes + o * plane.size + plane.lead;
    for (int64_t i = 0; i < plane.length; i += Lanes<T>::count) sum += load(own + i);
    sums[o] += sum_of_lanes<T>(sum);
  }
}

// The pixels of dense channels into their planes, whose surroundings stay as they are.
template <typename T>
void load_planes(
    const NetworkShape& shape, const Plane& plane, const T* image, int64_t channels, T* planes) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t row = 0; row < shape.height; ++row, image += shape.width) {
      T* line = planes + c * plane.size + plane.lead + row * plane.pitch;
      for (int64_t i = 0; i < shape.width; ++i) line[i] = image[i];
    }
}

// Planes of one thread, clear around their pixels. The gradients of the hidden channels take the
// place of the channels.
template <typename T>
struct Room {
  T *x, *grad_y, *first, *second;

  explicit Room(const NetworkStep<T>& step) {
    const NetworkShape& s = step.shape;
    const int64_t plane = step.plane.size, hidden = plane * s.padded;
    const int64_t total = (s.inputs + s.outputs) * plane + 2 * hidden;
    x = workspace<T>(total);
    for (int64_t i = 0; i < total; ++i) x[i] = T(0);
    grad_y = x + s.inputs * plane;
    first = grad_y + s.outputs * plane;
    second = first + hidden;
  }
};

// Zeros in the place of channels that fill up a vector: there an infinite number has met a weight
// of 0, and NaN would go on into the sums over lanes.
template <typename T>
void clear_filling(const NetworkShape& shape, const Plane& plane, T* hidden) {
  for (int64_t row = 0; row < shape.height; ++row)
    for (int64_t column = 0; column < shape.width; ++column) {
      T* channels = hidden + (plane.lead + row * plane.pitch + column) * shape.padded;
      for (int64_t c = shape.hidden; c < shape.padded; ++c) channels[c] = T(0);
    }
}

// The hidden channels of one image.
template <typename T>
void enter(const NetworkStep<T>& step, int64_t image, const Room<T>& room) {
  const NetworkShape& s = step.shape;
  const NetworkRows<T>& w = step.weights;
  load_planes(s, step.plane, step.x + image * step.x_stride, s.inputs, room.x);
  expand<T>(
      s, step.plane, room.x, 1, step.near.inputs, s.first(), w.first, w.bias_first, nullptr,
      room.first);
  expand<T>(
      s, step.plane, room.first, s.padded, step.near.hidden, s.hidden, w.middle, w.bias_middle,
      nullptr, room.second);
  clear_filling(s, step.plane, room.first);
  clear_filling(s, step.plane, room.second);
}

template <typename T>
void forward(const NetworkStep<T>& step, int64_t begin, int64_t end, T* y) {
  const NetworkShape& s = step.shape;
  const Room<T> room(step);
  for (int64_t image = begin; image < end; ++image) {
    enter(step, image, room);
    reduce<T>(
        s, step.plane, room.second, step.near.taps, step.weights.last, s.outputs,
        step.weights.bias_last, y + image * s.outputs * s.pixels());
  }
}

template <typename T>
void backward(
    const NetworkStep<T>& step, int64_t begin, int64_t end, const T* grad_y, T* grad_x, T* grads) {
  const NetworkShape& s = step.shape;
  const Plane& plane = step.plane;
  const NetworkOffsets& near = step.near;
  const Room<T> room(step);
  const bool wanted = grads != nullptr;
  const NetworkRows<T> to = wanted ? NetworkRows<T>(s, grads) : step.weights;
  for (int64_t image = begin; image < end; ++image) {
    enter(step, image, room);
    load_planes(s, plane, grad_y + image * s.outputs * s.pixels(), s.outputs, room.grad_y);
    if (wanted) {
      correlate<T>(s, plane, room.grad_y, 1, near.outputs, s.last(), room.second, to.last);
      add_planes(s, plane, room.grad_y, to.bias_last);
    }
    expand<T>(
        s, plane, room.grad_y, 1, near.outputs, s.last(), step.weights.last, nullptr, room.second,
        room.second);
    if (wanted) {
      correlate<T>(s, plane, room.first, s.padded, near.hidden, s.hidden, room.second, to.middle);
      add_pixels(s, plane, room.second, to.bias_middle);
    }
    expand<T>(
        s, plane, room.second, s.padded, near.hidden, s.hidden, step.transposed, nullptr,
        room.first, room.first);
    if (wanted) {
      correlate<T>(s, plane, room.x, 1, near.inputs, s.first(), room.first, to.first);
      add_pixels(s, plane, room.first, to.bias_first);
    }
    if (grad_x != nullptr)
      reduce<T>(
          s, plane, room.first, near.mirrored, step.weights.first, s.inputs, nullptr,
          grad_x + image * s.inputs * s.pixels());
  }
}

}  // namespace network

const NetworkKernel<float>& network_float() {
  static constexpr NetworkKernel<float> kernel = {
      Lanes<float>::count, network::forward<float>, network::backward<float>};
  return kernel;
}

const NetworkKernel<double>& network_double() {
  static constexpr NetworkKernel<double> kernel = {
      Lanes<double>::count, network::forward<double>, network::backward<double>};
  return kernel;
}

}  // namespace SNF_ISA
}  // namespace snf

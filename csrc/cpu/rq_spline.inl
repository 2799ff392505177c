// The spline's kernels, compiled once for each instruction set.
//
// After conv2d_vector.inl, whose rules hold here too. Inner loops run over the lanes of a block,
// whose number is a constant, and have no branches, so that the compiler makes them vector code.

namespace snf {
namespace SNF_ISA {
namespace rq_spline {

constexpr int kLanes = kSplineLanes, kBlock = 16;

template <typename T>
using Vector = typename Lanes<T>::Vector;

// The tables of one tile: knots 0 .. bins of each kind, and for backward the softmaxes and raw
// derivatives that they came from, and the sums of gradients at the inner knots.
template <typename T>
struct Tile {
  int bins;
  T *knots[3], *gradients[3];  // x, y, slopes: [bins + 1][kLanes]
  T* shares[2];                // [bins][kLanes]

  Tile(int bins, T* scratch) : bins(bins) {
    const int64_t table = (bins + 1) * kLanes;
    for (int i = 0; i < 3; ++i) knots[i] = scratch + i * table;
    for (int i = 0; i < 3; ++i) gradients[i] = scratch + (3 + i) * table;
    for (int i = 0; i < 2; ++i) shares[i] = scratch + 6 * table + i * bins * kLanes;
  }
};

template <typename T>
inline void copy(const T* from, int count, T* to) {
  __builtin_memcpy(to, from, static_cast<unsigned long>(count) * sizeof(T));
}

// [lane][count] in memory -> [count][lane]; lanes that hold nothing get zeros.
template <typename T>
void gather(const SplineJob<T>& job, const T* raw, int64_t element, int lanes, int count, T* to) {
  int64_t set = job.shared ? element % job.columns : element;
  for (int lane = 0; lane < lanes; ++lane) {
    for (int k = 0; k < count; ++k) to[k * kLanes + lane] = raw[set * count + k];
    if (++set == job.columns && job.shared) set = 0;
  }
  for (int k = 0; k < count; ++k)
    for (int lane = lanes; lane < kLanes; ++lane) to[k * kLanes + lane] = 0;
}

template <typename T>
void scatter(const T* from, int64_t set, int lanes, int count, T* raw) {
  for (int lane = 0; lane < lanes; ++lane)
    for (int k = 0; k < count; ++k) raw[(set + lane) * count + k] = from[k * kLanes + lane];
}

// Raw sizes, in place, to their softmax, and to knots.
template <typename T>
void size_knots(int bins, T tail_bound, T* share, T* knots) {
  T most[kLanes], sum[kLanes];
  for (int i = 0; i < kLanes; ++i) most[i] = share[i], sum[i] = 0;
  for (int k = 1; k < bins; ++k) {
    const T* raw = share + k * kLanes;
    for (int i = 0; i < kLanes; ++i) most[i] = raw[i] > most[i] ? raw[i] : most[i];
  }
  for (int k = 0; k < bins; ++k) {
    T* e = share + k * kLanes;
    for (int i = 0; i < kLanes; ++i) {
      e[i] = elementary::exp(e[i] - most[i]);
      sum[i] += e[i];
    }
  }
  const T room = spline::spread<T>(bins);
  for (int i = 0; i < kLanes; ++i) {
    sum[i] = 1 / sum[i];
    most[i] = 0;  // from here on, the sum of sizes
    knots[i] = -tail_bound;
    knots[bins * kLanes + i] = tail_bound;
  }
  for (int k = 0; k < bins; ++k) {
    T *p = share + k * kLanes, *knot = knots + (k + 1) * kLanes;
    const bool inner = k + 1 < bins;
    for (int i = 0; i < kLanes; ++i) {
      p[i] *= sum[i];
      most[i] += spline::bin_size(p[i], room);
    }
    if (inner)
      for (int i = 0; i < kLanes; ++i) knot[i] = 2 * tail_bound * most[i] - tail_bound;
  }
}

template <typename T>
void fill_tables(const SplineJob<T>& job, int64_t element, int lanes, const Tile<T>& tile) {
  gather(job, job.widths, element, lanes, job.bins, tile.shares[0]);
  gather(job, job.heights, element, lanes, job.bins, tile.shares[1]);
  for (int a = 0; a < 2; ++a) size_knots(job.bins, job.tail_bound, tile.shares[a], tile.knots[a]);
  T* slopes = tile.knots[2];
  gather(job, job.derivatives, element, lanes, job.bins - 1, slopes + kLanes);
  for (int i = 0; i < kLanes; ++i) slopes[i] = slopes[job.bins * kLanes + i] = 1;
  for (int k = 1; k < job.bins; ++k) {
    T* d = slopes + k * kLanes;
    T slope[kLanes];  // apart from its source, or the loop is not made vector code
    for (int i = 0; i < kLanes; ++i) slope[i] = spline::knot_slope(d[i]);
    copy(slope, kLanes, d);
  }
}

// The bins of a block of lanes, and their numbers.
template <typename T>
struct Bins {
  T x0[kBlock], x1[kBlock], y0[kBlock], y1[kBlock], d0[kBlock], d1[kBlock], number[kBlock];
  spline::Bin<T> operator[](int i) const { return {x0[i], x1[i], y0[i], y1[i], d0[i], d1[i]}; }
};

template <typename T>
inline void find_bins(const Tile<T>& tile, int lane, bool inverse, const T* p, Bins<T>& out) {
  for (int i = 0; i < kBlock; i += Lanes<T>::count) {
    const T *x = tile.knots[0] + lane + i, *y = tile.knots[1] + lane + i,
            *d = tile.knots[2] + lane + i, *axis = inverse ? y : x;
    const Vector<T> at = load<T>(p + i);
    Vector<T> x0 = load<T>(x), x1 = load<T>(x + kLanes), y0 = load<T>(y), y1 = load<T>(y + kLanes),
              d0 = load<T>(d), d1 = load<T>(d + kLanes), number = {};
    for (int k = 1; k < tile.bins; ++k) {
      const int64_t here = k * kLanes, next = here + kLanes;
      const auto past = at >= load<T>(axis + here);
      x0 = past ? load<T>(x + here) : x0;
      x1 = past ? load<T>(x + next) : x1;
      y0 = past ? load<T>(y + here) : y0;
      y1 = past ? load<T>(y + next) : y1;
      d0 = past ? load<T>(d + here) : d0;
      d1 = past ? load<T>(d + next) : d1;
      number += past ? Vector<T>{} + 1 : Vector<T>{};
    }
    store<T>(out.x0 + i, x0);
    store<T>(out.x1 + i, x1);
    store<T>(out.y0 + i, y0);
    store<T>(out.y1 + i, y1);
    store<T>(out.d0 + i, d0);
    store<T>(out.d1 + i, d1);
    store<T>(out.number + i, number);
  }
}

// A row's lanes of the tile, with zeros after them.
template <typename T>
inline int lanes_of_row(const SplineJob<T>& job, int64_t row) {
  const int64_t left = job.total - (job.first + row * job.stride);
  return left < job.lanes ? static_cast<int>(left < 0 ? 0 : left) : job.lanes;
}

template <typename T>
inline void take(const T* from, int count, T* to) {
  copy(from, count, to);
  for (int i = count; i < kLanes; ++i) to[i] = 0;
}

// Sums of the samples' lanes, always in the same order.
template <typename T>
inline void sum_samples(T* logs, int lanes, int segment, T* sums) {
  if (lanes > segment) {
    for (int i = 0; i < lanes; i += segment) {
      T sum = 0;
      for (int j = i; j < i + segment; ++j) sum += logs[j];
      *sums++ = sum;
    }
    return;
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) logs[i] += logs[i + half];
  *sums = logs[0];
}

template <bool inverse, typename T>
void forward_row(const SplineJob<T>& job, const Tile<T>& tile, int64_t row, int lanes) {
  const int64_t at = job.first + row * job.stride;
  const T bound = job.tail_bound;
  alignas(64) T x[kLanes], logs[kLanes];
  take(job.x + at, lanes, x);
  for (int i = 0; i < kLanes; ++i) logs[i] = 0;
  for (int lane = 0; lane < lanes; lane += kBlock) {
    alignas(64) T p[kBlock], slopes[kBlock];
    alignas(64) Bins<T> bins;
    T* v = x + lane;
    for (int i = 0; i < kBlock; ++i) p[i] = (v[i] >= -bound) & (v[i] <= bound) ? v[i] : T(0);
    find_bins(tile, lane, inverse, p, bins);
    for (int i = 0; i < kBlock; ++i) {
      const spline::Bin<T> bin = bins[i];
      const auto at = inverse ? spline::place_of_y(bin, p[i]) : spline::place_of_x(bin, p[i]);
      const T value = inverse ? spline::x_at(bin, at) : spline::y_at(bin, at);
      const bool inside = (v[i] >= -bound) & (v[i] <= bound);
      slopes[i] = inside & (lane + i < lanes) ? spline::slope_at(bin, at) : T(1);
      v[i] = inside ? value : v[i];
    }
    // By itself and without conditions, or the loop is not made vector code; log 1 is 0 exactly.
    T* const to = logs + lane;
    for (int i = 0; i < kBlock; ++i) to[i] = elementary::log(slopes[i]);
  }
  if (inverse)
    for (int i = 0; i < kLanes; ++i) logs[i] = -logs[i];
  copy(x, lanes, job.y + at);
  sum_samples(logs, lanes, job.segment, job.log_sums + job.sample(row));
}

// Adds a block's gradients to the sums at the inner knots.
template <typename T>
inline void add_at_knots(const Tile<T>& tile, int lane, const T* number, const Bins<T>& grads) {
  for (int i = 0; i < kBlock; i += Lanes<T>::count) {
    const Vector<T> own = load<T>(number + i), none = {};
    const T *low[3] = {grads.x0 + i, grads.y0 + i, grads.d0 + i},
            *high[3] = {grads.x1 + i, grads.y1 + i, grads.d1 + i};
    for (int a = 0; a < 3; ++a) {
      const Vector<T> at_low = load<T>(low[a]), at_high = load<T>(high[a]);
      T* sums = tile.gradients[a] + lane + i;
      for (int k = 1; k < tile.bins; ++k) {
        T* sum = sums + k * kLanes;
        const T here = static_cast<T>(k);
        store<T>(
            sum, load<T>(sum) + (own == here ? at_low : none) + (own == here - 1 ? at_high : none));
      }
    }
  }
}

template <bool inverse, typename T>
void backward_row(const SplineJob<T>& job, const Tile<T>& tile, int64_t row, int lanes) {
  const int64_t at = job.first + row * job.stride;
  const T bound = job.tail_bound;
  alignas(64) T x[kLanes], grad[kLanes], grad_log[kLanes];
  take(job.x + at, lanes, x);
  if (job.grad_y != nullptr)
    take(job.grad_y + at, lanes, grad);
  else
    for (int i = 0; i < kLanes; ++i) grad[i] = 0;
  if (job.grad_log == nullptr || lanes <= job.segment) {
    const T g = job.grad_log == nullptr ? T(0) : job.grad_log[job.sample(row)];
    for (int i = 0; i < kLanes; ++i) grad_log[i] = g;
  } else {
    for (int i = 0; i < kLanes; ++i)
      grad_log[i] = i < lanes ? job.grad_log[job.sample(row) + i / job.segment] : T(0);
  }
  for (int lane = 0; lane < lanes; lane += kBlock) {
    alignas(64) T p[kBlock];
    alignas(64) Bins<T> bins, grads;
    T *v = x + lane, *g = grad + lane, *g_log = grad_log + lane;
    for (int i = 0; i < kBlock; ++i) p[i] = (v[i] >= -bound) & (v[i] <= bound) ? v[i] : T(0);
    find_bins(tile, lane, inverse, p, bins);
    for (int i = 0; i < kBlock; ++i) {
      const spline::Bin<T> bin = bins[i];
      const auto place = inverse ? spline::place_of_y(bin, p[i]) : spline::place_of_x(bin, p[i]);
      const bool inside = (v[i] >= -bound) & (v[i] <= bound) & (lane + i < lanes);
      const auto out = spline::element_backward<inverse>(bin, place, g[i], g_log[i]);
      g[i] = inside ? out.in : g[i];
      grads.x0[i] = inside ? out.bin.x0 : T(0);
      grads.x1[i] = inside ? out.bin.x1 : T(0);
      grads.y0[i] = inside ? out.bin.y0 : T(0);
      grads.y1[i] = inside ? out.bin.y1 : T(0);
      grads.d0[i] = inside ? out.bin.d0 : T(0);
      grads.d1[i] = inside ? out.bin.d1 : T(0);
    }
    if (job.wants_parameters()) add_at_knots(tile, lane, bins.number, grads);
  }
  if (job.grad_x != nullptr) copy(grad, lanes, job.grad_x + at);
}

template <typename T>
void clear(const Tile<T>& tile) {
  const int64_t count = (tile.bins + 1) * kLanes;
  for (int a = 0; a < 3; ++a)
    for (int64_t i = 0; i < count; ++i) tile.gradients[a][i] = 0;
}

// Gradients at the knots, in place, to those of the raw sizes:
// knot_j = 2 T (sum over i < j of size_i) - T, size = smallest + spread softmax(raw).
template <typename T>
void raw_sizes(int bins, T tail_bound, const T* share, T* gradients) {
  T sum[kLanes], mean[kLanes];
  const T scale = 2 * tail_bound * spline::spread<T>(bins);
  for (int i = 0; i < kLanes; ++i) sum[i] = mean[i] = 0;
  for (int k = bins - 1; k >= 0; --k) {
    // In row k, the knot that ends bin k - 1: read before it is overwritten.
    T* g = gradients + k * kLanes;
    const T* p = share + k * kLanes;
    for (int i = 0; i < kLanes; ++i) {
      const T at_size = scale * sum[i];
      sum[i] += g[i];
      mean[i] += p[i] * at_size;
      g[i] = at_size;
    }
  }
  for (int k = 0; k < bins; ++k) {
    T* g = gradients + k * kLanes;
    const T* p = share + k * kLanes;
    for (int i = 0; i < kLanes; ++i) g[i] = p[i] * (g[i] - mean[i]);
  }
}

// From the tile's sums at the knots to gradients of the raw parameters, sets `set` and on.
template <typename T>
void write_gradients(const SplineJob<T>& job, const Tile<T>& tile, int64_t set, int lanes) {
  T* const sizes[2] = {job.grad_widths, job.grad_heights};
  for (int a = 0; a < 2; ++a)
    if (sizes[a] != nullptr) {
      raw_sizes(job.bins, job.tail_bound, tile.shares[a], tile.gradients[a]);
      scatter(tile.gradients[a], set, lanes, job.bins, sizes[a]);
    }
  if (job.grad_derivatives == nullptr) return;
  T* raw = tile.knots[2];  // their slopes are not needed any more
  gather(job, job.derivatives, set, lanes, job.bins - 1, raw);
  for (int k = 0; k + 1 < job.bins; ++k) {
    T *g = tile.gradients[2] + (k + 1) * kLanes, *r = raw + k * kLanes;
    for (int i = 0; i < kLanes; ++i) g[i] *= spline::knot_slope_derivative(r[i]);
  }
  scatter(tile.gradients[2] + kLanes, set, lanes, job.bins - 1, job.grad_derivatives);
}

template <bool inverse, typename T>
void forward_rows(const SplineJob<T>& job, const Tile<T>& tile) {
  if (job.shared) fill_tables(job, job.first, job.lanes, tile);
  for (int64_t row = job.begin; row < job.end; ++row) {
    const int lanes = lanes_of_row(job, row);
    if (!job.shared) fill_tables(job, job.first + row * job.stride, lanes, tile);
    forward_row<inverse>(job, tile, row, lanes);
  }
}

template <bool inverse, typename T>
void backward_rows(const SplineJob<T>& job, const Tile<T>& tile) {
  if (job.shared) {
    fill_tables(job, job.first, job.lanes, tile);
    clear(tile);
  }
  for (int64_t row = job.begin; row < job.end; ++row) {
    const int lanes = lanes_of_row(job, row);
    const int64_t element = job.first + row * job.stride;
    if (!job.shared) {
      fill_tables(job, element, lanes, tile);
      clear(tile);
    }
    backward_row<inverse>(job, tile, row, lanes);
    if (!job.shared) write_gradients(job, tile, element, lanes);
  }
  if (job.table_gradients == nullptr) return;
  const int64_t count = static_cast<int64_t>(job.bins - 1) * kLanes;
  for (int a = 0; a < 3; ++a)
    for (int64_t i = 0; i < count; ++i)
      job.table_gradients[a * count + i] = tile.gradients[a][kLanes + i];
}

template <typename T>
void forward(const SplineJob<T>& job, T* scratch) {
  const Tile<T> tile(job.bins, scratch);
  job.inverse ? forward_rows<true>(job, tile) : forward_rows<false>(job, tile);
}

template <typename T>
void backward(const SplineJob<T>& job, T* scratch) {
  const Tile<T> tile(job.bins, scratch);
  job.inverse ? backward_rows<true>(job, tile) : backward_rows<false>(job, tile);
}

template <typename T>
void finish(const SplineJob<T>& job, T* scratch) {
  const Tile<T> tile(job.bins, scratch);
  fill_tables(job, job.first, job.lanes, tile);
  clear(tile);
  const int64_t count = static_cast<int64_t>(job.bins - 1) * kLanes;
  for (int a = 0; a < 3; ++a)
    for (int64_t i = 0; i < count; ++i)
      tile.gradients[a][kLanes + i] = job.table_gradients[a * count + i];
  // The same parameters again in later lanes, where a row holds several samples.
  const int own = job.lanes < job.segment ? job.lanes : job.segment;
  for (int a = 0; a < 3; ++a)
    for (int k = 1; k < job.bins; ++k) {
      T* sums = tile.gradients[a] + k * kLanes;
      for (int lane = own; lane < job.lanes; ++lane) sums[lane % own] += sums[lane];
    }
  write_gradients(job, tile, job.first, own);
}

template <typename T>
constexpr SplinePath<T> path = {forward<T>, backward<T>, finish<T>};

const SplinePath<float>& path_float() { return path<float>; }
const SplinePath<double>& path_double() { return path<double>; }

}  // namespace rq_spline
}  // namespace SNF_ISA
}  // namespace snf

// The element-wise driver, compiled once for each instruction set; between begin_*.inl and
// end_isa.inl.
//
// Elements go by chunks through a buffer of the terms to be summed: both loops are then plain ones
// that the compiler makes vector code of, and the order of every sum depends on the shape alone.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-pre")  // it splits paths in `solve`, which then is not vectorized
#endif

namespace snf {
namespace SNF_ISA {

constexpr int64_t kChunk = 256;

template <typename T>
inline T sum_of(const T* terms, int64_t count) {
  T lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int k = 0; k < 16; ++k) lanes[k] += terms[i + k];
  for (int k = 0; i < count; ++i, ++k) lanes[k] += terms[i];
  for (int half = 8; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return lanes[0];
}

// x[i] = the root for z[i]. The chunk goes on until none of its elements moves; those that are done
// stay, so that a result does not depend on its neighbours.
template <typename Op, typename T>
inline int64_t solve(const Op& op, const T* __restrict__ z, T* __restrict__ x, int64_t count) {
  T low[kChunk], high[kChunk];
  int32_t moving[kChunk];
  for (int64_t i = 0; i < count; ++i) {
    const Search<T> s = op.start(z[i]);
    low[i] = s.low;
    high[i] = s.high;
    x[i] = s.x;
    moving[i] = 1;
  }
  for (int64_t iteration = 1; iteration < Op::kMost; ++iteration) {
    int32_t any = 0;
    for (int64_t i = 0; i < count; ++i) {
      T least = low[i], most = high[i], at = x[i];
      const int32_t moves = op.advance(z[i], least, most, at) ? moving[i] : 0;
      low[i] = least;
      high[i] = most;
      x[i] = moving[i] ? at : x[i];
      moving[i] = moves;
      any |= moves;
    }
    if (any == 0) return iteration;
  }
  return Op::kMost;
}

// A run: its sum of log_slope, and in `most` the largest number of iterations.
template <typename Op, int kStride, typename T>
inline T run_forward(
    const Op& op, const T* x_, const T* first_, const T* second_, T* y_, int64_t length,
    int64_t& most) {
  T total = 0;
  for (int64_t begin = 0; begin < length; begin += kChunk) {
    const int64_t count = length - begin < kChunk ? length - begin : kChunk;
    T terms[kChunk], roots[kChunk];
    const T* __restrict__ x = x_ + begin;
    const T* __restrict__ first = first_ + begin * kStride;
    const T* __restrict__ second = second_ + begin * kStride;
    T* __restrict__ y = y_ + begin;
    if constexpr (Op::kSolves) {
      const int64_t iterations = solve(op, x, roots, count);
      most = iterations > most ? iterations : most;
      x = roots;
    }
    for (int64_t i = 0; i < count; ++i) {
      Value<T> value;
      if constexpr (Op::kParameters)
        value = op.forward(x[i], first[i * kStride], second[i * kStride]);
      else
        value = op.forward(x[i], T(0), T(0));
      if constexpr (Op::kOutput) y[i] = value.y;
      terms[i] = value.log_slope;
    }
    total += sum_of(terms, count);
  }
  return total;
}

template <typename Op, int kStride, typename T>
void forward_strided(const Op& op, const ElementwiseForward<T, T>& a, int64_t begin, int64_t end) {
  const ElementwiseShape& s = a.shape;
  for (int64_t b = begin; b < end; ++b) {
    T total = 0;
    int64_t most = 0;
    const int64_t offset = b * s.event();
    if constexpr (Op::kParameters)
      for (int64_t i = 0; i < s.kept; ++i) a.y[offset + i] = a.x[offset + i];
    for (int64_t r = 0; r < s.runs; ++r) {
      const int64_t at = offset + s.kept + r * s.length;
      const int64_t parameter = b * s.parameters.sample + r * s.parameters.run;
      total += run_forward<Op, kStride>(
          op, a.x + at, a.first + parameter, a.second + parameter, a.y + at, s.length, most);
    }
    a.log_abs_det[b] = total;
    if constexpr (Op::kSolves) a.iterations[b] = most;
  }
}

// Where a run shares its parameters, their gradients are summed over it.
template <typename Op, int kStride, bool kX, bool kFirst, typename T>
inline void run_backward(
    const Op& op, const T* x_, const T* first_, const T* second_, const T* grad_y_, T g, T* grad_x_,
    T* grad_first_, T* grad_second_, int64_t length) {
  T total_first = 0, total_second = 0;
  for (int64_t begin = 0; begin < length; begin += kChunk) {
    const int64_t count = length - begin < kChunk ? length - begin : kChunk;
    T terms_first[kChunk], terms_second[kChunk];
    const T* __restrict__ x = x_ + begin, * __restrict__ grad_y = grad_y_ + begin;
    const T* __restrict__ first = first_ + begin * kStride;
    const T* __restrict__ second = second_ + begin * kStride;
    T* __restrict__ grad_x = grad_x_ + begin;
    for (int64_t i = 0; i < count; ++i) {
      Gradients<T> to;
      const T dy = Op::kOutput ? grad_y[i] : T(0);
      if constexpr (Op::kParameters)
        to = op.backward(x[i], first[i * kStride], second[i * kStride], dy, g);
      else
        to = op.backward(x[i], T(0), T(0), dy, g);
      if constexpr (kX) grad_x[i] = to.x;
      if constexpr (kFirst) {
        terms_first[i] = to.first;
        terms_second[i] = to.second;
      }
    }
    // Written at once to where they belong, the compiler would have too many pointers to compare,
    // and the loop above would not be vectorized.
    if constexpr (kFirst && kStride > 0)
      for (int64_t i = 0; i < count; ++i) {
        grad_first_[(begin + i) * kStride] = terms_first[i];
        grad_second_[(begin + i) * kStride] = terms_second[i];
      }
    if constexpr (kFirst && kStride == 0) {
      total_first += sum_of(terms_first, count);
      total_second += sum_of(terms_second, count);
    }
  }
  if constexpr (kFirst && kStride == 0) {
    *grad_first_ = total_first;
    *grad_second_ = total_second;
  }
}

template <typename Op, int kStride, bool kX, bool kFirst, typename T>
void backward_strided(
    const Op& op, const ElementwiseBackward<T, T>& a, int64_t begin, int64_t end) {
  const ElementwiseShape& s = a.shape;
  for (int64_t b = begin; b < end; ++b) {
    const T g = a.grad_log_abs_det == nullptr ? T(0) : a.grad_log_abs_det[b];
    const int64_t offset = b * s.event();
    if constexpr (Op::kParameters && kX)
      for (int64_t i = 0; i < s.kept; ++i) a.grad_x[offset + i] = a.grad_y[offset + i];
    for (int64_t r = 0; r < s.runs; ++r) {
      const int64_t at = offset + s.kept + r * s.length;
      const int64_t from = b * s.parameters.sample + r * s.parameters.run;
      const int64_t to = b * s.gradients.sample + r * s.gradients.run;
      run_backward<Op, kStride, kX, kFirst>(
          op, a.x + at, a.first + from, a.second + from, a.grad_y + at, g, a.grad_x + at,
          a.grad_first + to, a.grad_second + to, s.length);
    }
  }
}

template <typename Op, typename T>
void forward(const Op& op, const ElementwiseForward<T, T>& a, int64_t begin, int64_t end) {
  if constexpr (!Op::kParameters) return forward_strided<Op, 0>(op, a, begin, end);
  if (a.shape.parameters.stride == 0) return forward_strided<Op, 0>(op, a, begin, end);
  if (a.shape.parameters.stride == 1) return forward_strided<Op, 1>(op, a, begin, end);
  forward_strided<Op, 2>(op, a, begin, end);
}

template <typename Op, int kStride, typename T>
void backward_wanted(const Op& op, const ElementwiseBackward<T, T>& a, int64_t begin, int64_t end) {
  if (a.grad_first == nullptr)
    backward_strided<Op, kStride, true, false>(op, a, begin, end);
  else if (a.grad_x == nullptr)
    backward_strided<Op, kStride, false, true>(op, a, begin, end);
  else
    backward_strided<Op, kStride, true, true>(op, a, begin, end);
}

template <typename Op, typename T>
void backward(const Op& op, const ElementwiseBackward<T, T>& a, int64_t begin, int64_t end) {
  if constexpr (!Op::kParameters)
    return backward_strided<Op, 0, true, false>(op, a, begin, end);
  else if (a.shape.parameters.stride == 0)
    backward_wanted<Op, 0>(op, a, begin, end);
  else if (a.shape.parameters.stride == 1)
    backward_wanted<Op, 1>(op, a, begin, end);
  else
    backward_wanted<Op, 2>(op, a, begin, end);
}

#define SNF_INSTANTIATE(OP)                                                                      \
  template void forward(const OP&, const ElementwiseForward<float, float>&, int64_t, int64_t);   \
  template void forward(const OP&, const ElementwiseForward<double, double>&, int64_t, int64_t); \
  template void backward(const OP&, const ElementwiseBackward<float, float>&, int64_t, int64_t); \
  template void backward(const OP&, const ElementwiseBackward<double, double>&, int64_t, int64_t);
SNF_ELEMENTWISE(SNF_INSTANTIATE)
#undef SNF_INSTANTIATE

}  // namespace SNF_ISA
}  // namespace snf

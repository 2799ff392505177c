// Vectors and small helpers of the convolution kernels, compiled once for each instruction set.
//
// After begin_*.inl, which sets SNF_ISA (namespace), SNF_VECTOR_BYTES, SNF_ACCUMULATORS (vectors
// kept in registers by the inner loops), and the target. No header may be included from here, so
// that no inline function of another library is compiled for a processor that lacks the set.

namespace snf {
namespace SNF_ISA {

template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(SNF_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(SNF_VECTOR_BYTES), aligned(alignof(T))));
  static constexpr int64_t count = SNF_VECTOR_BYTES / sizeof(T);
};

template <typename T>
inline typename Lanes<T>::Vector load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}

template <typename T>
inline void store(T* p, typename Lanes<T>::Vector v) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = v;
}

template <typename T>
inline T sum_of_lanes(typename Lanes<T>::Vector v) {
  alignas(64) T lanes[Lanes<T>::count];
  *reinterpret_cast<typename Lanes<T>::Vector*>(lanes) = v;
  for (int64_t half = Lanes<T>::count / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// One in the last `count` lanes, zero in those before.
template <typename T>
inline typename Lanes<T>::Vector last_lanes(int64_t count) {
  typename Lanes<T>::Vector v;
  for (int64_t i = 0; i < Lanes<T>::count; ++i) v[i] = T(i >= Lanes<T>::count - count);
  return v;
}

// Splits n into near-equal parts of at most `limit`.
struct Parts {
  int64_t count, small, larger;  // `larger` of them hold small + 1
  Parts(int64_t n, int64_t limit)
      : count((n + limit - 1) / limit), small(n / count), larger(n % count) {}
  int64_t operator[](int64_t i) const { return small + (i < larger ? 1 : 0); }
  int64_t largest() const { return small + (larger > 0 ? 1 : 0); }
};

template <typename T>
T sum_of_squares(const T* values, int64_t count) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t lanes = Lanes<T>::count;
  Vector sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes)
    for (int k = 0; k < 4; ++k) {
      const Vector v = load(values + i + k * lanes);
      sum[k] += v * v;
    }
  T total = sum_of_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < count; ++i) total += values[i] * values[i];
  return total;
}

// Images whose weight gradients are taken together: as many as wanted for long inner loops, while
// all their planes (`volume` numbers an image) stay in the second-level cache.
template <typename T>
inline int64_t images_together(int64_t wanted, int64_t volume, int64_t most) {
  const int64_t fit = (512 << 10) / (volume * static_cast<int64_t>(sizeof(T)));
  int64_t n = wanted < fit ? wanted : fit;
  n = n < most ? n : most;
  return n < 1 ? 1 : n;
}

inline int64_t wrap(int64_t i, int64_t extent) {
  i %= extent;
  return i < 0 ? i + extent : i;
}

}  // namespace SNF_ISA
}  // namespace snf

// Which family of kernels suits a shape, compiled once for each instruction set.

namespace snf {
namespace SNF_ISA {

// The share of lanes that do useful work decides, times the share of the peak that each family
// reaches with full lanes (about 0.95 and 0.8, measured). Channel vectors also pay for transposing
// every image, which a 1x1 kernel does not earn back.
template <typename T>
const Conv2dPath<T>& choose(const Conv2dShape& shape, const Plane& plane) {
  const int64_t vectors = channels::vector_count<T>(shape);
  const double along_channels =
      0.95 * static_cast<double>(shape.per_group()) / static_cast<double>(vectors * Lanes<T>::count);
  const double along_pixels =
      0.8 * static_cast<double>(shape.pixels()) / static_cast<double>(plane.length);
  const bool by_channels = vectors <= channels::kMaxVectors &&
                           shape.weight.taps() * shape.inverse.taps() > 1 &&
                           along_channels > along_pixels;
  return by_channels ? channels::path<T> : pixels::path<T>;
}

const Conv2dPath<float>& choose_float(const Conv2dShape& shape, const Plane& plane) {
  return choose<float>(shape, plane);
}

const Conv2dPath<double>& choose_double(const Conv2dShape& shape, const Plane& plane) {
  return choose<double>(shape, plane);
}

}  // namespace SNF_ISA
}  // namespace snf

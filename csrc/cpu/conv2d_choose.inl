// Which family of kernels suits a shape, compiled once for each instruction set.

namespace snf {
namespace SNF_ISA {

// The share of lanes that do useful work decides, times the share of the peak that each family
// reaches with full lanes (measured). Channel vectors pay for transposing every image, which weighs
// most where a kernel has one tap.
template <typename T>
const Conv2dPath<T>& choose(const Conv2dShape& shape, const Plane& plane) {
  if (channels::vector_count<T>(shape) > channels::kMaxVectors) return pixels::path<T>;
  const double along_channels = (shape.one_tap() ? 0.5 : 0.95) *
                                static_cast<double>(shape.per_group()) /
                                static_cast<double>(channels::padded_channels<T>(shape));
  const int64_t computed = (plane.length + Plane::kAlign - 1) / Plane::kAlign * Plane::kAlign;
  const double along_pixels =
      0.8 * static_cast<double>(shape.pixels()) / static_cast<double>(computed);
  return along_channels > along_pixels ? channels::path<T> : pixels::path<T>;
}

const Conv2dPath<float>& choose_float(const Conv2dShape& shape, const Plane& plane) {
  return choose<float>(shape, plane);
}

const Conv2dPath<double>& choose_double(const Conv2dShape& shape, const Plane& plane) {
  return choose<double>(shape, plane);
}

}  // namespace SNF_ISA
}  // namespace snf

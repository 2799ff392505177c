// Which family of convolution kernels runs on this processor.
#include "conv2d_kernel.h"
#include "cpu_capability.h"

namespace snf {

#define SNF_DECLARE(isa)                                                                 \
  namespace isa {                                                                        \
  const Conv2dPath<float>& choose_float(const Conv2dShape& shape, const Plane& plane);   \
  const Conv2dPath<double>& choose_double(const Conv2dShape& shape, const Plane& plane); \
  }

SNF_EACH_ISA(SNF_DECLARE)

template <>
const Conv2dPath<float>& conv2d_path<float>(const Conv2dShape& shape, const Plane& plane) {
  return SNF_ON_THIS_CPU(choose_float(shape, plane));
}

template <>
const Conv2dPath<double>& conv2d_path<double>(const Conv2dShape& shape, const Plane& plane) {
  return SNF_ON_THIS_CPU(choose_double(shape, plane));
}

}  // namespace snf

// Which family of convolution kernels runs on this processor.
#include "conv2d_kernel.h"
#include "cpu_capability.h"

namespace snf {

#define SNF_DECLARE(isa)                                                                 \
  namespace isa {                                                                        \
  const Conv2dPath<float>& choose_float(const Conv2dShape& shape, const Plane& plane);   \
  const Conv2dPath<double>& choose_double(const Conv2dShape& shape, const Plane& plane); \
  }

SNF_DECLARE(baseline)
#if defined(__x86_64__)
SNF_DECLARE(avx2)
SNF_DECLARE(avx512)
#endif

template <>
const Conv2dPath<float>& conv2d_path<float>(const Conv2dShape& shape, const Plane& plane) {
#if defined(__x86_64__)
  const CpuCapability level = cpu_capability_level();
  if (level == CpuCapability::avx512) return avx512::choose_float(shape, plane);
  if (level == CpuCapability::avx2) return avx2::choose_float(shape, plane);
#endif
  return baseline::choose_float(shape, plane);
}

template <>
const Conv2dPath<double>& conv2d_path<double>(const Conv2dShape& shape, const Plane& plane) {
#if defined(__x86_64__)
  const CpuCapability level = cpu_capability_level();
  if (level == CpuCapability::avx512) return avx512::choose_double(shape, plane);
  if (level == CpuCapability::avx2) return avx2::choose_double(shape, plane);
#endif
  return baseline::choose_double(shape, plane);
}

}  // namespace snf

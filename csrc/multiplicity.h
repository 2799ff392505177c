// How often two kernel taps stand in transposed places of a convolution's matrix.
// Shared by every device; knows no torch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SNF_HOST_DEVICE __host__ __device__
#else
#define SNF_HOST_DEVICE
#endif

namespace snf {

// Along one axis of `extent` pixels. A tap at `own` pixels from the centre stands in the matrix
// extent - |own| times (extent times if circular), and meets the tap of the other kernel at
// `other` from its centre only where the two offsets cancel (modulo extent if circular).
SNF_HOST_DEVICE inline int64_t multiplicity(
    int64_t own, int64_t other, int64_t extent, bool circular) {
  if (circular) return (own + other) % extent == 0 ? extent : 0;
  if (own + other != 0) return 0;
  const int64_t distance = own < 0 ? -own : own;
  return distance < extent ? extent - distance : 0;
}

}  // namespace snf

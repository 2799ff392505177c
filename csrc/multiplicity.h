// How often two kernel taps stand in transposed places of a convolution's matrix.
// Shared by every device; knows no torch.
#pragma once

#include "host_device.h"

namespace snf {

// Along one axis of `extent` pixels. A tap at `own` pixels from the centre stands in the matrix
// extent - |own| times (extent times if circular), and meets the tap of the other kernel at
// `other` from its centre only where the two offsets cancel (modulo extent if circular).
template <typename Int>
SNF_HOST_DEVICE inline Int multiplicity(Int own, Int other, Int extent, bool circular) {
  if (circular) return (own + other) % extent == 0 ? extent : 0;
  if (own + other != 0) return 0;
  const Int distance = own < 0 ? -own : own;
  return distance < extent ? extent - distance : 0;
}

}  // namespace snf

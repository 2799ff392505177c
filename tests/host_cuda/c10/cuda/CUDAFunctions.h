// There is one device: see cuda_runtime_api.h.
#pragma once

namespace c10::cuda {
inline int device_count() { return 1; }
}  // namespace c10::cuda

// The one device and its one stream: see cuda_runtime_api.h.
#pragma once

#include "../../cuda_runtime.h"

namespace at::cuda {
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
inline cudaDeviceProp* getCurrentDeviceProperties() { return &host_cuda::device(); }
}  // namespace at::cuda

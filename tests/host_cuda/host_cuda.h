// How the stand-in runs a kernel: see cuda_runtime_api.h.
#pragma once

#include <cstdint>
#include <functional>

#include "cuda_runtime_api.h"

namespace host_cuda {

// The device that is stood in for. Tests may change it between launches.
cudaDeviceProp& device();

// How many kernels have been launched.
int64_t& launches();

cudaError_t allow_shared(const void* kernel, int bytes);
cudaError_t launch(
    const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);

// All threads of the block, or the warp, wait for each other.
void block_barrier(const char* file, int line);
void warp_barrier(uint32_t mask);

uint64_t& warp_slot(int lane);  // ends the program where the warp has no such lane
int lane();

template <typename T, typename From>
T exchange(uint32_t mask, T value, const From& from) {
  warp_slot(lane()) = 0;
  __builtin_memcpy(&warp_slot(lane()), &value, sizeof(T));
  warp_barrier(mask);
  T other;
  __builtin_memcpy(&other, &warp_slot(from(lane())), sizeof(T));
  warp_barrier(mask);
  return other;
}

}  // namespace host_cuda

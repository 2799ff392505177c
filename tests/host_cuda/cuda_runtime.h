// The language and the launch: see cuda_runtime_api.h.
#pragma once

#include <atomic>
#include <bit>
#include <type_traits>

#include "cuda_runtime_api.h"
#include "host_cuda.h"

#define __host__
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads() host_cuda::block_barrier(__FILE__, __LINE__)

// One launch, one block and one thread at a time.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t{a} * b >> 32; }

template <typename T>
T atomicAdd(T* to, T value) {
  return std::atomic_ref<T>(*to).fetch_add(value, std::memory_order_relaxed);
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  return host_cuda::exchange(mask, value, [from](int) { return from; });
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits) {
  return host_cuda::exchange(mask, value, [bits](int lane) { return lane ^ bits; });
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int by) {
  return host_cuda::exchange(mask, value, [by](int l) { return l + by < 32 ? l + by : l; });
}

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidConfiguration ? "invalid configuration argument"
         : status == cudaSuccess                 ? "no error"
                                                 : "invalid argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return host_cuda::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a kernel takes 4096 bytes of arguments");
  return host_cuda::launch(*config, reinterpret_cast<const void*>(kernel), [&] {
    kernel(static_cast<Parameters>(arguments)...);
  });
}

// What every kernel file shares: numbers in memory, small device functions, and the launch.
//
// Nothing under csrc/cuda knows torch but the bindings (*.cpp). Kernels are started through
// `launch`, which is plain CUDA runtime: so the same headers compile with nvcc for a device, and
// with a C++ compiler against the stand-in of the runtime in tests/host_cuda.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "wide.h"

namespace snf {

constexpr int kWarp = 32;

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void store(float* to, float value) { *to = value; }
__device__ inline void store(double* to, double value) { *to = value; }
__device__ inline void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ inline void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

// The block's shared memory, all of it: its size is given at launch.
__device__ inline float* shared_memory() {
  extern __shared__ float4 snf_shared[];
  return reinterpret_cast<float*>(snf_shared);
}

// Sum over the block's threads, the same bits every time; all threads get it. `scratch` holds one
// number a warp and may be used again after the next barrier.
template <typename T>
__device__ T block_sum(T value, T* scratch) {
  const int thread = threadIdx.x, warps = (blockDim.x + kWarp - 1) / kWarp;
  for (int step = kWarp / 2; step > 0; step /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, step);
  if (thread % kWarp == 0) scratch[thread / kWarp] = value;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < warps; ++warp) sum += scratch[warp];
  return sum;
}

// Division of 0 <= n < 2^21, as for places in shared memory, by a number known in the kernel. Half
// a step is added, so that rounding (2^-23 of the quotient) cannot reach the next whole number.
class SmallDivider {
 public:
  __device__ explicit SmallDivider(int divisor) : divisor_(divisor), reciprocal_(1.0f / divisor) {}
  __device__ int operator()(int n) const {
    return static_cast<int>((static_cast<float>(n) + 0.5f) * reciprocal_);
  }
  // n = quotient * divisor + the returned remainder
  __device__ int split(int n, int& quotient) const {
    quotient = (*this)(n);
    return n - quotient * divisor_;
  }

 private:
  int divisor_;
  float reciprocal_;
};

// Division of 0 <= n < 2^31 by a number that is known at launch: a multiplication and a shift.
class Divider {
 public:
  explicit Divider(int divisor) {
    while ((int64_t{1} << shift_) < divisor) ++shift_;
    const uint64_t excess = (uint64_t{1} << shift_) - divisor;
    magic_ = static_cast<uint32_t>((excess << 32) / divisor + 1);
  }
  __device__ int operator()(int n) const {
    return static_cast<int>((__umulhi(static_cast<uint32_t>(n), magic_) + n) >> shift_);
  }

 private:
  int shift_ = 0;
  uint32_t magic_ = 1;
};

// Starts a kernel of whole warps on the stream; throws where the device refuses it.
template <typename... Parameters>
void launch(
    const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
    std::size_t shared_bytes, cudaStream_t stream, Parameters... arguments) {
  if (blocks == 0) return;
  const auto check = [&](cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // so that the next call does not report it again
    throw std::runtime_error(
        "snf_ext: the kernel " + std::string(name) + " could not be launched with " +
        std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads and " +
        std::to_string(shared_bytes) + " bytes of shared memory: " + cudaGetErrorString(status));
  };
  if (blocks > INT32_MAX) check(cudaErrorInvalidConfiguration);
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking)
    check(cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace snf

// A stand-in for the CUDA runtime that runs kernels on the host, one thread a CUDA thread, so that
// kernels can be tested without a GPU. It shadows NVIDIA's headers of the same names: put this
// folder first on the include path and compile the kernels' sources as C++20.
//
// It checks what a device would refuse or get wrong without a word: limits of blocks, grids and
// shared memory, threads that part at a barrier, shuffles with lanes that are not there, writes
// past the shared memory that was asked for. Blocks run one after the other; shared memory starts
// as not-a-number. Sanitizers see threads and plain memory: ThreadSanitizer finds a missing
// barrier, AddressSanitizer an index out of bounds.
//
// It does not model: tensor cores, asynchronous copies, memory order weaker than a barrier's,
// blocks that talk to each other, speed.
#pragma once

#include <cstddef>
#include <cstdint>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct HostCudaStream*;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

struct cudaDeviceProp {
  char name[32];
  int major, minor;
  std::size_t sharedMemPerBlockOptin;
  int multiProcessorCount, maxThreadsPerBlock;
};

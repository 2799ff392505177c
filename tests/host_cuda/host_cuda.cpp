#include "host_cuda.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "cuda_runtime.h"
#include "engine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace snf {
constexpr std::size_t kShared = 256 * 1024;
alignas(16) float4 snf_shared[kShared / sizeof(float4)];  // see shared_memory() in device.cuh
}  // namespace snf

namespace host_cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kGuard = 4096;  // bytes past a block's shared memory that must stay as they are

struct Warp {
  explicit Warp(int lanes) : lanes(lanes), barrier(lanes) {}
  int lanes;
  Barrier barrier;
  uint64_t slots[kWarp] = {};
};

struct Block {
  explicit Block(int threads) : barrier(threads) {
    for (int first = 0; first < threads; first += kWarp)
      warps.push_back(std::make_unique<Warp>(std::min(kWarp, threads - first)));
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

Block* block = nullptr;
std::map<const void*, std::size_t> allowed;

int thread_of_block() {
  return static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
}

Warp& warp() { return *block->warps[thread_of_block() / kWarp]; }

unsigned char* shared() { return reinterpret_cast<unsigned char*>(snf::snf_shared); }

void prepare_shared(std::size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(shared(), snf::kShared);
  std::memset(shared(), 0xff, bytes);  // not-a-number
  std::memset(shared() + bytes, 0xa5, kGuard);
  ASAN_POISON_MEMORY_REGION(shared() + bytes, snf::kShared - bytes);
}

void check_shared(std::size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(shared(), snf::kShared);
  for (int i = 0; i < kGuard; ++i)
    if (shared()[bytes + i] != 0xa5) fail("a kernel wrote past its shared memory");
}

}  // namespace

cudaDeviceProp& device() {
  static cudaDeviceProp properties = {"host", 9, 0, 227 * 1024, 4, 1024};
  return properties;
}

int64_t& launches() {
  static int64_t count = 0;
  return count;
}

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (static_cast<std::size_t>(bytes) > device().sharedMemPerBlockOptin)
    return cudaErrorInvalidValue;
  allowed[kernel] = bytes;
  return cudaSuccess;
}

// A fiber goes on where its thread's index may have become another's.
HOST_CUDA_UNSEEN void set_index(uint3 thread) { threadIdx = thread; }

template <typename Wait>
void keeping_index(const Wait& wait) {
  const uint3 own = threadIdx;
  wait();
  set_index(own);
}

void block_barrier(const char* file, int line) {
  keeping_index([&] { block->barrier.wait(file, line); });
}

void warp_barrier(uint32_t mask) {
  const uint32_t all = warp().lanes == kWarp ? ~0u : (1u << warp().lanes) - 1;
  if (mask != all) fail("shuffle whose mask is not the warp");
  Barrier& barrier = warp().barrier;
  keeping_index([&] { barrier.wait("shuffle", 0); });
}

int lane() { return thread_of_block() % kWarp; }

uint64_t& warp_slot(int lane) {
  if (lane < 0 || lane >= warp().lanes) fail("shuffle from a lane that is not there");
  return warp().slots[lane];
}

cudaError_t launch(
    const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body) {
  const dim3 grid = config.gridDim, size = config.blockDim;
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > static_cast<uint64_t>(device().maxThreadsPerBlock) || size.z > 64 ||
      grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 ||
      grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  const std::size_t bytes = config.dynamicSmemBytes;
  if (bytes > device().sharedMemPerBlockOptin || (bytes > 48 * 1024 && allowed[kernel] < bytes))
    return cudaErrorInvalidValue;

  ++launches();
  blockDim = size;
  gridDim = grid;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t b = 0; b < blocks; ++b) {
    Block current(static_cast<int>(threads));
    block = &current;
    prepare_shared(bytes);
    blockIdx = {
        static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
        static_cast<unsigned>(b / grid.x / grid.y)};
    run_together(static_cast<int>(threads), b % 2 == 1, [&](int t) {
      const unsigned thread = static_cast<unsigned>(t);
      set_index({thread % size.x, thread / size.x % size.y, thread / size.x / size.y});
      body();
      current.barrier.leave();
    });
    check_shared(bytes);
  }
  block = nullptr;
  return cudaSuccess;
}

}  // namespace host_cuda

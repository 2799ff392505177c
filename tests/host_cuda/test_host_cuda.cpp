// The stand-in itself: right kernels run as on a device, what a device refuses is refused, and a
// wrong kernel ends the program. Argument: the name of a wrong kernel, to run it; without one, all
// checks, for which the program calls itself.
#include <sys/wait.h>

#include <functional>
#include <map>

#include "device.cuh"
#include "testing.h"

namespace {

using snf::shared_memory;
using testing::expect;
using testing::poisoned;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddressSanitizer = true, kThreadSanitizer = false;
#elif defined(__SANITIZE_THREAD__)
constexpr bool kAddressSanitizer = false, kThreadSanitizer = true;
#else
constexpr bool kAddressSanitizer = false, kThreadSanitizer = false;
#endif

struct Shape {
  dim3 grid, block;
  std::size_t shared = 0;
};

template <typename... Parameters>
cudaError_t start(const Shape& shape, void (*kernel)(Parameters...), Parameters... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// ---- Right kernels -----------------------------------------------------------------------------

struct Index {
  uint3 thread, block;
  int times;
};

__global__ void write_indices(Index* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  Index& own = out[block * blockDim.x * blockDim.y * blockDim.z + thread];
  __syncthreads();  // other threads have run since: the index must still be this one's
  own = {threadIdx, blockIdx, own.times + 1};
}

void indices() {
  const Shape shape = {dim3(2, 3, 4), dim3(5, 2, 3)};
  std::vector<Index> out(2 * 3 * 4 * 5 * 2 * 3);
  expect(start(shape, write_indices, out.data()) == cudaSuccess, "a launch in three dimensions");
  std::size_t n = 0;
  for (unsigned bz = 0; bz < 4; ++bz)
    for (unsigned by = 0; by < 3; ++by)
      for (unsigned bx = 0; bx < 2; ++bx)
        for (unsigned z = 0; z < 3; ++z)
          for (unsigned y = 0; y < 2; ++y)
            for (unsigned x = 0; x < 5; ++x, ++n) {
              const Index& i = out[n];
              expect(
                  i.times == 1 && i.thread.x == x && i.thread.y == y && i.thread.z == z &&
                      i.block.x == bx && i.block.y == by && i.block.z == bz,
                  "index " + std::to_string(n));
            }
}

__global__ void count_up(int* count, double* sum) {
  atomicAdd(count, 1);
  atomicAdd(sum, 0.5);
}

void atomics() {
  int count = 0;
  double sum = 0;
  expect(start({dim3(7), dim3(33)}, count_up, &count, &sum) == cudaSuccess, "a launch");
  expect(count == 7 * 33 && sum == 7 * 33 * 0.5, "atomicAdd");
}

__global__ void shuffle(int* from_three, double* exclusive_or, int* down) {
  const int n = threadIdx.x;
  const uint32_t mask = n < 32 ? 0xffffffffu : 0xffu;  // the second warp has eight lanes
  from_three[n] = __shfl_sync(mask, 10 * n, 3);
  exclusive_or[n] = __shfl_xor_sync(mask, 0.5 * n, 5);
  if (n < 32) down[n] = __shfl_down_sync(mask, n, 3);
}

void shuffles() {
  std::vector<int> from_three(40), down(32);
  std::vector<double> exclusive_or(40);
  expect(
      start({dim3(1), dim3(40)}, shuffle, from_three.data(), exclusive_or.data(), down.data()) ==
          cudaSuccess,
      "a launch");
  for (int n = 0; n < 40; ++n) {
    expect(from_three[n] == 10 * (n / 32 * 32 + 3), "__shfl_sync");
    expect(exclusive_or[n] == 0.5 * (n / 32 * 32 + (n % 32 ^ 5)), "__shfl_xor_sync");
  }
  for (int n = 0; n < 32; ++n) expect(down[n] == (n + 3 < 32 ? n + 3 : n), "__shfl_down_sync");
}

__global__ void sum_block(float* out) {
  const float sum = snf::block_sum(1.0f + threadIdx.x, shared_memory());
  if (threadIdx.x == blockDim.x - 1) out[blockIdx.x] = sum;
}

void sums() {
  auto out = poisoned<float>(3);
  expect(
      start({dim3(3), dim3(96), 3 * sizeof(float)}, sum_block, out.data()) == cudaSuccess,
      "a launch");
  expect(out == std::vector<float>(3, 96 * 97 / 2), "block_sum");
}

// ---- What helps to find wrong ones -------------------------------------------------------------

__global__ void read_unwritten(float* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared_memory()[threadIdx.x];
  shared_memory()[threadIdx.x] = 0;
}

void shared_memory_starts_as_not_a_number() {
  std::vector<float> out(2 * 32);
  const Shape shape = {dim3(2), dim3(32), 32 * sizeof(float)};
  expect(start(shape, read_unwritten, out.data()) == cudaSuccess, "a launch");
  for (const float value : out) expect(std::isnan(value), "shared memory is left as it was");
}

__global__ void read_neighbour(int by, float* out) {
  float* const shared = shared_memory();
  const int own = threadIdx.x, other = (own + by + 64) % 64;
  shared[own] = 1;
  out[blockIdx.x * 64 + own] = shared[other];  // no barrier before
}

// Whichever neighbour a thread looks at without a barrier, one block has not written it yet.
void two_orders() {
  if (kThreadSanitizer) return;  // which would report the race
  for (const int by : {-1, 1}) {
    auto out = poisoned<float>(2 * 64);
    const Shape shape = {dim3(2), dim3(64), 64 * sizeof(float)};
    expect(start(shape, read_neighbour, by, out.data()) == cudaSuccess, "a launch");
    int wrong[2] = {};
    for (int n = 0; n < 2 * 64; ++n) wrong[n / 64] += std::isnan(out[n]);
    expect(std::max(wrong[0], wrong[1]) == 63, "a missing barrier shows in one of two orders");
  }
}

// ---- Limits ------------------------------------------------------------------------------------

__global__ void nothing() {}

void limits() {
  host_cuda::device() = {"small", 7, 5, 64 * 1024, 4, 1024};
  const auto status = [](dim3 grid, dim3 block, std::size_t shared = 0) {
    return start({grid, block, shared}, nothing);
  };
  const int64_t before = host_cuda::launches();
  for (const dim3 block : {dim3(1025), dim3(64, 17), dim3(0), dim3(4, 4, 65)})
    expect(status(dim3(1), block) == cudaErrorInvalidConfiguration, "a block that is too large");
  for (const dim3 grid : {dim3(0), dim3(1u << 31), dim3(1, 65536), dim3(1, 1, 65536)})
    expect(status(grid, dim3(1)) == cudaErrorInvalidConfiguration, "a grid that is too large");
  const std::size_t large = 48 * 1024;
  expect(
      status(dim3(1), dim3(1), large + 4) == cudaErrorInvalidValue, "shared memory not asked for");
  const auto ask = [](int bytes) {
    return cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  expect(
      ask(64 * 1024 + 4) == cudaErrorInvalidValue, "more shared memory than there is, asked for");
  expect(host_cuda::launches() == before, "a launch that was refused has run");

  expect(status(dim3(1), dim3(1), large) == cudaSuccess, "shared memory that needs no asking");
  expect(ask(56 * 1024) == cudaSuccess, "asking for shared memory");
  expect(status(dim3(1), dim3(1), 56 * 1024) == cudaSuccess, "shared memory that was asked for");
  expect(status(dim3(1), dim3(1), 56 * 1024 + 4) == cudaErrorInvalidValue, "more than asked for");
  expect(status(dim3(1), dim3(32, 16, 2)) == cudaSuccess, "a block of 1024");
  expect(host_cuda::launches() == before + 3, "the number of launches");
}

// ---- Numbers -----------------------------------------------------------------------------------

void numbers() {
  const auto half = [](float f) { return __half2float(__float2half_rn(f)); };
  const auto brain = [](float f) { return __bfloat162float(__float2bfloat16_rn(f)); };
  const float h = 0x1p-11f, b = 0x1p-8f;  // half of the last place at 1
  expect(half(1 + h) == 1 && half(1 + 3 * h) == 1 + 4 * h, "float16 rounds ties to even");
  expect(half(1 + 1.01f * h) == 1 + 2 * h, "float16 rounds to the nearest");
  expect(std::isinf(half(65520)) && half(65519) == 65504, "float16 overflows");
  expect(brain(1 + b) == 1 && brain(1 + 3 * b) == 1 + 4 * b, "bfloat16 rounds ties to even");
  expect(brain(1 + 1.01f * b) == 1 + 2 * b, "bfloat16 rounds to the nearest");
  expect(
      std::isinf(brain(INFINITY)) && std::isnan(brain(NAN)) && std::isnan(half(NAN)), "specials");
  expect(__umulhi(0xffffffffu, 0xffffffffu) == 0xfffffffeu, "__umulhi");
}

// ---- Wrong kernels -----------------------------------------------------------------------------

__global__ void wait_at_two_places() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void leave_out(unsigned thread) {
  if (threadIdx.x == thread) return;
  __syncthreads();
}

// The warp waits for its first lane, which waits at the barrier or has left.
__global__ void lose_a_lane(bool leaves) {
  if (threadIdx.x > 0)
    __shfl_xor_sync(0xffffffffu, 1, 1);
  else if (!leaves)
    __syncthreads();
}

__global__ void shuffle_from(int lane) { __shfl_sync(0xffu, 1, lane); }
__global__ void shuffle_whole_warp() { __shfl_sync(0xffffffffu, 1, 0); }

__global__ void write_past_shared_memory() { shared_memory()[blockDim.x + threadIdx.x] = 1; }

__global__ void read_past_shared_memory(float* out) { *out = shared_memory()[blockDim.x]; }

// The barrier orders nothing that comes after it.
__global__ void race_after_barrier(float* out) {
  float* const shared = shared_memory();
  shared[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x == blockDim.x - 1)
    shared[0] = 1;
  else
    out[threadIdx.x] = shared[0];
  __syncthreads();
}

// A shuffle orders the threads of one warp only.
__global__ void race_between_warps(float* out) {
  float* const shared = shared_memory();
  if (threadIdx.x == 0) shared[0] = 1;
  __shfl_sync(0xffffffffu, 1, 0);
  if (threadIdx.x == blockDim.x - 1) *out = shared[0];
}

__global__ void race_in_global_memory(float* out) { *out = static_cast<float>(threadIdx.x); }

struct Wrong {
  std::function<void()> run;
  std::string message;
};

std::map<std::string, Wrong> wrong_kernels() {
  static float out[64];
  const Shape warp = {dim3(1), dim3(32)}, part = {dim3(1), dim3(8)}, two = {dim3(1), dim3(64)};
  const Shape shared = {dim3(1), dim3(64), 64 * sizeof(float)};
  std::map<std::string, Wrong> all = {
      {"two barriers",
       {[=] { start(two, wait_at_two_places); }, "threads wait at different places"}},
      {"first leaves", {[=] { start(two, leave_out, 0u); }, "a thread has left the kernel before"}},
      {"last leaves",
       {[=] { start(two, leave_out, 63u); }, "a thread leaves the kernel while others wait"}},
      {"lane waits", {[=] { start(warp, lose_a_lane, false); }, "deadlock"}},
      {"lane leaves", {[=] { start(warp, lose_a_lane, true); }, "deadlock"}},
      {"lane not there", {[=] { start(part, shuffle_from, 8); }, "a lane that is not there"}},
      {"lane below zero", {[=] { start(part, shuffle_from, -1); }, "a lane that is not there"}},
      {"mask", {[=] { start(part, shuffle_whole_warp); }, "mask is not the warp"}},
      {"write past shared memory",
       {[=] { start(shared, write_past_shared_memory); },
        kAddressSanitizer ? "use-after-poison" : "wrote past its shared memory"}}};
  if (kAddressSanitizer)
    all["read past shared memory"] = {
        [=] { start(shared, read_past_shared_memory, out); }, "use-after-poison"};
  if (kThreadSanitizer) {
    all["no barrier"] = {[=] { start(shared, read_neighbour, 1, out); }, "data race"};
    all["after the barrier"] = {[=] { start(shared, race_after_barrier, out); }, "data race"};
    all["between warps"] = {[=] { start(shared, race_between_warps, out); }, "data race"};
    all["global memory"] = {[=] { start(two, race_in_global_memory, out); }, "data race"};
  }
  return all;
}

void wrong_kernels_end_the_program(const std::string& program) {
  for (const auto& [name, wrong] : wrong_kernels()) {
    std::FILE* const child = popen(("'" + program + "' '" + name + "' 2>&1").c_str(), "r");
    std::string said;
    for (int c; (c = std::fgetc(child)) != EOF;) said += static_cast<char>(c);
    const int status = pclose(child);
    expect(WIFEXITED(status) && WEXITSTATUS(status) != 0, name + ": the program went on");
    expect(said.find(wrong.message) != std::string::npos, name + ": it said\n" + said);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    wrong_kernels().at(arguments[1]).run();
    return 0;
  }
  indices();
  atomics();
  shuffles();
  sums();
  shared_memory_starts_as_not_a_number();
  two_orders();
  limits();
  numbers();
  wrong_kernels_end_the_program(arguments[0]);
  return testing::report("host_cuda", static_cast<int>(8 + wrong_kernels().size()));
}

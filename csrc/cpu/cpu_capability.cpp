#include "cpu_capability.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace snf {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

CpuCapability supported() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    return CpuCapability::avx512;
  if (avx2) return CpuCapability::avx2;
#endif
  return CpuCapability::baseline;
}

CpuCapability choose() {
  const CpuCapability best = supported();
  const char* wanted = std::getenv("SNF_EXT_CPU_CAPABILITY");
  for (int level = 0; wanted != nullptr && level < 3; ++level)
    if (std::strcmp(wanted, kNames[level]) == 0)
      return std::min(best, static_cast<CpuCapability>(level));
  return best;
}

}  // namespace

CpuCapability cpu_capability_level() {
  static const CpuCapability level = choose();
  return level;
}

const char* cpu_capability() { return kNames[static_cast<int>(cpu_capability_level())]; }

}  // namespace snf

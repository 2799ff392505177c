// Which instruction set the CPU kernels use, decided once at run time.
#pragma once

namespace snf {

enum class CpuCapability { baseline, avx2, avx512 };

// The best set that this build and this processor share. The variable SNF_EXT_CPU_CAPABILITY
// (baseline, avx2, avx512) lowers it, for tests and for comparisons; it never raises it.
CpuCapability cpu_capability_level();

// Its name: "baseline", "avx2" or "avx512".
const char* cpu_capability();

}  // namespace snf

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

// Code that is compiled for each instruction set lies in a namespace of its name. `declare` of each
// of them; and an expression in that of this processor.
#if defined(__x86_64__)
#define SNF_EACH_ISA(declare) declare(baseline) declare(avx2) declare(avx512)
#define SNF_ON_THIS_CPU(...)                                                           \
  (::snf::cpu_capability_level() == ::snf::CpuCapability::avx512 ? avx512::__VA_ARGS__ \
   : ::snf::cpu_capability_level() == ::snf::CpuCapability::avx2 ? avx2::__VA_ARGS__   \
                                                                 : baseline::__VA_ARGS__)
#else
#define SNF_EACH_ISA(declare) declare(baseline)
#define SNF_ON_THIS_CPU(...) (baseline::__VA_ARGS__)
#endif

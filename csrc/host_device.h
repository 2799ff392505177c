// Marks functions that host and device share; knows neither torch nor CUDA.
#pragma once

#if defined(__CUDACC__)
#define SNF_HOST_DEVICE __host__ __device__
#define SNF_INLINE __host__ __device__ __forceinline__
#else
#define SNF_HOST_DEVICE
// Always inlined, so that no copy compiled for a newer processor is ever shared between files.
#define SNF_INLINE inline __attribute__((always_inline))
#endif

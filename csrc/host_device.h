// Marks functions that host and device share; knows neither torch nor CUDA.
#pragma once

#if defined(__CUDACC__)
#define SNF_HOST_DEVICE __host__ __device__
#else
#define SNF_HOST_DEVICE
#endif

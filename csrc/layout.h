// Of functions for host and device.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define MAL_LAYOUT __host__ __device__ inline
#else
#define MAL_LAYOUT inline
#endif

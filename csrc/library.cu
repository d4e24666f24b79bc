// What the library says of itself.
#include "device.cuh"

#ifndef MAL_TARGETS
#define MAL_TARGETS "emulation"
#endif

MAL_API const char* mal_targets() { return MAL_TARGETS; }

#ifdef MAL_EMULATE
MAL_API const char* mal_error(int error) { return error ? "invalid argument" : "no error"; }
MAL_API int mal_driver_version() { return 0; }
MAL_API int mal_runtime_version() { return 0; }
#else
MAL_API const char* mal_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

MAL_API int mal_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

MAL_API int mal_runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}
#endif

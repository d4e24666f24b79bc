// The CUDA runtime, as far as csrc/ uses it, for a machine that runs PTX: a source's own host code
// launches as ever, and a launch that a driver would accept is handed on with the kernel's name.
// nvcc compiles this and links it in place of its runtime.
#include <cuda_runtime.h>

#include <map>
#include <string>

namespace {

constexpr size_t kSharedOfBlock = 227 * 1024, kSharedUnasked = 48 * 1024;
constexpr unsigned kMostOutOfX = 65535, kPortableCluster = 8;

struct Function {
  std::string name;
  int shared = kSharedUnasked;
  bool takes_large_clusters = false;
};
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> known;
  return known;
}

// What is handed on: grid, block, dynamic shared memory, blocks of a cluster, whether cooperative.
using Launched = void (*)(const char* name, const unsigned (&sizes)[9], const void* arguments);
Launched launched = nullptr;
int room_for_large_clusters = 1;

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void ptx_on_launch(Launched f) { launched = f; }
__attribute__((visibility("default"))) void ptx_set_room(int clusters) {
  room_for_large_clusters = clusters;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  functions()[host] = {name};
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, struct CUstream_st*) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return cudaErrorNotSupported;
}
// of <<<>>>, which csrc/ does not use
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  Function& f = functions().at(function);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > static_cast<int>(kSharedOfBlock)) return cudaErrorInvalidValue;
    f.shared = value;
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    f.takes_large_clusters = value;
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = room_for_large_clusters;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  Function& f = functions().at(function);
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  unsigned cluster = 1, cooperative = 0;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
      cluster = config->attrs[i].val.clusterDim.x;
    if (config->attrs[i].id == cudaLaunchAttributeCooperative)
      cooperative = config->attrs[i].val.cooperative;
  }
  if (!grid.x || !grid.y || !grid.z) return cudaErrorInvalidConfiguration;
  if (grid.y > kMostOutOfX || grid.z > kMostOutOfX) return cudaErrorInvalidValue;
  if (block.x * block.y * block.z > 1024) return cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > static_cast<size_t>(f.shared)) return cudaErrorInvalidValue;
  if (grid.x % cluster) return cudaErrorInvalidClusterSize;
  if (cluster > kPortableCluster && !f.takes_large_clusters) return cudaErrorInvalidClusterSize;
  const unsigned sizes[9] = {grid.x, grid.y, grid.z, block.x, block.y, block.z,
                             static_cast<unsigned>(config->dynamicSmemBytes), cluster, cooperative};
  launched(f.name.c_str(), sizes, arguments[0]);
  return cudaSuccess;
}

}  // extern "C"

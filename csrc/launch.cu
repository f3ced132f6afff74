// launch.h: what a device is, and launching.
#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "launch.h"

namespace torch_mbv2 {
namespace {

__global__ void probe() {}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

}  // namespace

Device current_device() {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  Device d{};
  d.multiprocessors = std::max(1, attribute(cudaDevAttrMultiProcessorCount, device));
  d.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  d.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, probe) != cudaSuccess) {
    cudaGetLastError();  // whoever launches a kernel finds out why none runs
    return d;
  }
  d.arch = attributes.ptxVersion * 10;
  known[device] = d;
  return d;
}

cudaError_t allow_shared_memory(const Launch& launch) {
  if (launch.shared_bytes <= 48 * 1024) return cudaSuccess;
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({device, launch.kernel}) > 0) return cudaSuccess;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, launch.kernel);
  if (error != cudaSuccess) return error;
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  error = cudaFuncSetAttribute(launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most - int(attributes.sharedSizeBytes));
  if (error != cudaSuccess) return error;
  allowed.insert({device, launch.kernel});
  return cudaSuccess;
}

cudaError_t launch_with(const Launch& launch, unsigned char* data, cudaStream_t stream) {
  void* arguments[Launch::kMostArguments];
  for (int i = 0; i < launch.arguments; ++i) arguments[i] = data + launch.argument_at[i];
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = launch.grid;
  config.blockDim = launch.block;
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (launch.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {launch.cluster, 1, 1};
    ++config.numAttrs;
  }
  if (launch.early) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  return cudaLaunchKernelExC(&config, launch.kernel, arguments);
}

cudaError_t StreamQueue::add(Launch& launch) {
  if (const cudaError_t error = allow_shared_memory(launch); error != cudaSuccess) return error;
  return launch_with(launch, launch.data, stream_);
}

}  // namespace torch_mbv2

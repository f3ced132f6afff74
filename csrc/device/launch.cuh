// Launches of kernels, also in chunks, and what kernels do so that they can follow each other
// closely.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "device/arch.cuh"
#include "launch.h"

namespace torch_mbv2 {

// Kernels follow each other closely: with launch_kernel one may start before the kernel before it
// in the stream has finished (Hopper's programmatic dependent launch). So every kernel calls
// wait_for_input before it touches device memory: then the kernel before has finished, and what it
// wrote is there. After that it calls start_next: once all its thread blocks did, the next kernel
// may start, up to its own wait_for_input.
__device__ __forceinline__ void wait_for_input() {
  if constexpr (Arch::kHasDependentLaunch) asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void start_next() {
  if constexpr (Arch::kHasDependentLaunch) asm volatile("griddepcontrol.launch_dependents;");
}

// The same pointer or index. What is read there is read after a wait_for_input before it, even by
// load_word, whose reads the compiler takes for reads of constants.
template <typename T>
__device__ __forceinline__ T after_wait(T x) {
  if constexpr (Arch::kHasDependentLaunch) {
    if constexpr (sizeof(T) == 8) {
      asm volatile("" : "+l"(x));
    } else {
      asm volatile("" : "+r"(x));
    }
  }
  return x;
}

// What is said of a launch.
struct About {
  const char* family;  // what reports call the kernel
  double clocks = 0;   // as Launch::clocks
};

// Adds a launch of `kernel` to the queue.
template <typename... Params, typename... Args>
cudaError_t launch_kernel(const About& about, void (*kernel)(Params...), dim3 grid, dim3 block,
                          size_t shared_bytes, LaunchQueue& queue, const Args&... args) {
  static_assert(sizeof...(Params) <= Launch::kMostArguments);
  static_assert(((sizeof(Params) + 16) + ...) <= Launch::kMostBytes);
  static_assert((pointers_in<Params>().size() + ...) <= Launch::kMostPointers);
  const Device& device = queue.device();
  Launch launch;
  launch.family = about.family;
  launch.clocks = about.clocks;
  launch.kernel = reinterpret_cast<const void*>(kernel);
  launch.grid = grid;
  launch.block = block;
  launch.early = device.is_hopper_or_newer();
  if (int64_t(grid.x) * grid.y * grid.z <= device.multiprocessors) {
    shared_bytes = std::max(shared_bytes, size_t(device.shared_if_alone()));
  }
  launch.shared_bytes = shared_bytes;
  (launch.add<Params>(args), ...);
  return queue.add(launch);
}

// Work items that one launch may have, so that item indices stay below 2^31 (see Divider).
constexpr int64_t kMaxItems = INT32_MAX;

// Splits a batch into launches of at most kMaxItems work items and calls
// launch(first_image, images) for each; stops at the first error.
template <typename F>
cudaError_t for_each_chunk(int64_t batch, int64_t items_per_image, F&& launch) {
  if (batch <= 0 || items_per_image <= 0) return cudaSuccess;
  if (items_per_image > kMaxItems) return cudaErrorInvalidValue;
  const int64_t most = kMaxItems / items_per_image;
  for (int64_t first = 0; first < batch; first += most) {
    const int64_t images = batch - first < most ? batch - first : most;
    if (const cudaError_t error = launch(first, images); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace torch_mbv2

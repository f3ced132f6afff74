// Clusters of thread blocks: barriers, and loads from the shared memory of another one. Nothing
// where Arch::kHasClusters is false; there no kernel is launched with clusters.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/arch.cuh"

namespace torch_mbv2 {

// Of a barrier of the whole cluster: this thread arrives. What it stored to shared memory is there
// for every thread of the cluster that has waited. (A release of device memory as well would take
// much longer.)
__device__ __forceinline__ void cluster_arrive() {
  if constexpr (Arch::kHasClusters) {
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 8)
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  }
}

// The same without publishing stores: for a thread that stored nothing for others since its last
// arrival, and only says that it has finished reading their memory.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  if constexpr (Arch::kHasClusters) {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
}

// Until every thread of the cluster has arrived.
__device__ __forceinline__ void cluster_wait() {
  if constexpr (Arch::kHasClusters) {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
}

// What lies at `address` of its shared memory in the thread block of that rank.
__device__ __forceinline__ float4 load_cluster(uint32_t address, int rank) {
  float4 v{};
  if constexpr (Arch::kHasClusters) {
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(remote));
  }
  return v;
}

}  // namespace torch_mbv2

// The shared memory of a thread block: the parts of plan/block.h's BlockStorage as addresses, and
// the weights that arrive there chunk by chunk.
#pragma once

#include "block/instance.cuh"

namespace torch_mbv2::block {

struct SharedMemory {
  const plan::BlockStorage& map;
  uint32_t base, source, expanded, places, windows;
  int source_pixel;  // bytes

  __device__ __forceinline__ explicit SharedMemory(const plan::BlockStorage& map)
      : map(map),
        base(shared_address(start())),
        source(base + plan::BlockStorage::kSource),
        expanded(base + map.expanded),
        places(base + map.places),
        windows(base + map.windows),
        source_pixel(plan::source_pixel_bytes(map.source_units)) {}

  // By a name of its own, so that the compiler sees that accesses are of shared memory.
  __device__ __forceinline__ static unsigned char* start() {
    extern __shared__ __align__(128) unsigned char shared[];
    return shared;
  }

  // The c-th chunk of a thread block uses stage c modulo the number of stages, 1 or 2.
  __device__ __forceinline__ int stage(int c) const { return c & (map.stages - 1); }
  __device__ __forceinline__ uint32_t weights(int c) const {
    return base + map.weights + stage(c) * map.stage_bytes;
  }
  __device__ __forceinline__ uint32_t barrier(int c) const {
    return base + map.barriers + stage(c) * plan::BlockStorage::kBarrierBytes;
  }
  // Parity of the phase of the barrier in which that chunk's weights arrive.
  __device__ __forceinline__ int parity(int c) const { return c >> (map.stages - 1) & 1; }
};

__device__ __forceinline__ void make_weight_barriers(const SharedMemory& memory) {
  if (Arch::kHasBulkCopies && threadIdx.x == 0) {
    const uint32_t barriers = memory.base + memory.map.barriers;
    make_copy_barrier(barriers);
    make_copy_barrier(barriers + plan::BlockStorage::kBarrierBytes);
    publish_copy_barriers();
  }
}

// Starts to copy the weights of the c-th chunk of this thread block.
__device__ __forceinline__ void load_weights(const BlockArgs& a, const SharedMemory& memory,
                                             int c) {
  if (Arch::kHasBulkCopies && threadIdx.x > 0) return;
  const int bytes = memory.map.stage_bytes;
  const unsigned char* const from = slice_weights(a) + int64_t(ChunkRange(a).first + c) * bytes;
  const uint32_t to = memory.weights(c);
  if constexpr (Arch::kHasBulkCopies) {
    copy_bulk(to, from, bytes, memory.barrier(c));
  } else {
#pragma unroll 1
    for (int i = threadIdx.x * kUnitBytes; i < bytes; i += blockDim.x * kUnitBytes) {
      copy_async16(to + i, from + i, true);
    }
  }
}

// Waits for the weights of the c-th chunk, and before the first one for the source; starts to load
// the next ones, where there is room for both. After that nobody reads the expanded map of the
// chunk before any more. Returns the address of the weights.
__device__ __forceinline__ uint32_t receive_weights(const BlockArgs& a, const SharedMemory& memory,
                                                    int c) {
  if (memory.map.stages == 1 && c > 0) {
    __syncthreads();  // nobody reads the last chunk's weights any more
    load_weights(a, memory, c);
    copy_async_commit();
  }
  copy_async_wait<0>();
  __syncthreads();
  const uint32_t weights = memory.weights(c);
  if (Arch::kHasBulkCopies) wait_copies(memory.barrier(c), memory.parity(c));
  if (memory.map.stages == 2 && c + 1 < ChunkRange(a).count) {
    load_weights(a, memory, c + 1);
    copy_async_commit();
  }
  return weights;
}

}  // namespace torch_mbv2::block

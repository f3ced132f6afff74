// Accesses of shared and device memory by PTX instruction: loads and stores, asynchronous copies
// (cp.async), bulk copies with barriers that count their bytes (cp.async.bulk, mbarrier), and
// values whose origin is hidden from the compiler.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/arch.cuh"

namespace torch_mbv2 {

// ---------------------------------------------------------------------------- Hidden origins

// The compiler does not know where these values come from, so it neither computes them anew for
// each use (an address to which it only adds offsets then), nor takes two calls for one value (so
// that what follows from a coordinate is computed anew at each use, rather than kept in registers
// that are needed for other things).
__device__ __forceinline__ uint64_t opaque_address(const void* p) {
  uint64_t address;
  asm volatile("mov.u64 %0, %1;" : "=l"(address) : "l"(p));
  return address;
}
__device__ __forceinline__ uint32_t opaque(uint32_t value) {
  uint32_t same;
  asm volatile("mov.b32 %0, %1;" : "=r"(same) : "r"(value));
  return same;
}
// blockIdx.x and blockIdx.y.
__device__ __forceinline__ uint32_t block_index() {
  uint32_t value;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(value));
  return value;
}
__device__ __forceinline__ uint32_t block_index_y() {
  uint32_t value;
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(value));
  return value;
}
// threadIdx.x.
__device__ __forceinline__ uint32_t thread_index() {
  if constexpr (Arch::kKeepsThreadIndex) {
    return threadIdx.x;
  } else {
    uint32_t value;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(value));
    return value;
  }
}
// threadIdx.x % 32 of a one-dimensional thread block, from another source.
__device__ __forceinline__ uint32_t lane_index() {
  uint32_t value;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(value));
  return value;
}

// ---------------------------------------------------------------------------- Shared memory

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The number in a name counts bytes.
__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}
__device__ __forceinline__ uint2 load_shared8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ uint32_t load_shared4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
__device__ __forceinline__ void store_shared4(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
template <typename T>
__device__ __forceinline__ void store_shared2(uint32_t address, T v) {
  uint16_t bits;
  memcpy(&bits, &v, sizeof(bits));
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(bits) : "memory");
}
__device__ __forceinline__ void store_shared16(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}
// These only where `wanted` is not 0.
__device__ __forceinline__ void store_shared16_if(uint32_t wanted, uint32_t address,
                                                  const uint32_t (&v)[4]) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n}" ::
          "r"(address),
      "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(wanted)
      : "memory");
}
__device__ __forceinline__ void store_shared8_if(uint32_t wanted, uint32_t address, uint32_t a,
                                                 uint32_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p st.shared.v2.u32 [%0], {%1, %2};\n}" ::"r"(
          address),
      "r"(a), "r"(b), "r"(wanted)
      : "memory");
}

// ---------------------------------------------------------------------------- Device memory

// kCount neighbours from element `offset` of an array in device memory that nobody writes, or
// zeros.
template <typename T, int kCount>
__device__ __forceinline__ void load_elements(T (&values)[kCount], uint64_t base, int offset,
                                              bool valid) {
  if constexpr (sizeof(values) == 2) {
    uint16_t bits;
    asm("{\n.reg .pred p;\n.reg .u64 at;\nsetp.ne.u32 p, %3, 0;\nmad.wide.s32 at, %2, %4, %1;\n"
        "mov.u16 %0, 0;\n@p ld.global.nc.u16 %0, [at];\n}"
        : "=h"(bits)
        : "l"(base), "r"(offset), "r"(int(valid)), "n"(int(sizeof(T))));
    memcpy(values, &bits, 2);
  } else if constexpr (sizeof(values) == 4) {
    uint32_t bits;
    asm("{\n.reg .pred p;\n.reg .u64 at;\nsetp.ne.u32 p, %3, 0;\nmad.wide.s32 at, %2, %4, %1;\n"
        "mov.u32 %0, 0;\n@p ld.global.nc.u32 %0, [at];\n}"
        : "=r"(bits)
        : "l"(base), "r"(offset), "r"(int(valid)), "n"(int(sizeof(T))));
    memcpy(values, &bits, 4);
  } else {
    static_assert(sizeof(values) == 8);
    uint64_t bits;
    asm("{\n.reg .pred p;\n.reg .u64 at;\nsetp.ne.u32 p, %3, 0;\nmad.wide.s32 at, %2, %4, %1;\n"
        "mov.u64 %0, 0;\n@p ld.global.nc.u64 %0, [at];\n}"
        : "=l"(bits)
        : "l"(base), "r"(offset), "r"(int(valid)), "n"(int(sizeof(T))));
    memcpy(values, &bits, 8);
  }
}

// ---------------------------------------------------------------------------- Copies

// Copies the first `bytes` of 16 to shared memory, the others are zeros.
__device__ __forceinline__ void copy_async_part(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

// Copies 16 bytes to shared memory, or writes 16 zero bytes where `inside` is false.
__device__ __forceinline__ void copy_async16(uint32_t to, const void* from, bool inside) {
  copy_async_part(to, from, inside ? 16 : 0);
}

// The same through L1: for pieces that share 32-byte sectors.
__device__ __forceinline__ void copy_async16_cached(uint32_t to, uint64_t from, bool inside) {
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;"); }

template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}

// Barriers that count the bytes of bulk copies, only with Arch::kHasBulkCopies. One thread makes
// them and starts copies; the others may wait after the next __syncthreads.
__device__ __forceinline__ void make_copy_barrier(uint32_t barrier) {
  if constexpr (Arch::kHasBulkCopies) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
  }
}
__device__ __forceinline__ void publish_copy_barriers() {
  if constexpr (Arch::kHasBulkCopies) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes,
                                          uint32_t barrier) {
  if constexpr (Arch::kHasBulkCopies) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
  }
}
// Until the copies of the barrier's phase of that parity have arrived.
__device__ __forceinline__ void wait_copies(uint32_t barrier, int parity) {
  if constexpr (Arch::kHasBulkCopies) {
    asm volatile(
        "{\n.reg .pred done;\nwait:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra wait;\n}" ::"r"(
            barrier),
        "r"(parity)
        : "memory");
  }
}

}  // namespace torch_mbv2

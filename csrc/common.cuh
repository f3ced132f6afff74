// Helpers that every kernel shares: element types, 16-byte vectors, the output clamp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels.h"

namespace torch_mbv2 {

template <typename Int>
constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

inline bool is_aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// min(max(x, lo), hi) that keeps NaN, as torch.clamp does (fmaxf would drop it).
__device__ __forceinline__ float apply(const Clamp& act, float x) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(act.lo));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(act.hi));
  return x;
}

// kSize elements moved by one access of up to 16 bytes.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vec {
  T data[kSize];
};
template <typename T>
constexpr int kVecSize = 16 / sizeof(T);  // elements in 16 bytes

template <typename T, int kSize>
__device__ __forceinline__ void load_floats(const T* p, float (&out)[kSize]) {
  const Vec<T, kSize> v = *reinterpret_cast<const Vec<T, kSize>*>(p);
#pragma unroll
  for (int i = 0; i < kSize; ++i) out[i] = to_float(v.data[i]);
}

template <typename T, int kSize>
__device__ __forceinline__ void store_floats(T* p, const float (&in)[kSize]) {
  Vec<T, kSize> v;
#pragma unroll
  for (int i = 0; i < kSize; ++i) v.data[i] = from_float<T>(in[i]);
  *reinterpret_cast<Vec<T, kSize>*>(p) = v;
}

// 16 bytes as they lie in memory, converted to floats as late as possible (it saves registers).
struct Packed {
  uint4 bits;
};

template <typename T>
__device__ __forceinline__ Packed load_packed(const T* p) {
  return {*reinterpret_cast<const uint4*>(p)};
}

template <typename T>
__device__ __forceinline__ void unpack(const Packed& packed, float (&out)[kVecSize<T>]) {
  const uint32_t words[4] = {packed.bits.x, packed.bits.y, packed.bits.z, packed.bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __half>) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    } else {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}

// Multiprocessors of the current device.
inline int sm_count() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}

// Calls f(T{}) with the element type of `dtype`.
template <typename F>
cudaError_t dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(__half{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace torch_mbv2

// Element types: conversions, the output clamp, and of the 16-bit ones what differs between them in
// code that is otherwise the same.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "plan/types.h"

namespace torch_mbv2 {

template <typename T>
constexpr DType dtype_of = DType::kFloat32;
template <>
constexpr DType dtype_of<__half> = DType::kFloat16;
template <>
constexpr DType dtype_of<__nv_bfloat16> = DType::kBFloat16;

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

// kBytes; Pair, two elements in a word; kTwoOnes, the word of two ones; round_pair, two rounded
// floats (the first in the low half); relu_pair, the word of them, of which negative ones are 0 and
// NaN stays.
template <typename T>
struct Element;

#define TORCH_MBV2_ELEMENT(TYPE, PAIR, ROUND_PAIR, PTX, TWO_ONES)                      \
  template <>                                                                          \
  struct Element<TYPE> {                                                               \
    using Pair = PAIR;                                                                 \
    static constexpr int kBytes = 2;                                                   \
    static constexpr uint32_t kTwoOnes = TWO_ONES;                                     \
    __device__ __forceinline__ static Pair round_pair(float low, float high) {         \
      return ROUND_PAIR(low, high);                                                    \
    }                                                                                  \
    __device__ __forceinline__ static uint32_t relu_pair(float low, float high) {      \
      uint32_t word;                                                                   \
      asm("cvt.rn.relu." PTX "x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low)); \
      return word;                                                                     \
    }                                                                                  \
  };
TORCH_MBV2_ELEMENT(__half, __half2, __floats2half2_rn, "f16", 0x3C003C00u)
TORCH_MBV2_ELEMENT(__nv_bfloat16, __nv_bfloat162, __floats2bfloat162_rn, "bf16", 0x3F803F80u)
#undef TORCH_MBV2_ELEMENT

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(T low, T high) {
  typename Element<T>::Pair pair;
  pair.x = low;
  pair.y = high;
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

// max(0, min(x, hi)) on packed pairs: rounding keeps order, so clamping the rounded value between
// the rounded bounds is rounding the clamped one.
template <typename T>
struct PackedClamp {
  using Pair = typename Element<T>::Pair;
  Pair hi;

  __device__ explicit PackedClamp(float bound) { hi.x = hi.y = from_float<T>(bound); }

  __device__ __forceinline__ uint32_t operator()(float a, float b) const {
    uint32_t word = Element<T>::relu_pair(a, b);
    Pair pair;
    memcpy(&pair, &word, sizeof(word));
    pair = __hmin2_nan(pair, hi);
    memcpy(&word, &pair, sizeof(word));
    return word;
  }
};

}  // namespace torch_mbv2

// 16-bit element types: what differs between them in code that is otherwise the same.
#pragma once

#include "common.cuh"

namespace torch_mbv2 {

// kBytes; Pair, two elements in a word; kTwoOnes, the word of two ones; relu_pair, the word of two
// rounded floats (the first in the low half), of which negative ones are 0 and NaN stays.
template <typename T>
struct Element;

#define TORCH_MBV2_ELEMENT(TYPE, PAIR, PTX, TWO_ONES)                                  \
  template <>                                                                          \
  struct Element<TYPE> {                                                               \
    using Pair = PAIR;                                                                 \
    static constexpr int kBytes = 2;                                                   \
    static constexpr uint32_t kTwoOnes = TWO_ONES;                                     \
    __device__ __forceinline__ static uint32_t relu_pair(float low, float high) {      \
      uint32_t word;                                                                   \
      asm("cvt.rn.relu." PTX "x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low)); \
      return word;                                                                     \
    }                                                                                  \
  };
TORCH_MBV2_ELEMENT(__half, __half2, "f16", 0x3C003C00u)
TORCH_MBV2_ELEMENT(__nv_bfloat16, __nv_bfloat162, "bf16", 0x3F803F80u)
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

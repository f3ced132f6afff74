// Several elements moved by one access of up to 16 bytes.
#pragma once

#include <cstdint>
#include <cstring>

#include "device/element.cuh"

namespace torch_mbv2 {

// kSize elements moved by one access of up to 16 bytes.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vec {
  T data[kSize];
};
template <typename T>
constexpr int kVecSize = 16 / sizeof(T);  // elements in 16 bytes

// The machine word of kBytes that one load or store instruction moves.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
template <typename T, int kSize>
using Word = typename WordOf<sizeof(T) * kSize>::type;

// kSize elements by one load through the read-only path, or zeros where `valid` is false (nothing
// is read then). `p` must be aligned to the word.
template <typename T, int kSize>
__device__ __forceinline__ Word<T, kSize> load_word(const T* p, bool valid = true) {
  Word<T, kSize> word{};
  if (valid) word = __ldg(reinterpret_cast<const Word<T, kSize>*>(p));
  return word;
}

template <typename T, int kSize>
__device__ __forceinline__ void unpack(const Word<T, kSize>& word, float (&out)[kSize]) {
  T elements[kSize];
  memcpy(elements, &word, sizeof(word));
#pragma unroll
  for (int i = 0; i < kSize; ++i) out[i] = to_float(elements[i]);
}

// As floats, moved by one access.
template <typename T, int kSize>
__device__ __forceinline__ void load_floats(const T* p, float (&out)[kSize]) {
  const Word<T, kSize> word = *reinterpret_cast<const Word<T, kSize>*>(p);  // one access, not many
  unpack<T, kSize>(word, out);
}

// Rounds and stores kSize elements by one instruction; pairs of halves are rounded and packed by
// one.
template <typename T, int kSize>
__device__ __forceinline__ void store_floats(T* p, const float (&in)[kSize]) {
  Word<T, kSize> word;
  if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {
    uint32_t pairs[kSize / 2];
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      const auto pair = Element<T>::round_pair(in[2 * i], in[2 * i + 1]);
      memcpy(&pairs[i], &pair, 4);
    }
    memcpy(&word, pairs, sizeof(word));
  } else {
    T elements[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) elements[i] = from_float<T>(in[i]);
    memcpy(&word, elements, sizeof(word));
  }
  *reinterpret_cast<Word<T, kSize>*>(p) = word;
}

}  // namespace torch_mbv2

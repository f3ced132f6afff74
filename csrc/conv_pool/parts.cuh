// What the kernels of conv_pool share.
//
//   output[n, c] = mean over pixels of clamp(sum_k input[n, pixel, k] * weight[c, k] + bias[c])
//
// input (batch, pixels, k), weight (n, k) and output (batch, n) are dense. Sums over k are float32.
// Sums over pixels are float32 for 16-bit types as long as they have few terms, else float64: a
// mean of thousands of pixels of either sign is small beside its terms. One rounding at the end.
// In every kernel the order of an image's sums is the same wherever it is in the batch.
//
// Tensor-core products of both 16-bit kernels are m16n8k16 with 16 channels as m and 8 pixels as n.
// With g = lane / 4 and q = lane % 4:
// - Of the 32 k of a step, lane q takes k 8q ... 8q + 7 of its rows, 16 bytes, as its operands of
//   two products. The order of k within a sum is free, if it is the same for both operands. The
//   pixels' operands are pairs of registers, so that a 16-byte load needs no moves.
// - Row g (g + 8) of the j-th product is channel 2 * kHigh * g + 2 * j (+ 1) of the warp's
//   16 * kHigh, so that after the sum over pixels neighbouring lanes hold neighbouring channels.
#pragma once

#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/mma.cuh"
#include "device/vector.cuh"
#include "kernels.h"
#include "plan/conv_pool.h"

namespace torch_mbv2::conv_pool_kernels {

constexpr int kTileRows = plan::kConvPoolTilePixels;  // pixels of two products side by side
constexpr int kStepK = plan::kConvPoolStepK;          // 64 bytes, 16 for each lane of a row
constexpr int kMostWarps = plan::kConvPoolMostWarps;

// What a launch needs beyond ConvPoolParams where a thread block owns one image.
struct ImageShape {
  int channel_groups;  // thread blocks that share an image
  float scale;         // 1 / pixels

  static constexpr std::array<size_t, 0> pointers() { return {}; }
};

// 8 elements of a row, of which `left` are inside.
template <typename T, bool kVectors>
__device__ __forceinline__ uint4 load_piece(const T* from, int left) {
  if constexpr (kVectors) {
    return load_word<T, 8>(from, left > 0);
  } else {
    Vec<T, 8> piece;
#pragma unroll
    for (int i = 0; i < 8; ++i) piece.data[i] = i < left ? from[i] : from_float<T>(0.0f);
    uint4 word;
    memcpy(&word, &piece, sizeof(word));
    return word;
  }
}

// What a lane holds of the weights of a step for 16 channels: two operands, 16 x 16 each.
struct Weights {
  uint32_t first[4], second[4];
};

__device__ __forceinline__ Weights make_weights(const uint4& upper, const uint4& lower) {
  return {{upper.x, lower.x, upper.y, lower.y}, {upper.z, lower.z, upper.w, lower.w}};
}

// The biases of the kCount channels of a lane, from `channel` on.
template <typename T, int kCount>
__device__ __forceinline__ void load_bias(const ConvPoolParams& p, int channel,
                                          float (&bias)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool inside = p.bias != nullptr && channel + i < p.n;
    bias[i] = inside ? to_float(static_cast<const T*>(p.bias)[channel + i]) : 0.0f;
  }
}

// Adds up the 4 lanes q of each g; afterwards sum[0] of lane q is the total of value
// q * kCount / 4.
template <int kCount>
__device__ __forceinline__ void sum_lanes(float (&sum)[kCount], int lane) {
  static_assert(kCount == 2 || kCount == 4);
  int count = kCount;
#pragma unroll
  for (int bit = 2; bit >= 1; bit /= 2) {
    if (count == 1) {
      sum[0] += __shfl_xor_sync(~0u, sum[0], bit);
      continue;
    }
    count /= 2;
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float mine = upper ? sum[i + count] : sum[i];
      sum[i] = mine + __shfl_xor_sync(~0u, upper ? sum[i] : sum[i + count], bit);
    }
  }
}

}  // namespace torch_mbv2::conv_pool_kernels

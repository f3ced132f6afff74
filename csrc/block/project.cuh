// The projection of a warp's own pixels, 16 expanded channels at a time, accumulated in its
// registers over all chunks, and its interplay with the convolution.
#pragma once

#include "block/depthwise.cuh"

namespace torch_mbv2::block {

template <typename Instance>
struct Projection {
  using T = typename Instance::T;
  static constexpr int kTiles = Instance::kTiles, kOutTiles = Instance::kOutTiles;
  static constexpr int kTileBytes = 2 * kFragmentBytes;  // of weights: 16 of k, 8 channels
  float sums[kOutTiles][kTiles][4];

  // Sums start from the bias; in a cluster, those of its first thread block.
  __device__ __forceinline__ explicit Projection(const BlockArgs& a) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const float* const at = reinterpret_cast<const float*>(slice_weights(a) + a.slice_bytes -
                                                             plan::project_bias_bytes(kTiles)) +
                              j * 8 + threadIdx.x % 4 * 2;
      const float2 bias =
          ChunkRange(a).rank == 0 ? __ldg(reinterpret_cast<const float2*>(at)) : float2{};
#pragma unroll
      for (int t = 0; t < kOutTiles; ++t) {
        sums[t][j][0] = sums[t][j][2] = bias.x;
        sums[t][j][1] = sums[t][j][3] = bias.y;
      }
    }
  }

  // Adds 16 expanded channels, `d`, times their weights, of which this lane's first 16 bytes are at
  // address `weights`.
  __device__ __forceinline__ void add(uint32_t weights, int lane,
                                      const uint32_t (&d)[kOutTiles][4]) {
#pragma unroll
    for (int j = 0; j + 2 <= kTiles; j += 2) {
      const uint4 b = load_shared16(weights + j * kTileBytes);
#pragma unroll
      for (int t = 0; t < kOutTiles; ++t) {
        mma<T>(sums[t][j], d[t], b.x, b.y);
        mma<T>(sums[t][j + 1], d[t], b.z, b.w);
      }
    }
    if constexpr (kTiles % 2 == 1) {
      const uint2 b = load_shared8(weights - lane * 8 + (kTiles - 1) * kTileBytes);
#pragma unroll
      for (int t = 0; t < kOutTiles; ++t) mma<T>(sums[t][kTiles - 1], d[t], b.x, b.y);
    }
  }
};

// Convolves and projects one chunk.
template <typename Instance>
__device__ __forceinline__ void convolve_and_project(const Depthwise<Instance>& depthwise,
                                                     Projection<Instance>& projection) {
  constexpr int kPairs = Instance::kPairs;
  const uint32_t weights = depthwise.weights + Instance::kSizes.project + depthwise.lane * 16;
  constexpr int kStep = Instance::kTiles * Projection<Instance>::kTileBytes;
  uint32_t window = depthwise.windows.first;
  if constexpr (Instance::kPipelined) {
    // The next convolution's chain of products runs between those of this projection.
    uint32_t d[2][Instance::kOutTiles][4];
    depthwise.convolve(0, window, d[0]);
#pragma unroll
    for (int s = 0; s < kPairs; ++s) {
      window += Instance::kPairBytes;
      if (s + 1 < kPairs) depthwise.convolve(s + 1, window, d[(s + 1) % 2]);
      projection.add(weights + s * kStep, depthwise.lane, d[s % 2]);
    }
  } else {
#pragma unroll 1
    for (int s = 0; s < kPairs; ++s) {
      uint32_t d[Instance::kOutTiles][4];
      depthwise.convolve(s, window, d);
      window += Instance::kPairBytes;
      // Keeps the compiler from loading these operands early, for want of registers.
      if (Instance::kCols > 1) __syncwarp();
      projection.add(weights + s * kStep, depthwise.lane, d);
    }
  }
}

}  // namespace torch_mbv2::block

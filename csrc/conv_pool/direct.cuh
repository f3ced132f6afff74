// direct_product (float16, bfloat16): conv_pool without staging, for few images, where latency is
// the time, and for what resident_product does not take. The formula and the layout of the products
// stand in parts.cuh.
//
// A thread block owns one image and 16 * kHigh channels, warp w of it the tiles of 16 pixels w,
// w + warps and so on. It loads its operands straight into registers, those of kAhead steps at
// once; a row of the input is read once a thread block.
//
// Shared memory: float partial[kMostWarps][16 * kHigh], the means of the warps, added in order.
//
// Bound by the latency of its loads where thread blocks are few, else by reading the input from L2
// once for every 16 * kHigh channels.
#pragma once

#include "conv_pool/parts.cuh"

namespace torch_mbv2::conv_pool_kernels {

constexpr int kRun = 16;  // tiles summed in float32 before they join a sum in float64

template <typename T, int kHigh, bool kVectors>
__global__ void __launch_bounds__(32 * kMostWarps, 1)
    direct_product(const __grid_constant__ ConvPoolParams p, const __grid_constant__ ImageShape s) {
  constexpr int kChannels = 16 * kHigh, kValues = 2 * kHigh;
  constexpr int kAhead = kVectors ? plan::kConvPoolAhead / kHigh : 1;
  __shared__ float partial[kMostWarps][kChannels];

  const int warps = blockDim.x / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, q = lane % 4;
  const int image = blockIdx.x / s.channel_groups;
  const int n0 = (blockIdx.x - image * s.channel_groups) * kChannels;
  const unsigned pixels = p.pixels;
  const int first_channel = n0 + kValues * g;  // of this lane
  wait_for_input();
  start_next();
  const T* const input =
      after_wait(static_cast<const T*>(p.input)) + int64_t(image) * p.pixels * p.k + q * 8;
  const T* const weight =
      after_wait(static_cast<const T*>(p.weight)) + int64_t(first_channel) * p.k + q * 8;
  float bias[kValues];
  load_bias<T>(p, first_channel, bias);

  // 1. The tiles of this warp. Two sums for each value, so that products wait less for each other.
  double sum[kValues] = {};
  const unsigned tiles = (pixels + (kTileRows - 1)) / kTileRows;
  for (unsigned tile = warp; tile < tiles;) {
    float part[kValues] = {};
#pragma unroll 1
    for (int run = 0; run < kRun && tile < tiles; ++run, tile += warps) {
      const unsigned row = tile * kTileRows + g;
      const T* pixel_rows[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        pixel_rows[half] = input + (int64_t(row) + half * 8) * p.k;
      }
      const T* channel_rows[kValues];
#pragma unroll
      for (int i = 0; i < kValues; ++i) channel_rows[i] = weight + int64_t(i) * p.k;
      float acc[2][2][kHigh][4] = {};  // [sum][half]: as in resident_product
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2 * kValues; ++i) acc[0][half][i / 4][i % 4] = bias[i / 2];
      }
#pragma unroll 1
      for (int left = p.k - q * 8; left + q * 8 > 0; left -= kAhead * kStepK) {
        uint4 from_pixels[kAhead][2], from_channels[kAhead][kValues];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row_left = row + half * 8 < pixels ? left : 0;
#pragma unroll
          for (int step = 0; step < kAhead; ++step) {
            const int k = step * kStepK;
            from_pixels[step][half] = load_piece<T, kVectors>(pixel_rows[half] + k, row_left - k);
          }
          pixel_rows[half] += kAhead * kStepK;
        }
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
          const int row_left = first_channel + i < p.n ? left : 0;
#pragma unroll
          for (int step = 0; step < kAhead; ++step) {
            const int k = step * kStepK;
            from_channels[step][i] = load_piece<T, kVectors>(channel_rows[i] + k, row_left - k);
          }
          channel_rows[i] += kAhead * kStepK;
        }
#pragma unroll
        for (int step = 0; step < kAhead; ++step) {
#pragma unroll
          for (int j = 0; j < kHigh; ++j) {
            const Weights weights =
                make_weights(from_channels[step][2 * j], from_channels[step][2 * j + 1]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const uint4& from = from_pixels[step][half];
              mma<T>(acc[0][half][j], weights.first, from.x, from.y);
              mma<T>(acc[1][half][j], weights.second, from.z, from.w);
            }
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool inside = tile * kTileRows + half * 8 + 2 * q + e < pixels;
#pragma unroll
          for (int i = 0; i < kValues; ++i) {
            const int j = i / 2, c = i % 2 * 2 + e;
            const float value = apply(p.act, acc[0][half][j][c] + acc[1][half][j][c]);
            part[i] += inside ? value : 0.0f;
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) sum[i] += part[i];
  }

  // 2. Lanes, then warps.
  float mean[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) mean[i] = float(sum[i]) * s.scale;
  sum_lanes(mean, lane);
  if (lane % (4 / kValues) == 0) partial[warp][lane * kValues / 4] = mean[0];
  __syncthreads();
  const int channel = threadIdx.x;
  if (channel < kChannels && n0 + channel < p.n) {
    float total = partial[0][channel];
    for (int w = 1; w < warps; ++w) total += partial[w][channel];
    static_cast<T*>(p.output)[int64_t(image) * p.n + n0 + channel] = from_float<T>(total);
  }
}

}  // namespace torch_mbv2::conv_pool_kernels

// float_pool (float32): conv_pool by FFMA. The formula stands in parts.cuh.
//
// A thread block of 128 threads owns one image and 16 * kWide channels, the columns of its product,
// and takes the pixels by tiles of 56 (an image of 7x7 is 49). Thread (x, y) makes rows y, y + 8,
// ..., y + 48 of a tile and columns x, x + 16 and so on. A row's sum over the pixels of a tile is
// float32, that over tiles and rows float64.
//
// Shared memory: kStages x { tile (56 rows), weights (16 * kWide rows) }, kK floats a row and 16
// bytes of padding, which makes the 16-byte loads free of bank conflicts; afterwards double
// partial[8][16 * kWide], the sums of each y, added in order.
//
// Bound by FFMA; where thread blocks are few, by the latency of each step of kK.
#pragma once

#include "conv_pool/parts.cuh"

namespace torch_mbv2::conv_pool_kernels {

template <int kWide, bool kVectors>
__global__ void __launch_bounds__(128, 3)
    float_pool(const __grid_constant__ ConvPoolParams p, const __grid_constant__ ImageShape s) {
  constexpr int kThreads = 128, kAcross = 16, kDown = 8, kRows = 7, kStages = 3;
  constexpr int kTile = kDown * kRows, kColumns = kAcross * kWide;
  constexpr int kK = 16, kPitch = kK + 4;
  constexpr int kPieces = (kTile + kColumns) * kK / 4;
  __shared__ __align__(16) float shared[kStages][(kTile + kColumns) * kPitch];
  static_assert(kThreads == 32 * plan::kConvPoolFloatWarps && kTile == plan::kConvPoolFloatPixels &&
                kK == plan::kConvPoolFloatStepK);
  static_assert(sizeof(shared) <= 48 * 1024);
  static_assert(sizeof(shared) >= kDown * kColumns * sizeof(double));

  const int x = threadIdx.x % kAcross, y = threadIdx.x / kAcross;
  const int image = blockIdx.x / s.channel_groups;
  const int n0 = (blockIdx.x - image * s.channel_groups) * kColumns;
  const float* const input = static_cast<const float*>(p.input) + int64_t(image) * p.pixels * p.k;
  const float* const weight = static_cast<const float*>(p.weight) + int64_t(n0) * p.k;
  wait_for_input();
  start_next();
  float bias[kWide] = {};
  if (p.bias != nullptr) {
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      const int column = n0 + x + kAcross * j;
      if (column < p.n) bias[j] = static_cast<const float*>(p.bias)[column];
    }
  }

  const int steps = ceil_div(p.k, kK);
  const auto load_stage = [&](int row0, int step) {
    float* const to = shared[step % kStages];
#pragma unroll 1
    for (int i = threadIdx.x; i < kPieces; i += kThreads) {
      const int row = i / (kK / 4), piece = i % (kK / 4) * 4, k = step * kK + piece;
      const bool is_input = row < kTile;
      const int inside_rows = is_input ? p.pixels - row0 : p.n - n0;
      const int from_row = is_input ? row : row - kTile;
      const float* const from =
          is_input ? input + int64_t(row0 + row) * p.k : weight + int64_t(from_row) * p.k;
      if constexpr (kVectors) {
        const bool inside = from_row < inside_rows && k < p.k;
        copy_async16(shared_address(to + row * kPitch + piece), inside ? from + k : input, inside);
      } else {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const bool inside = from_row < inside_rows && k + v < p.k;
          to[row * kPitch + piece + v] = inside ? from[k + v] : 0.0f;
        }
      }
    }
  };

  double sum[kWide] = {};
  for (int row0 = 0; row0 < p.pixels; row0 += kTile) {
    // 1. The product of a tile, kStages - 1 stages of loads ahead of it.
    float acc[kRows][kWide] = {};
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < steps) load_stage(row0, i);
      copy_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<kStages - 2>();
      __syncthreads();
      if (step + kStages - 1 < steps) load_stage(row0, step + kStages - 1);
      copy_async_commit();
      const float* const rows = shared[step % kStages] + y * kPitch;
      const float* const columns = shared[step % kStages] + (kTile + x) * kPitch;
#pragma unroll
      for (int k = 0; k < kK; k += 4) {
        float4 w[kWide];
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          w[j] = *reinterpret_cast<const float4*>(columns + j * kAcross * kPitch + k);
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const float4 a = *reinterpret_cast<const float4*>(rows + i * kDown * kPitch + k);
#pragma unroll
          for (int j = 0; j < kWide; ++j) {
            acc[i][j] = fmaf(a.x, w[j].x, acc[i][j]);
            acc[i][j] = fmaf(a.y, w[j].y, acc[i][j]);
            acc[i][j] = fmaf(a.z, w[j].z, acc[i][j]);
            acc[i][j] = fmaf(a.w, w[j].w, acc[i][j]);
          }
        }
      }
    }
    __syncthreads();

    // 2. Activation and sum.
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      float part = 0.0f;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float value = apply(p.act, acc[i][j] + bias[j]);
        part += row0 + y + kDown * i < p.pixels ? value : 0.0f;
      }
      sum[j] += part;
    }
  }

  // 3. The sums of each y, added in order.
  double* const partial = reinterpret_cast<double*>(shared);
#pragma unroll
  for (int j = 0; j < kWide; ++j) partial[y * kColumns + x + kAcross * j] = sum[j];
  __syncthreads();
  const int column = threadIdx.x;
  if (column < kColumns && n0 + column < p.n) {
    double total = partial[column];
    for (int i = 1; i < kDown; ++i) total += partial[i * kColumns + column];
    static_cast<float*>(p.output)[int64_t(image) * p.n + n0 + column] = float(total / p.pixels);
  }
}

}  // namespace torch_mbv2::conv_pool_kernels

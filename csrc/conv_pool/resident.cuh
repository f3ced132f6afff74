// resident_product (float16, bfloat16): conv_pool with the weights in registers.
#pragma once

#include "conv_pool/parts.cuh"

namespace torch_mbv2::conv_pool_kernels {

constexpr int kStageRows = 32;  // two tiles

// What a launch needs beyond ConvPoolParams.
struct GroupShape {
  int channel_groups;  // blocks that share a group of images
  int images;          // of a group
  float scale;         // 1 / pixels
};

template <int kSteps, int kHigh>
struct Resident {
  static constexpr int kChannels = 16 * kHigh;  // of a warp
  static constexpr int kStages = kSteps <= 10 ? 4 : 2;
  static constexpr int kPitch = 64 * (kSteps / 2 * 2 + 1);
  static constexpr int kStageBytes = kStageRows * kPitch;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kSharedBytes <= 99 * 1024, "what a block may have on sm_86, sm_89 and sm_120");
};

template <typename T, int kSteps, int kHigh>
__global__ void __launch_bounds__(32 * kMostWarps)
    resident_product(const __grid_constant__ ConvPoolParams p,
                     const __grid_constant__ GroupShape s) {
  using Kernel = Resident<kSteps, kHigh>;
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int kValues = 2 * kHigh;  // channels of a lane

  const int threads = blockDim.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, q = lane % 4;
  const int group = blockIdx.x / s.channel_groups;
  const int channel_group = blockIdx.x - group * s.channel_groups;
  const int n0 = (channel_group * (threads / 32) + warp) * Kernel::kChannels;
  const int64_t first_image = int64_t(group) * s.images;
  const int images = p.batch - first_image < s.images ? int(p.batch - first_image) : s.images;
  const int rows = images * p.pixels;
  const int pieces = p.k / 8;

  // 1. The zeros behind the last k of each row. No copy overwrites them.
  if (const int tail = 4 * kSteps - pieces; tail > 0) {
    for (int i = threadIdx.x; i < Kernel::kStages * kStageRows * tail; i += threads) {
      const int row = i / tail;
      *reinterpret_cast<uint4*>(shared + row * Kernel::kPitch + (pieces + i - row * tail) * 16) =
          uint4{};
    }
  }

  wait_for_input();
  start_next();

  // 2. The copies ahead. A thread copies every `threads`-th piece of a stage.
  const T* const input = static_cast<const T*>(p.input) + first_image * p.pixels * p.k;
  const int row_step = threads / pieces, piece_step = threads - row_step * pieces;
  const int first_row = int(threadIdx.x) / pieces;
  const int first_piece = int(threadIdx.x) - first_row * pieces;
  const int stages = ceil_div(rows, kStageRows);
  const auto load_stage = [&](int stage) {
    const uint32_t to = shared_address(shared) + stage % Kernel::kStages * Kernel::kStageBytes;
    const int left = rows - stage * kStageRows;
    const T* const from = input + int64_t(stage) * kStageRows * p.k;
    int row = first_row, piece = first_piece;
    while (row < kStageRows) {
      const bool inside = row < left;
      copy_async16(to + row * Kernel::kPitch + piece * 16,
                   from + (inside ? row * p.k + piece * 8 : 0), inside);
      row += row_step;
      piece += piece_step;
      if (piece >= pieces) {
        piece -= pieces;
        ++row;
      }
    }
  };
#pragma unroll
  for (int i = 0; i < Kernel::kStages - 1; ++i) {
    if (i < stages) load_stage(i);
    copy_async_commit();
  }

  // 3. The weights and the biases of this warp.
  const int first_channel = n0 + kValues * g;  // of this lane
  Weights weights[kSteps][kHigh];
#pragma unroll
  for (int j = 0; j < kHigh; ++j) {
    const int channel = first_channel + 2 * j;
    const T* const upper =
        after_wait(static_cast<const T*>(p.weight)) + int64_t(channel) * p.k + q * 8;
    const T* const lower = upper + p.k;
    const int upper_left = channel < p.n ? p.k - q * 8 : 0;
    const int lower_left = channel + 1 < p.n ? p.k - q * 8 : 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int k = step * kStepK;
      weights[step][j] = make_weights(load_piece<T, true>(upper + k, upper_left - k),
                                      load_piece<T, true>(lower + k, lower_left - k));
    }
  }
  float bias[kValues];
  load_bias<T>(p, first_channel, bias);

  // 4. Tile by tile: product, activation, sum; the mean where an image ends.
  T* output = static_cast<T*>(p.output) + first_image * p.n;
  float sum[kValues] = {};
  int begin = 0, end = p.pixels;  // rows of the image that is being summed
  for (int stage = 0; stage < stages; ++stage) {
    copy_async_wait<Kernel::kStages - 2>();
    __syncthreads();
    if (stage + Kernel::kStages - 1 < stages) load_stage(stage + Kernel::kStages - 1);
    copy_async_commit();
    if (n0 >= p.n) continue;
    const unsigned char* from =
        shared + stage % Kernel::kStages * Kernel::kStageBytes + g * Kernel::kPitch + q * 16;
#pragma unroll 1
    for (int row0 = stage * kStageRows; row0 < min((stage + 1) * kStageRows, rows);
         row0 += kTileRows, from += kTileRows * Kernel::kPitch) {
      const auto load = [&](int half, int step) {
        return *reinterpret_cast<const uint4*>(from + half * 8 * Kernel::kPitch + step * 64);
      };
      float acc[2][kHigh][4];  // [half]: pixels 8 * half + 2q + {0, 1} of channels g, then g + 8
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2 * kValues; ++i) acc[half][i / 4][i % 4] = bias[i / 2];
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint4 pixels[2] = {load(0, step), load(1, step)};
#pragma unroll
        for (int i = 0; i < 2 * kHigh; ++i) {
          mma<T>(acc[i % 2][i / 2], weights[step][i / 2].first, pixels[i % 2].x, pixels[i % 2].y);
        }
#pragma unroll
        for (int i = 0; i < 2 * kHigh; ++i) {
          mma<T>(acc[i % 2][i / 2], weights[step][i / 2].second, pixels[i % 2].z, pixels[i % 2].w);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2 * kValues; ++i) {
          acc[half][i / 4][i % 4] = apply(p.act, acc[half][i / 4][i % 4]);
        }
      }
      if (row0 + kTileRows < end) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
          const int j = i / 2, c = i % 2 * 2;
          sum[i] += (acc[0][j][c] + acc[0][j][c + 1]) + (acc[1][j][c] + acc[1][j][c + 1]);
        }
        continue;
      }
      // An image ends here, or several.
      while (true) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = row0 + half * 8 + 2 * q + e;
            const bool inside = row >= begin && row < end;
#pragma unroll
            for (int i = 0; i < kValues; ++i) {
              sum[i] += inside ? acc[half][i / 2][i % 2 * 2 + e] : 0.0f;
            }
          }
        }
        if (end > row0 + kTileRows) break;
        sum_lanes(sum, lane);
        const int channel = n0 + lane * kValues / 4;
        if (lane % (4 / kValues) == 0 && channel < p.n) {
          output[channel] = from_float<T>(sum[0] * s.scale);
        }
#pragma unroll
        for (int i = 0; i < kValues; ++i) sum[i] = 0.0f;
        output += p.n;
        begin = end;
        end += p.pixels;
        if (begin >= min(row0 + kTileRows, rows)) break;
      }
    }
  }
}

}  // namespace torch_mbv2::conv_pool_kernels

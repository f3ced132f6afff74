// resident_product (float16, bfloat16): conv_pool with the weights in registers, the input streams
// past them. The formula and the layout of the products stand in parts.cuh.
//
// A thread block owns a group of images and 16 * kHigh channels for each of its warps; a warp keeps
// its weights for all of k in registers, kSteps * kHigh * 8 of them a lane. The pixels of a group
// are one sequence of octets, cut into tiles of two: see pixel_order.h, which also says why the
// sums of an image do not depend on its place.
//
// Shared memory: kStages x { kStageRows rows of kPitch bytes }, a row a pixel; then float4
// remaining[kHigh][threads], what each lane has of the last shared octet. Rows are 64 bytes apart
// modulo 128, so that the 8 lanes of a quarter warp, 4 pieces of 2 rows, read all banks.
//
// Bound by the tensor cores; reading the input from shared memory takes two thirds of that time.
#pragma once

#include "conv_pool/parts.cuh"
#include "plan/pixel_order.h"

namespace torch_mbv2::conv_pool_kernels {

constexpr int kStageRows = 32;  // two tiles

// What a launch needs beyond ConvPoolParams.
struct GroupShape {
  int channel_groups;  // thread blocks that share a group of images
  int images;          // of a group
  float scale;         // 1 / pixels
  PixelOrder order;

  static constexpr std::array<size_t, 0> pointers() { return {}; }
};

template <int kSteps, int kHigh>
struct Resident {
  static constexpr int kChannels = 16 * kHigh;  // of a warp
  static constexpr int kStages = kSteps <= 10 ? 4 : 2;
  static constexpr int kPieces = 4 * kSteps;  // of 16 bytes of a row
  static constexpr int kPitch = 64 * (kSteps / 2 * 2 + 1);
  static constexpr int kStageBytes = kStageRows * kPitch;
  static constexpr int shared_bytes(int warps) {
    return kStages * kStageBytes + kHigh * 32 * warps * int(sizeof(float4));
  }
  static_assert(shared_bytes(kMostWarps) <= 99 * 1024,
                "what a thread block may have on sm_86, sm_89 and sm_120");
};

// Zeros behind the first `pieces` 16 bytes of every row.
template <typename Kernel>
__device__ __forceinline__ void clear_tails(unsigned char* shared, int pieces) {
  const int tail = Kernel::kPieces - pieces;
  if (tail <= 0) return;
  for (int i = threadIdx.x; i < Kernel::kStages * kStageRows * tail; i += blockDim.x) {
    const int row = i / tail;
    *reinterpret_cast<uint4*>(shared + row * Kernel::kPitch + (pieces + i - row * tail) * 16) =
        uint4{};
  }
}

// The weights of the 2 * kHigh channels of a lane from `first_channel` on.
template <typename T, int kSteps, int kHigh>
__device__ __forceinline__ void load_weights(const ConvPoolParams& p, int first_channel, int q,
                                             Weights (&weights)[kSteps][kHigh]) {
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
}

// A tile of two octets times the weights of a warp, and the activation. `from` is the lane's piece
// of the tile's first row in shared memory. acc[octet][j]: slots 2q and 2q + 1 for row g of the
// j-th product, then the same for row g + 8.
template <typename T, int kSteps, int kHigh>
__device__ __forceinline__ void make_tile(const unsigned char* from,
                                          const Weights (&weights)[kSteps][kHigh],
                                          const float (&bias)[2 * kHigh], const Clamp& act,
                                          float (&acc)[2][kHigh][4]) {
  const auto load = [&](int half, int step) {
    const int offset = half * kOctet * Resident<kSteps, kHigh>::kPitch + step * 64;
    return *reinterpret_cast<const uint4*>(from + offset);
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4 * kHigh; ++i) acc[half][i / 4][i % 4] = bias[i / 2];
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
    for (int i = 0; i < 4 * kHigh; ++i) {
      acc[half][i / 4][i % 4] = apply(act, acc[half][i / 4][i % 4]);
    }
  }
}

template <typename T, int kSteps, int kHigh>
__global__ void __launch_bounds__(32 * kMostWarps)
    resident_product(const __grid_constant__ ConvPoolParams p,
                     const __grid_constant__ GroupShape s) {
  using Kernel = Resident<kSteps, kHigh>;
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int kValues = 2 * kHigh;  // channels of a lane

  const int threads = blockDim.x, warps = threads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, q = lane % 4;
  const int group = blockIdx.x / s.channel_groups;
  const int channel_group = blockIdx.x - group * s.channel_groups;
  const int n0 = (channel_group * warps + warp) * Kernel::kChannels;
  const int64_t first_image = int64_t(group) * s.images;
  const int images = p.batch - first_image < s.images ? int(p.batch - first_image) : s.images;
  const int octets = s.order.total(images);
  const int pieces = p.k / 8;

  // 1. The zeros behind the last k of each row. No copy overwrites them.
  clear_tails<Kernel>(shared, pieces);

  wait_for_input();
  start_next();

  // 2. The copies ahead. As many threads as there are warps copy a row of a stage, the same row of
  // every stage: its pixel is looked for once a stage.
  const T* const input = static_cast<const T*>(p.input) + first_image * p.pixels * p.k;
  const int row = int(threadIdx.x) / warps, first_piece = int(threadIdx.x) - row * warps;
  const uint32_t row_address = shared_address(shared) + row * Kernel::kPitch + first_piece * 16;
  const int stages = ceil_div(octets, kStageRows / kOctet);
  OctetPosition next(s.order);  // of this thread's row in the next stage to copy
  next.advance(s.order, row / kOctet);
  const auto load_stage = [&](int stage) {
    const ImagePixel pixel = next.at(s.order, row % kOctet);
    const bool inside = pixel.image < images && pixel.pixel < p.pixels;
    const int at = inside ? pixel.image * p.pixels + pixel.pixel : 0;
    const T* from = input + int64_t(at) * p.k + first_piece * 8;
    uint32_t to = row_address + stage % Kernel::kStages * Kernel::kStageBytes;
    for (int piece = first_piece; piece < pieces; piece += warps) {
      copy_async16(to, from, inside);
      to += warps * 16;
      from += warps * 8;
    }
    next.advance(s.order, kStageRows / kOctet);
  };
#pragma unroll
  for (int i = 0; i < Kernel::kStages - 1; ++i) {
    if (i < stages) load_stage(i);
    copy_async_commit();
  }

  // 3. The weights and the biases of this warp.
  const int first_channel = n0 + kValues * g;  // of this lane
  Weights weights[kSteps][kHigh];
  load_weights<T>(p, first_channel, q, weights);
  float bias[kValues];
  load_bias<T>(p, first_channel, bias);

  // 4. Tile by tile: product, activation, sum; the mean where an image ends. These sums are what
  // pixel_order.h is about.
  const int output_channel = n0 + lane * kValues / 4;  // that this lane writes
  const bool writes = lane % (4 / kValues) == 0 && output_channel < p.n;
  T* output = static_cast<T*>(p.output) + first_image * p.n + output_channel;
  float4* const remaining =
      reinterpret_cast<float4*>(shared + Kernel::kStages * Kernel::kStageBytes) + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kHigh; ++j) remaining[j * threads] = float4{};
  float sum[kValues] = {};
  OctetPosition now(s.order);
  const auto add_octet = [&](const float(&acc)[kHigh][4]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) sum[i] += acc[i / 2][i % 2 * 2] + acc[i / 2][i % 2 * 2 + 1];
  };
  const auto finish_image = [&] {
    const bool first = s.order.holds(now.image, 2 * q);
    const bool second = s.order.holds(now.image, 2 * q + 1);
#pragma unroll
    for (int j = 0; j < kHigh; ++j) {
      const float4 acc = remaining[j * threads];
      sum[2 * j] += (first ? acc.x : 0.0f) + (second ? acc.y : 0.0f);
      sum[2 * j + 1] += (first ? acc.z : 0.0f) + (second ? acc.w : 0.0f);
    }
    sum_lanes(sum, lane);
    if (writes) *output = from_float<T>(sum[0] * s.scale);
#pragma unroll
    for (int i = 0; i < kValues; ++i) sum[i] = 0.0f;
    output += p.n;
  };
  for (int stage = 0; stage < stages; ++stage) {
    copy_async_wait<Kernel::kStages - 2>();
    __syncthreads();
    if (stage + Kernel::kStages - 1 < stages) load_stage(stage + Kernel::kStages - 1);
    copy_async_commit();
    if (n0 >= p.n) continue;
    const unsigned char* from =
        shared + stage % Kernel::kStages * Kernel::kStageBytes + g * Kernel::kPitch + q * 16;
#pragma unroll 1
    for (int tile = 0; tile < kStageRows / kTileRows && now.image < images;
         ++tile, from += kTileRows * Kernel::kPitch) {
      float acc[2][kHigh][4];
      make_tile<T>(from, weights, bias, p.act, acc);
      if (now.octet >= 0 && now.octet + 2 < s.order.octets) {  // the usual case
        add_octet(acc[0]);
        add_octet(acc[1]);
        now.octet += 2;
        continue;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (now.octet >= 0) {
          add_octet(acc[half]);
        } else {
#pragma unroll
          for (int j = 0; j < kHigh; ++j) {
            const float(&a)[4] = acc[half][j];
            remaining[j * threads] = make_float4(a[0], a[1], a[2], a[3]);
          }
        }
        // The image ends here, or several that have no octets of their own.
        for (++now.octet; now.at_end(s.order) && now.image < images; now.next_image(s.order)) {
          finish_image();
        }
      }
    }
  }
}

}  // namespace torch_mbv2::conv_pool_kernels

// conv_pool of kernels.h: a 1x1 convolution, its activation and the mean over the pixels in one
// kernel; the map between them exists only in registers.
//
//   output[n, c] = mean over pixels of clamp(sum_k input[n, pixel, k] * weight[c, k] + bias[c])
//
// input (batch, pixels, k), weight (n, k) and output (batch, n) are dense. Sums over k are float32.
// Sums over pixels are float32 for 16-bit types as long as they have few terms, else float64: a
// mean of thousands of pixels of either sign is small beside its terms. One rounding at the end.
//
// resident_product (16-bit): the weights stay in registers, the input streams past them. Bound by
// the tensor cores; reading the input from shared memory takes two thirds of that time.
// direct_product (16-bit): no staging at all, for few images, where latency is the time, and for
// what the other does not take. float_pool (float32): bound by FFMA.
//
// Tensor-core products of both 16-bit kernels are m16n8k16 with 16 channels as m and 8 pixels as n.
// With g = lane / 4 and q = lane % 4:
// - Of the 32 k of a step, lane q takes k 8q ... 8q + 7 of its rows, 16 bytes, as its operands of
//   two products. The order of k within a sum is free, if it is the same for both operands. The
//   pixels' operands are pairs of registers, so that a 16-byte load needs no moves.
// - Row g (g + 8) of the j-th product is channel 2 * kHigh * g + 2 * j (+ 1) of the warp's
//   16 * kHigh, so that after the sum over pixels neighbouring lanes hold neighbouring channels.
#include <algorithm>
#include <cmath>

#include "mma.cuh"

namespace torch_mbv2 {
namespace {

constexpr int kTileRows = 16;  // pixels of two products side by side
constexpr int kStepK = 32;     // of k in two products: 64 bytes, 16 for each lane of a row
constexpr int kMostWarps = 8;  // of a block

// What a launch needs beyond ConvPoolParams.
struct Shape {
  int channel_groups;  // blocks that share a group of images
  int images;          // of a group
  float scale;         // 1 / pixels
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

// ------------------------------------------------------------------------------ 16-bit: resident

constexpr int kStageRows = 32;     // two tiles
constexpr int kMostPixels = 4096;  // of an image: at most 1024 terms of a float32 sum in a lane

// A block owns a group of images and 16 * kHigh channels for each of its warps; a warp keeps its
// weights for all of k in registers, kSteps * kHigh * 8 of them a lane. The rows of a group (image
// after image, pixel after pixel) are one matrix, cut into tiles of 16 wherever that falls: a tile
// with rows of several images is added to one after the other.
//
// Shared memory: kStages x { kStageRows rows of kPitch bytes }. Rows are 64 bytes apart modulo
// 128, so that the 8 lanes of a quarter warp, 4 pieces of 2 rows, read all banks.
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
    resident_product(const __grid_constant__ ConvPoolParams p, const __grid_constant__ Shape s) {
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

// -------------------------------------------------------------------------------- 16-bit: direct

constexpr int kRun = 16;  // tiles summed in float32 before they join a sum in float64

// A block owns one image and 16 * kHigh channels, warp w of it the tiles w, w + warps and so on. It
// loads its operands straight into registers, those of kAhead steps at once; a row of the input is
// read once a block. Shared memory: float partial[kMostWarps][16 * kHigh], the means of the warps,
// added in order.
template <typename T, int kHigh, bool kVectors>
__global__ void __launch_bounds__(32 * kMostWarps, 1)
    direct_product(const __grid_constant__ ConvPoolParams p, const __grid_constant__ Shape s) {
  constexpr int kChannels = 16 * kHigh, kValues = 2 * kHigh;
  constexpr int kAhead = kVectors ? 10 / kHigh : 1;
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

// --------------------------------------------------------------------------------- float32: FFMA

// A block of 128 threads owns one image and 16 * kWide columns, and takes the pixels by tiles of 56
// (an image of 7x7 is 49). Thread (x, y) makes rows y, y + 8, ..., y + 48 of a tile and columns x,
// x + 16 and so on. Shared memory: kStages x { tile (56 rows), weights (16 * kWide rows) }, kK
// floats a row and 16 bytes of padding, which makes the 16-byte loads free of bank conflicts;
// afterwards double partial[8][16 * kWide], the sums of each y, added in order.
template <int kWide, bool kVectors>
__global__ void __launch_bounds__(128, 3)
    float_pool(const __grid_constant__ ConvPoolParams p, const __grid_constant__ Shape s) {
  constexpr int kThreads = 128, kAcross = 16, kDown = 8, kRows = 7, kStages = 3;
  constexpr int kTile = kDown * kRows, kColumns = kAcross * kWide;
  constexpr int kK = 16, kPitch = kK + 4;
  constexpr int kPieces = (kTile + kColumns) * kK / 4;
  __shared__ __align__(16) float shared[kStages][(kTile + kColumns) * kPitch];
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

// ---------------------------------------------------------------------------------------- launch

// What a 16-bit product runs on.
struct Plan {
  int steps;   // of resident_product; 0: direct_product
  int high;    // products below each other in a warp
  int warps;   // of a block
  int images;  // of a block
};

// The cheapest way, by a model of the clocks on one multiprocessor. Products take 6 clocks on each
// of its four schedulers, 9 in a warp that is alone there; L2 gives 48 bytes a clock to one
// multiprocessor, 28 to each of all, after 700 clocks; a piece of 8 rows takes 4 clocks in L1.
inline Plan choose_plan(int64_t batch, int pixels, int k, int n, bool vectors,
                        int multiprocessors) {
  const int steps = ceil_div(k, kStepK);
  const auto share = [&](double blocks) { return std::ceil(blocks / multiprocessors); };
  const auto read = [&](double blocks, double bytes) {
    return bytes * std::max(share(blocks) / 48, blocks / (28.0 * multiprocessors));
  };
  Plan best{};
  double best_clocks = 0;
  const auto consider = [&](const Plan& plan, double clocks) {
    if (best.warps == 0 || clocks < best_clocks) {
      best = plan;
      best_clocks = clocks;
    }
  };

  // 1. direct_product: what its blocks need together, or one after the other.
  const int tiles = std::max(1, (pixels - 1) / kTileRows + 1);
  for (const int high : {1, 2}) {
    if (high == 1 && !vectors) continue;
    const int warps = std::min(kMostWarps, tiles);
    const double blocks = double(batch) * ceil_div(n, 16 * high);
    const double products = 4.0 * high * steps;
    const double clocks = std::max(1.5 * products, 4.0 * steps * (2 + 2 * high)) * tiles;
    const double loads = 700.0 * ceil_div(steps, 10 / high);
    const double alone = ceil_div(tiles, warps) * (loads + 9 * products) + 600;
    const double waves = std::ceil(blocks / (multiprocessors * (kMostWarps / warps)));
    consider({0, high, warps, 1}, std::max({share(blocks) * clocks, waves * alone,
                                            read(blocks, 2.0 * k * (double(pixels) + 16 * high))}));
  }

  // 2. resident_product: its weights first, then its tiles. Images are shared evenly among as many
  // blocks as run at once, or some times as many.
  int compiled = 0;
  for (const int most : {20, 14, 10, 8, 5}) {
    if (steps <= most) compiled = most;
  }
  if (!vectors || k < 1 || pixels < 1 || pixels > kMostPixels || compiled == 0) return best;
  const int high = compiled <= 10 ? 2 : 1;
  const double products = 4.0 * high * compiled;
  for (const int warps : {kMostWarps, kMostWarps / 2}) {
    const int channel_groups = ceil_div(n, 16 * high * warps);
    const int64_t at_once = int64_t(multiprocessors) * (kMostWarps / warps);
    for (int waves = 1; waves <= 4; ++waves) {
      const int64_t groups = std::max<int64_t>(1, waves * at_once / channel_groups);
      const int64_t images = std::min((int64_t{1} << 30) / pixels, ceil_div(batch, groups));
      const double blocks = double(ceil_div(batch, images)) * channel_groups;
      const double rows = std::ceil(double(images) * pixels / kTileRows);
      const double together = share(blocks) * warps / 4 * rows * (6 * products + 60);
      const double alone = std::ceil(blocks / at_once) * rows * (9 * products + 150);
      consider({compiled, high, warps, int(images)},
               std::max(together, alone) + read(blocks, 32.0 * high * warps * k) + 1300);
    }
  }
  return best;
}

template <typename T, int kSteps, int kHigh>
cudaError_t launch_resident(const ConvPoolParams& p, const Plan& plan, cudaStream_t stream) {
  using Kernel = Resident<kSteps, kHigh>;
  const auto kernel = resident_product<T, kSteps, kHigh>;
  const Shape s = {ceil_div(p.n, Kernel::kChannels * plan.warps), plan.images,
                   1.0f / float(p.pixels)};
  const int64_t blocks = ceil_div(p.batch, int64_t(plan.images)) * s.channel_groups;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(kernel, unsigned(blocks), 32 * plan.warps, Kernel::kSharedBytes, stream, p,
                       s);
}

// A kernel whose blocks own one image and `channels` channels each.
template <typename T, typename Kernel>
cudaError_t launch_images(Kernel kernel, int channels, int threads, const ConvPoolParams& p,
                          cudaStream_t stream) {
  const Shape s = {ceil_div(p.n, channels), 1, 1.0f / float(p.pixels)};
  return for_each_chunk(p.batch, s.channel_groups, [&](int64_t first, int64_t images) {
    ConvPoolParams chunk = p;
    chunk.input = static_cast<const T*>(p.input) + first * p.pixels * p.k;
    chunk.output = static_cast<T*>(p.output) + first * p.n;
    return launch_kernel(kernel, unsigned(images * s.channel_groups), threads, 0, stream, chunk, s);
  });
}

template <typename T>
cudaError_t launch(const ConvPoolParams& p, bool vectors, cudaStream_t stream) {
  if constexpr (sizeof(T) == 4) {
    // Few images take narrow blocks, or most multiprocessors would have nothing to do.
    const bool wide = p.batch * ceil_div(p.n, 128) >= current_device().multiprocessors;
    if (!vectors) return launch_images<T>(float_pool<2, false>, 32, 128, p, stream);
    if (!wide) return launch_images<T>(float_pool<2, true>, 32, 128, p, stream);
    return launch_images<T>(float_pool<8, true>, 128, 128, p, stream);
  } else {
    const Plan plan =
        choose_plan(p.batch, p.pixels, p.k, p.n, vectors, current_device().multiprocessors);
    switch (plan.steps) {
      case 5:
        return launch_resident<T, 5, 2>(p, plan, stream);
      case 8:
        return launch_resident<T, 8, 2>(p, plan, stream);
      case 10:
        return launch_resident<T, 10, 2>(p, plan, stream);
      case 14:
        return launch_resident<T, 14, 1>(p, plan, stream);
      case 20:
        return launch_resident<T, 20, 1>(p, plan, stream);
    }
    const int channels = 16 * plan.high, threads = 32 * plan.warps;
    if (plan.high == 1) {
      return launch_images<T>(direct_product<T, 1, true>, channels, threads, p, stream);
    }
    return vectors ? launch_images<T>(direct_product<T, 2, true>, channels, threads, p, stream)
                   : launch_images<T>(direct_product<T, 2, false>, channels, threads, p, stream);
  }
}

}  // namespace

cudaError_t conv_pool(const ConvPoolParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  return dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = p.k % kVecSize<T> == 0 && is_aligned16(p.input) && is_aligned16(p.weight);
    return launch<T>(p, vectors, stream);
  });
}

}  // namespace torch_mbv2

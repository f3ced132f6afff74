// The depthwise convolution of a warp's own pixels, 16 expanded channels at a time, on the tensor
// cores: a product with diagonal matrices. Two taps of 8 channels are the 16 of k.
//
// That is 1/8 of their rate, but exact sums in float32 at the price of 6 instructions for 16 pixels
// x 8 channels, where FFMA takes 36 and 64 conversions (sums in float16, by HFMA2, were 10 % faster
// for a whole network but too inaccurate). The windows come by ldmatrix, a row is read once for all
// its taps, and the result is, after clamping and packing, the left operand of the projection.
#pragma once

#include "block/storage.cuh"
#include "device/mma.cuh"

namespace torch_mbv2::block {

// One column of the windows of a warp: matrices of 8 pixels x 8 channels, a row of the expanded map
// each, as left operands. A register pair holds the two rows that output rows g and g + 8 of a tile
// meet with one tap; two pairs are two taps.
template <typename Instance>
struct DepthwiseColumn {
  static constexpr int kRows = Instance::kRows, kStride = Instance::kStride;
  static constexpr int kQuads = kStride == 2 ? kRows : ceil_div(kRows + 2, 2);
  // Pair j is rows j and j + kApart of the window; quad i is pairs 2i and 2i + 1.
  static constexpr int kApart = kRows * kStride;
  // The three pairs of a single tile of stride 1 overlap: rows 0 1 | 2 3, of which 1 2 are a pair.
  static constexpr bool kOverlap = kStride == 1 && kRows == 1;
  uint32_t quads[kQuads][4];
  uint32_t last[2];  // stride 2: the pair behind the quads

  // The row of the window that a lane addresses in a load of four matrices.
  __device__ static int lane_row(int lane) {
    const int i = lane / 8;
    return kOverlap ? i : (i & 1) * kApart + i / 2;
  }

  // `at`: this lane's row of the first load.
  __device__ __forceinline__ void load(uint32_t at, uint32_t two_rows) {
#pragma unroll
    for (int i = 0; i < (kOverlap ? 1 : kQuads); ++i) load_matrices(quads[i], at + i * two_rows);
    if (kStride == 2) load_two_matrices(last[0], last[1], at + kRows * two_rows);
  }

  // c += this column of the windows of tile t, times the taps of its three rows.
  __device__ __forceinline__ void add(float (&c)[4], int t, const uint32_t (&taps)[3]) const {
    using T = typename Instance::T;
    const auto& quad = quads[(kStride == 2 ? 2 * t : t) / 2];  // of the first tap
    if constexpr (kOverlap) {
      mma<T>(c, quad, taps[0], taps[2]);
      mma_k8<T>(c, quad[1], quad[2], taps[1]);
    } else if (kStride == 1 && t % 2 == 1) {
      const auto& next = quads[t / 2 + 1];
      mma<T>(c, next, taps[1], taps[2]);
      mma_k8<T>(c, quad[2], quad[3], taps[0]);
    } else {
      const bool behind = kStride == 2 && t == kRows - 1;
      const auto& next = quads[behind ? 0 : (kStride == 2 ? t : t / 2) + 1];
      mma<T>(c, quad, taps[0], taps[1]);
      mma_k8<T>(c, behind ? last[0] : next[0], behind ? last[1] : next[1], taps[2]);
    }
  }
};

// What a lane reads of the expanded map: its windows, in the first 8 channels.
template <typename Instance>
struct Windows {
  uint32_t first;  // address of its row of the first load
  int row_bytes;   // of the expanded map
  int odd_bytes;   // where odd pixels start in a row, if they are apart

  __device__ __forceinline__ Windows(const BlockArgs& a, const SharedMemory& memory) {
    const WarpPlace<Instance> warp(a);
    const int halo_h = plan::halo_size(a.tile_h, Instance::kStride, Instance::kWindow);
    row_bytes = a.storage.row_pixels * Instance::kPitch;
    odd_bytes = Instance::kSplit ? a.storage.odd_pixels * Instance::kPitch : 0;
    first = memory.expanded +
            (warp.image * halo_h + warp.row * Instance::kStride +
             DepthwiseColumn<Instance>::lane_row(threadIdx.x % 32)) *
                row_bytes +
            (warp.column / Instance::kCols + threadIdx.x % 8) * Instance::kPitch;
  }
  // Offset of column k of the windows.
  __device__ __forceinline__ uint32_t column(int k) const {
    return Instance::kSplit ? (k & 1) * odd_bytes + (k >> 1) * Instance::kPitch
                            : k * Instance::kPitch;
  }
};

// The convolution of one chunk. Of the diagonal matrices, lane (g, q) holds rows 2q (low half) and
// 2q + 1 (high half) of column g, so of 4 lanes one holds taps, in the half that they are packed
// in, and three hold zeros. So that two units of 8 channels share the loads of their taps, the
// columns of the second are 2 channels off: its taps are in the lanes next to those of the first.
// (The weights of the projection are packed in that order.)
template <typename Instance>
struct Depthwise {
  using T = typename Instance::T;
  static constexpr int kRows = Instance::kRows, kCols = Instance::kCols;
  // Of a pair of units: [channel][4 taps] twice, then [channel][tap].
  static constexpr int kFourTaps = 2 * kUnitChannels * 16;

  const Windows<Instance>& windows;
  const PackedClamp<T>& clamp;
  const uint32_t (&ones)[2];  // of BiasOperand
  uint32_t weights;           // address, of the chunk
  int lane, turned;           // this lane, and the one whose part of the second unit it holds
  bool holds[2];              // taps of the first unit, of the second
  int tap_channel;            // of 16, if it holds taps

  __device__ __forceinline__ Depthwise(const Windows<Instance>& windows,
                                       const PackedClamp<T>& clamp, const uint32_t (&ones)[2],
                                       uint32_t weights, const Lane& me)
      : windows(windows), clamp(clamp), ones(ones), weights(weights), lane(me.lane) {
    turned = (lane + 8) % 32;
    holds[0] = me.q == me.g / 2;
    holds[1] = me.q == turned / 8;
    tap_channel = holds[1] ? 8 + turned / 4 : me.g;
  }

  // taps[column of the window][row] of the pair of units at an address.
  __device__ __forceinline__ void load_taps(uint32_t at, uint32_t (&taps)[3][3]) const {
    const uint4 w0 = load_shared16(at + tap_channel * 16);
    const uint4 w1 = load_shared16(at + kFourTaps + tap_channel * 16);
    taps[0][0] = w0.x, taps[0][1] = w0.y, taps[0][2] = w0.z;
    taps[1][0] = w0.w, taps[1][1] = w1.x, taps[1][2] = w1.y;
    taps[2][0] = w1.z, taps[2][1] = w1.w;
    taps[2][2] = load_shared4(at + 2 * kFourTaps + tap_channel * 4);
  }

  // One unit: `d` becomes the left operands of the projection, [tile][row g, row g + 8 of unit h].
  __device__ __forceinline__ void convolve_unit(int h, uint32_t taps_at, uint32_t window,
                                                const uint32_t (&pair_taps)[3][3],
                                                uint32_t (&d)[Instance::kOutTiles][4]) const {
    const uint32_t bias = load_shared4(taps_at + Instance::kSizes.depthwise_bias +
                                       h * kFragmentBytes + (h == 0 ? lane : turned) * 4);
    float v[kCols][kRows][4];
#pragma unroll
    for (int k = 0; k < Instance::kInCols; ++k) {
      DepthwiseColumn<Instance> column;
      column.load(window + h * kUnitBytes + windows.column(k), 2 * windows.row_bytes);
#pragma unroll
      for (int x = 0; x < kCols; ++x) {
        const int j = k - Instance::kStride * x;  // column of the window
        if (j < 0 || j >= Instance::kWindow) continue;
        const uint32_t taps[3] = {holds[h] ? pair_taps[j][0] : 0u, holds[h] ? pair_taps[j][1] : 0u,
                                  holds[h] ? pair_taps[j][2] : 0u};
#pragma unroll
        for (int y = 0; y < kRows; ++y) {
          if (j == 0) mma_bias<T>(v[x][y], ones, bias);
          column.add(v[x][y], y, taps);
          if (j == Instance::kWindow - 1) {
            d[x * kRows + y][2 * h] = clamp(v[x][y][0], v[x][y][1]);
            d[x * kRows + y][2 * h + 1] = clamp(v[x][y][2], v[x][y][3]);
          }
        }
      }
    }
  }

  // The s-th 16 channels of the chunk, whose first window is at address `window`.
  __device__ __forceinline__ void convolve(int s, uint32_t window,
                                           uint32_t (&d)[Instance::kOutTiles][4]) const {
    const uint32_t taps_at =
        weights + Instance::kSizes.depthwise + s * Instance::kSizes.depthwise_pair;
    uint32_t taps[3][3];
    load_taps(taps_at, taps);
#pragma unroll
    for (int h = 0; h < 2; ++h) convolve_unit(h, taps_at, window, taps, d);
  }
};

}  // namespace torch_mbv2::block

// The output of a tile: written as it is or, in a cluster, after adding up the partial sums of its
// thread blocks.
#pragma once

#include <type_traits>

#include "block/project.cuh"
#include "device/cluster.cuh"
#include "device/vector.cuh"

namespace torch_mbv2::block {

// Writes this lane's sums. Of 4, 2 and 1 tiles of 8 channels a lane has 8, 4 and 2 consecutive
// channels.
template <typename Instance>
struct OutputWriter {
  using T = typename Instance::T;
  static constexpr int kTiles = Instance::kTiles, kRows = Instance::kRows;
  static_assert(kTiles < 4 || kTiles % 4 == 0);
  const BlockArgs& a;
  const SharedMemory& memory;
  BlockPlace here;
  WarpPlace<Instance> warp_here;
  Lane me;
  int channel0, oy0, ox0;
  int64_t image;
  T* output;

  __device__ __forceinline__ OutputWriter(const BlockArgs& a, const SharedMemory& memory)
      : a(a), memory(memory), here(find_place<Instance>(a)), warp_here(a) {
    channel0 = blockIdx.y * kTiles * kUnitChannels;
    image = here.image0 + warp_here.image;
    oy0 = here.tile_y * a.tile_h + warp_here.row;
    ox0 = here.tile_x * a.tile_w + warp_here.column + me.g * Instance::kCols;
    output = static_cast<T*>(a.output) + image * a.out_h * int64_t(a.out_w) * a.out_channels;
  }

  // Adds the input's channels at the place of output pixel (oy, ox), element `at` of the image.
  template <int kSize>
  __device__ __forceinline__ void add_residual(float (&v)[kSize], int oy, int ox, int channel,
                                               int at) const {
    float r[kSize];
    if (a.storage.source_units > 0) {
      const int width = row_of_source<Instance>(here.x1 - here.x0);
      const int m = (warp_here.image * (here.y1 - here.y0) + oy - here.y0) * width + ox - here.x0;
      const unsigned char* const pixel =
          memory.start() + plan::BlockStorage::kSource + m * memory.source_pixel;
      load_floats<T, kSize>(reinterpret_cast<const T*>(pixel) + channel, r);
    } else {
      load_floats<T, kSize>(
          static_cast<const T*>(a.input) + image * a.height * int64_t(a.width) * a.in_channels + at,
          r);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) v[i] += r[i];
  }

  // The channels of kGroup tiles from tile j on, of the pixel in column x and row (y, half) of the
  // warp; value(i, k) is the k-th of two of the i-th tile.
  template <int kGroup, typename Value>
  __device__ __forceinline__ void write_tiles(int x, int y, int half, int j,
                                              const Value& value) const {
    const int oy = oy0 + output_row<kRows>(y, half), ox = ox0 + x;
    const int channel = channel0 + j * kUnitChannels + me.q * 2 * kGroup;
    if (warp_here.image >= here.images || oy >= a.out_h || ox >= a.out_w ||
        channel >= a.out_channels) {
      return;
    }
    float v[2 * kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      v[2 * i] = value(i, 0);
      v[2 * i + 1] = value(i, 1);
    }
    const int at = (oy * a.out_w + ox) * a.out_channels + channel;
    if (Instance::kStride == 1 && !Instance::kImage && a.residual) {
      add_residual(v, oy, ox, channel, at);
    }
    store_floats<T, 2 * kGroup>(output + at, v);
  }

  // The same of the tiles from j on, at most 4.
  template <typename Value>
  __device__ __forceinline__ void write_group(int x, int y, int half, int j,
                                              const Value& value) const {
    if constexpr (kTiles >= 4) {
      write_tiles<4>(x, y, half, j, value);
    } else {
      if constexpr (kTiles >= 2) write_tiles<2>(x, y, half, 0, value);
      if constexpr (kTiles % 2 == 1) {
        write_tiles<1>(x, y, half, kTiles - 1, [&](int, int k) { return value(kTiles - 1, k); });
      }
    }
  }
};

// Without a cluster: writes all sums.
template <typename Instance>
__device__ __forceinline__ void write_sums(const OutputWriter<Instance>& writer,
                                           const Projection<Instance>& projection) {
  constexpr int kRows = Instance::kRows;
#pragma unroll
  for (int x = 0; x < Instance::kCols; ++x) {
#pragma unroll
    for (int y = 0; y < kRows; ++y) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < Instance::kTiles; j += 4) {
          writer.write_group(x, y, half, j, [&](int i, int k) {
            return projection.sums[x * kRows + y][j + i][2 * half + k];
          });
        }
      }
    }
  }
}

// A cluster's thread blocks have the sums of a share of the expanded channels each, of the same
// output. They lay them down as [warp][tile of pixels][tile of channels][lane]; then each adds up
// and writes every splits-th group of at most 4 tiles.
template <typename Instance>
struct ClusterSum {
  static constexpr int kTiles = Instance::kTiles, kOutTiles = Instance::kOutTiles;
  static constexpr int kGroup = kTiles < 4 ? kTiles : 4;       // tiles of channels
  static constexpr int kGroups = kOutTiles * kTiles / kGroup;  // of a warp
  static constexpr int kTileBytes = 32 * int(sizeof(float4));
  const SharedMemory& memory;
  int warp, lane;

  __device__ __forceinline__ void store(const Projection<Instance>& projection) const {
    float4* const mine = reinterpret_cast<float4*>(memory.start() + memory.map.partial_sums);
#pragma unroll
    for (int t = 0; t < kOutTiles; ++t) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float(&sums)[4] = projection.sums[t][j];
        mine[((warp * kOutTiles + t) * kTiles + j) * 32 + lane] =
            make_float4(sums[0], sums[1], sums[2], sums[3]);
      }
    }
  }

  // The total of a group over the cluster: the own sums, then those of the next thread blocks, so
  // that not all read the same one's at a time.
  __device__ __forceinline__ void add_up(int group, int rank, int splits,
                                         float (&sum)[kGroup][4]) const {
    const uint32_t partial = memory.base + memory.map.partial_sums +
                             ((warp * kGroups + group) * kGroup * 32 + lane) * 16;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const uint4 v = load_shared16(partial + j * kTileBytes);
      sum[j][0] = __uint_as_float(v.x);
      sum[j][1] = __uint_as_float(v.y);
      sum[j][2] = __uint_as_float(v.z);
      sum[j][3] = __uint_as_float(v.w);
    }
#pragma unroll 4
    for (int r = 1; r < splits; ++r) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const float4 v = load_cluster(partial + j * kTileBytes, (rank + r) & (splits - 1));
        sum[j][0] += v.x;
        sum[j][1] += v.y;
        sum[j][2] += v.z;
        sum[j][3] += v.w;
      }
    }
  }
};

// With a cluster: lays down the sums, adds up and writes this thread block's groups.
template <typename Instance>
__device__ __forceinline__ void sum_cluster(const BlockArgs& a, const SharedMemory& memory,
                                            const OutputWriter<Instance>& writer,
                                            const Projection<Instance>& projection) {
  using Sum = ClusterSum<Instance>;
  constexpr int kRows = Instance::kRows;
  const BlockPlace& here = writer.here;
  const ClusterSum<Instance> cluster = {memory, writer.me.warp, writer.me.lane};
  __syncthreads();  // nobody reads the last chunk any more, which the sums overwrite
  cluster.store(projection);
  cluster_arrive();
  cluster_wait();
  // The order of a sum depends on which thread block adds it up. Groups are dealt by the number of
  // a warp within its image, so that equal images get equal sums wherever they are in the batch.
  const int first = (here.rank - writer.warp_here.number * Sum::kGroups) & (a.splits - 1);
#pragma unroll 1
  for (int group = first; group < Sum::kGroups; group += a.splits) {
    const int t = group * Sum::kGroup / Instance::kTiles;
    const int j0 = group * Sum::kGroup % Instance::kTiles;
    const int x = t / kRows, y = t % kRows;
    // Of a pixel outside the output not even the sums are read.
    if (writer.warp_here.image >= here.images || writer.ox0 + x >= a.out_w ||
        writer.oy0 + output_row<kRows>(y, 0) >= a.out_h) {
      continue;
    }
    float sum[Sum::kGroup][4];
    cluster.add_up(group, here.rank, a.splits, sum);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      writer.write_group(x, y, half, j0, [&](int i, int k) { return sum[i][2 * half + k]; });
    }
  }
  cluster_arrive_relaxed();
  cluster_wait();  // no thread block leaves while others read its sums
}

}  // namespace torch_mbv2::block

// What an instance of the block kernel is compiled for, and where its thread blocks, warps and
// lanes work. Coordinates are computed anew at each use (see block_index of memory.cuh): the kernel
// would keep more of what follows from them than there are registers.
#pragma once

#include "block/launch.h"
#include "device/element.cuh"
#include "device/memory.cuh"

namespace torch_mbv2::block {

using plan::kFragmentBytes;
using plan::kUnitBytes;
using plan::kUnitChannels;
constexpr int kAddressBytes = plan::BlockStorage::kAddressBytes;

// What follows from an element type and a kernel's entry in kBlockKernels.
template <typename ElementType, int kIndex>
struct BlockInstance {
  using T = ElementType;
  static constexpr plan::BlockKernel kKernel = plan::kBlockKernels[kIndex];
  static constexpr int kStride = kKernel.stride, kTiles = kKernel.tiles;
  static constexpr int kWindow = kKernel.window;
  static constexpr int kRows = kKernel.rows, kCols = kKernel.cols, kChunk = kKernel.chunk;
  static constexpr int kPixelTiles = kKernel.pixel_tiles;
  static constexpr bool kImage = kKernel.image, kResident = kKernel.resident;
  static constexpr bool kPipelined = kKernel.pipelined;
  static constexpr int kMaxThreads = 32 * kKernel.warps;
  static constexpr int kMinBlocks = kKernel.min_blocks;
  // Bytes of an element, and of a pixel of the expanded map in shared memory.
  static constexpr int kBytes = Element<T>::kBytes;
  static constexpr int kPitch = plan::expanded_pixel_bytes(kChunk, kBytes);
  static constexpr int kPairs = kChunk / 16;  // pairs of units of 8 expanded channels
  static constexpr int kPairBytes = 2 * kUnitBytes;
  static constexpr int kInCols = plan::halo_size(kCols, kStride, kWindow);  // that a lane reads
  // Whether a row of the expanded map holds its even pixels first.
  static constexpr bool kSplit = plan::splits_columns(kKernel);
  static constexpr int kOutTiles = kRows * kCols;  // of 16 pixels, of a warp
  static constexpr plan::PackedSizes kSizes = plan::packed_sizes(kChunk, kTiles, kImage);
  static_assert(kChunk % 16 == 0 && (kPitch / kUnitBytes) % 2 == 1);
  static_assert(kUnitChannels * kBytes == kUnitBytes);
  static_assert(kWindow == 3, "the depthwise products are written for 3x3 windows");
  static_assert(!kImage || (kResident && kStride == 1));
  static_assert(kPixelTiles == 1 || !kResident);
  static_assert(kStride * kCols <= 2);
};

// The row of output of a warp that tile t has in its rows g (half 0) and g + 8 (half 1). Rows are
// paired so that what the windows of a pair read are whole operands, without copies.
template <int kRows>
__device__ __forceinline__ constexpr int output_row(int t, int half) {
  return t + half * kRows;
}

// Where a thread block's tile lies: its rank in the cluster, its images, its position among the
// tiles, and in coordinates of the expanded map, where it starts, (top, left), and the part of it
// inside the map, [y0, y1) x [x0, x1).
struct BlockPlace {
  int rank, images, tile_y, tile_x, top, left, y0, y1, x0, x1;
  int64_t image0;
};

template <typename Instance>
__device__ __forceinline__ BlockPlace find_place(const BlockArgs& a) {
  constexpr int kStride = Instance::kStride;
  BlockPlace p;
  uint32_t block = block_index();
  p.rank = block & (a.splits - 1);
  block >>= a.split_bits;
  uint32_t tile_x, tile_y;
  block = a.tiles_x.divide(block, tile_x);
  const uint32_t group = a.tiles_y.divide(block, tile_y);
  p.tile_y = tile_y;
  p.tile_x = tile_x;
  p.image0 = int64_t(group) * a.images;
  p.images = int(a.batch - p.image0 < a.images ? a.batch - p.image0 : a.images);
  const int halo_h = plan::halo_size(a.tile_h, kStride, Instance::kWindow);
  const int halo_w = plan::halo_size(a.tile_w, kStride, Instance::kWindow);
  p.top = p.tile_y * a.tile_h * kStride - a.pad_top;
  p.left = p.tile_x * a.tile_w * kStride - a.pad_left;
  p.y0 = max(p.top, 0);
  p.y1 = max(min(p.top + halo_h, a.e_h), p.y0);
  p.x0 = max(p.left, 0);
  p.x1 = max(min(p.left + halo_w, a.e_w), p.x0);
  return p;
}

// Pixels of a row of the source of `width`: where the expanded map has its even pixels first, one
// more if they are odd, so that the two pixels of a phase of a store are always an even one and the
// next.
template <typename Instance>
__device__ __forceinline__ int row_of_source(int width) {
  return Instance::kSplit ? width + (width & 1) : width;
}

// The chunks of this thread block: `count` from `first` on. The first thread blocks of a cluster
// take those that do not divide evenly.
struct ChunkRange {
  int rank, first, count;

  __device__ explicit ChunkRange(const BlockArgs& a) {
    rank = block_index() & (a.splits - 1);
    first = rank * a.chunks + min(rank, a.more_chunks);
    count = a.chunks + (rank < a.more_chunks ? 1 : 0);
  }
};

// This thread's warp, its lane in it, and that as row g and column pair q of a tile.
struct Lane {
  int warp, lane, g, q;

  __device__ Lane() {
    const uint32_t thread = thread_index();
    warp = thread / 32;
    lane = thread % 32;
    g = thread % 32 / 4;
    q = thread % 4;
  }
};

// Which pixels of its thread block's tile a warp makes: an image, and the first row and column; and
// the warp's number among those of its image.
template <typename Instance>
struct WarpPlace {
  int image, row, column, number;

  __device__ explicit WarpPlace(const BlockArgs& a) {
    uint32_t x, y;
    image = a.warps_y.divide(a.warps_x.divide(thread_index() / 32, x), y);
    row = y * 2 * Instance::kRows;
    column = x * 8 * Instance::kCols;
    number = y * a.warps_x.divisor + x;
  }
};

// The packed weights of this thread block's slice of output channels.
__device__ __forceinline__ const unsigned char* slice_weights(const BlockArgs& a) {
  return static_cast<const unsigned char*>(a.packed) + block_index_y() * a.slice_bytes;
}

}  // namespace torch_mbv2::block

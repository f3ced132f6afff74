// A whole inverted residual (Sandler et al. 2018) in one kernel:
//
//   e[y, x, :]   = clamp(expand_weight . source[y, x, :] + expand_bias)     inside the map, else 0
//   d[y, x, c]   = clamp(depthwise_bias[c] + sum over i, j < 3 of depthwise_weight[c, i, j]
//                        * e[y * stride - pad_top + i, x * stride - pad_left + j, c])
//   out[y, x, :] = project_weight . d[y, x, :] + project_bias [+ input[y, x, :]]
//
// The expanded map e lives in shared memory, kChunk channels at a time, and d in registers only.
// The source is the input (1x1 expansion), or the 3x3 windows of stride 2 of an image (the stem of
// the network), or e is the input itself (no expansion).
//
// Layouts: input and output NHWC, dense; the image has any strides; weights as pack of packing.py
// lays them out (see PackedSizes).
//
// Ownership. A block owns `images` images' tile of tile_h x tile_w output pixels, all channels of a
// slice of at most 320 output channels, and, of `splits` blocks of a cluster, its share of the
// chunks. A warp owns kCols octets (8 pixels of one row) times 2 * kRows rows of the tile: pairs of
// rows of an octet are the 16 rows of a tensor-core tile, so the projection of kRows * kCols tiles
// accumulates in its registers over all chunks.
//
// Each chunk: (1) all warps share the expansion of the tile with its halo, 16 pixels at a time;
// (2) every warp convolves its own pixels depthwise and projects them. The depthwise convolution
// runs on the tensor cores as well, as a product with diagonal matrices: two taps of 8 channels
// are the 16 of k. That is 1/8 of their rate, but exact sums in float32 at the price of 6
// instructions for 16 pixels x 8 channels, where FFMA takes 36 and 64 conversions (sums in float16,
// by HFMA2, make the whole network 10 % faster but too inaccurate); the windows come by ldmatrix, a
// row is read once for all its taps, and the result is, after clamping and packing, the A operand
// of the projection.
//
// Shared memory, in this order: the source of the tile with its halo (for the expansion and the
// residual); weights of two chunks, or of one where there is no room; e (a pixel is kChunk * 2 + 16
// bytes, an odd number of 16-byte units, so that ldmatrix finds 8 neighbours in different banks;
// where a lane makes pixels of every second column, a row holds its even pixels first, then the odd
// ones); where each pixel of the source goes in e. At the end the partial sums of a cluster's
// blocks overlay all but the source.
//
// Bound: tensor cores and shared-memory bandwidth at about equal parts; device memory only sees
// input, output and the weights (from L2).
#pragma once

#include <atomic>
#include <utility>

#include "block_launch.h"
#include "mma.cuh"

namespace torch_mbv2 {

// As load_matrices of mma.cuh, but two 8x8 matrices, whose rows lanes 0 to 15 address.
__device__ __forceinline__ void load_two_matrices(uint32_t& r0, uint32_t& r1, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r0), "=r"(r1)
               : "r"(address));
}

// c (16x8) += a (16x8) * b (8x8); the fragments are the lower halves of mma's.
template <typename T>
__device__ __forceinline__ void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  }
}

// The bias as a product: 8 of k of which the first two are 1 in every pixel, times the rounded
// biases and what rounding lost of them; c = it.
template <typename T>
__device__ __forceinline__ void mma_bias(float (&c)[4], const uint32_t (&one)[2], uint32_t bias) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%7, %7, %7, %7};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(one[0]), "r"(one[1]), "r"(bias), "f"(0.0f));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%7, %7, %7, %7};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(one[0]), "r"(one[1]), "r"(bias), "f"(0.0f));
  }
}

// As copy_async16, but through L1: for pieces that share 32-byte sectors.
__device__ __forceinline__ void copy_async16_cached(uint32_t to, const void* from, bool inside) {
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}
__device__ __forceinline__ uint2 load_shared8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ uint32_t load_shared4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
__device__ __forceinline__ void store_shared4(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void load_floats4(float (&v)[4], uint32_t address) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(address));
}
__device__ __forceinline__ void store_shared16(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}
__device__ __forceinline__ void store_shared8(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

// An address of which the compiler does not know where it comes from, so that it adds offsets to it
// instead of computing it anew for each access.
__device__ __forceinline__ uint64_t opaque_address(const void* p) {
  uint64_t address;
  asm volatile("mov.u64 %0, %1;" : "=l"(address) : "l"(p));
  return address;
}

// Element `offset` of an array in device memory that nobody writes, or 0.
template <typename T>
__device__ __forceinline__ T load_element(uint64_t base, int offset, bool valid) {
  T value;
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm("{\n.reg .pred p;\n.reg .u64 at;\nsetp.ne.u32 p, %3, 0;\nmad.wide.s32 at, %2, 4, %1;\n"
        "mov.u32 %0, 0;\n@p ld.global.nc.u32 %0, [at];\n}"
        : "=r"(bits)
        : "l"(base), "r"(offset), "r"(int(valid)));
    memcpy(&value, &bits, 4);
  } else {
    uint16_t bits;
    asm("{\n.reg .pred p;\n.reg .u64 at;\nsetp.ne.u32 p, %3, 0;\nmad.wide.s32 at, %2, 2, %1;\n"
        "mov.u16 %0, 0;\n@p ld.global.nc.u16 %0, [at];\n}"
        : "=h"(bits)
        : "l"(base), "r"(offset), "r"(int(valid)));
    memcpy(&value, &bits, 2);
  }
  return value;
}

template <typename T>
struct PairOf;
template <>
struct PairOf<__half> {
  using type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

// max(0, min(x, hi)) on packed pairs: rounding keeps order, so clamping the rounded value between
// the rounded bounds is rounding the clamped one.
template <typename T>
struct PackedClamp {
  using Pair = typename PairOf<T>::type;
  Pair hi;

  __device__ explicit PackedClamp(const Clamp& act) { hi.x = hi.y = from_float<T>(act.hi); }

  __device__ __forceinline__ uint32_t operator()(float a, float b) const {
    uint32_t word;
    if constexpr (std::is_same_v<T, __half>) {
      asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
    } else {
      asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
    }
    Pair pair;
    memcpy(&pair, &word, 4);
    pair = __hmin2_nan(pair, hi);
    memcpy(&word, &pair, 4);
    return word;
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ float4 load_cluster(uint32_t address, int rank) {
  uint32_t remote;
  float4 v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(remote));
  return v;
}
// The kernel before this one in the stream has finished, and what it wrote is there.
__device__ __forceinline__ void wait_for_input() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// The next kernel in the stream may start, up to its wait_for_input.
__device__ __forceinline__ void start_next() { asm volatile("griddepcontrol.launch_dependents;"); }
#else  // never launched with splits or before the kernel before it has finished there
__device__ __forceinline__ void wait_for_input() {}
__device__ __forceinline__ void start_next() {}
__device__ __forceinline__ void cluster_sync() {}
__device__ __forceinline__ float4 load_cluster(uint32_t, int) { return {}; }
#endif

// What follows from a kernel's entry in kBlockKernels.
template <int kIndex>
struct BlockShape {
  static constexpr BlockKernel kKernel = kBlockKernels[kIndex];
  static constexpr int kStride = kKernel.stride, kTiles = kKernel.tiles;
  static constexpr int kRows = kKernel.rows, kCols = kKernel.cols, kChunk = kKernel.chunk;
  static constexpr int kPixelTiles = kKernel.pixel_tiles;
  static constexpr bool kImage = kKernel.image, kResident = kKernel.resident;
  static constexpr int kMaxThreads = 32 * kKernel.warps;
  static constexpr int kMinBlocks = kKernel.min_blocks;
  static constexpr int kPitch = kChunk * 2 + 16;             // bytes of a pixel of e
  static constexpr int kPairs = kChunk / 16;                 // pairs of 8 expanded channels
  static constexpr int kInCols = kStride * (kCols - 1) + 3;  // that a lane reads
  // Whether a row of e holds its even pixels first, so that 8 lanes find 8 neighbours.
  static constexpr bool kSplit = kStride * kCols > 1;
  static constexpr int kOutTiles = kRows * kCols;  // of 16 pixels, of a warp
  static_assert(kChunk % 16 == 0 && (kPitch / 16) % 2 == 1);
  static_assert(!kImage || (kResident && kStride == 1));
  static_assert(kPixelTiles == 1 || !kResident);
  static_assert(kStride * kCols <= 2);
};

// Row i of a group of rows of output that tile t of a warp has in its rows g (half 0) and g + 8
// (half 1). Rows are paired so that what the windows of a pair read are whole operands, without
// copies.
template <int kRows>
__device__ __forceinline__ constexpr int output_row(int t, int half) {
  return kRows == 1 ? half : t / 2 * 4 + t % 2 + 2 * half;
}

// One column of the windows of a warp: matrices of 8 pixels x 8 channels, a row of e each, as left
// operands. A register pair holds the two rows that output rows g and g + 8 of a tile meet with one
// tap; two pairs are two taps.
template <typename Shape>
struct DepthwiseColumn {
  static constexpr int kRows = Shape::kRows, kStride = Shape::kStride;
  static constexpr int kGroups = kRows == 1 ? 1 : kRows / 2;  // of 4 rows of output
  uint32_t quads[kGroups][2][4];
  uint32_t pair[kGroups][2];

  // The row of e, from a group's first, that a lane addresses in a load of four matrices.
  __device__ static int lane_row(int lane) {
    const int i = lane / 8;
    if (kStride == 1 && kRows == 1) return i;
    const int apart = kRows == 1 ? 2 : 2 * kStride;  // the rows of a pair
    return (i & 1) * apart + i / 2;
  }

  // `at`: this lane's row of the first load.
  __device__ __forceinline__ void load(uint32_t at, int row_bytes) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint32_t from = at + i * 4 * kStride * row_bytes;
      load_matrices(quads[i][0], from);
      if (kRows > 1) load_matrices(quads[i][1], from + 2 * row_bytes);
      if (kStride == 2) {
        load_two_matrices(pair[i][0], pair[i][1], from + (kRows == 1 ? 2 : 4) * row_bytes);
      }
    }
  }

  // c += this column of the windows of tile t, times the taps of its three rows.
  template <typename T>
  __device__ __forceinline__ void add(float (&c)[4], int t, const uint32_t (&taps)[3]) const {
    const auto& q0 = quads[t / 2][0];
    const auto& q1 = quads[t / 2][1];
    const auto& p = pair[t / 2];
    if constexpr (kStride == 1 && kRows == 1) {
      mma<T>(c, q0, taps[0], taps[2]);  // rows 0 1 | 2 3
      mma_k8<T>(c, q0[1], q0[2], taps[1]);
    } else if constexpr (kStride == 1) {
      if (t % 2 == 0) {
        mma<T>(c, q0, taps[0], taps[1]);  // rows 0 2 | 1 3
        mma_k8<T>(c, q1[0], q1[1], taps[2]);
      } else {
        mma<T>(c, q1, taps[1], taps[2]);  // rows 2 4 | 3 5
        mma_k8<T>(c, q0[2], q0[3], taps[0]);
      }
    } else if constexpr (kRows == 1) {
      mma<T>(c, q0, taps[0], taps[1]);    // rows 0 2 | 1 3
      mma_k8<T>(c, p[0], p[1], taps[2]);  // rows 2 4
    } else {
      mma<T>(c, t % 2 == 0 ? q0 : q1, taps[0], taps[1]);  // rows 0 4 | 1 5 and 2 6 | 3 7
      if (t % 2 == 0) {
        mma_k8<T>(c, q1[0], q1[1], taps[2]);
      } else {
        mma_k8<T>(c, p[0], p[1], taps[2]);  // rows 4 8
      }
    }
  }
};

// Where a block's tile lies: its rank in the cluster, its images, its position among the tiles, and
// in coordinates of e, where it starts, (top, left), and the part of it inside the map,
// [y0, y1) x [x0, x1).
struct BlockPlace {
  int rank, images, tile_y, tile_x, top, left, y0, y1, x0, x1;
  int64_t image0;
};

// Opaque to the compiler, so that a second call computes it anew instead of keeping a dozen
// registers for it.
__device__ __forceinline__ BlockPlace find_place(const BlockArgs& a, int stride) {
  BlockPlace p;
  uint32_t block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  p.rank = block & (a.splits - 1);
  block >>= a.split_bits;
  uint32_t tile_x, tile_y;
  block = a.tiles_x.divide(block, tile_x);
  const uint32_t group = a.tiles_y.divide(block, tile_y);
  p.tile_y = tile_y;
  p.tile_x = tile_x;
  p.image0 = int64_t(group) * a.images;
  p.images = int(a.batch - p.image0 < a.images ? a.batch - p.image0 : a.images);
  const int eh = (a.tile_h - 1) * stride + 3, ew = (a.tile_w - 1) * stride + 3;
  p.top = p.tile_y * a.tile_h * stride - a.pad_top;
  p.left = p.tile_x * a.tile_w * stride - a.pad_left;
  p.y0 = max(p.top, 0);
  p.y1 = max(min(p.top + eh, a.e_h), p.y0);
  p.x0 = max(p.left, 0);
  p.x1 = max(min(p.left + ew, a.e_w), p.x0);
  return p;
}

// The chunks [first, last) of this block: the first blocks of a cluster take those that do not
// divide evenly. Opaque as find_place.
struct ChunkRange {
  int rank, first, last;

  __device__ explicit ChunkRange(const BlockArgs& a) {
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(rank));
    rank &= a.splits - 1;
    first = rank * a.chunks + min(rank, a.more_chunks);
    last = first + a.chunks + (rank < a.more_chunks ? 1 : 0);
  }
};

// This thread's warp, its lane in it, and that as row g and column pair q of a tile. Opaque as
// find_place.
struct Lane {
  int warp, lane, g, q;

  __device__ Lane() {
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    warp = thread / 32;
    lane = thread % 32;
    g = thread % 32 / 4;
    q = thread % 4;
  }
};

// The packed weights of this block's slice of output channels. Opaque as find_place.
__device__ __forceinline__ const unsigned char* slice_weights(const BlockArgs& a) {
  uint32_t slice;
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(slice));
  return static_cast<const unsigned char*>(a.packed) + slice * a.slice_bytes;
}

// Which pixels of its block's tile a warp makes: an image, and the first row and column. Opaque as
// find_place.
struct WarpPlace {
  int image, row, column;

  __device__ WarpPlace(const BlockArgs& a, int rows, int columns) {
    uint32_t thread, x, y;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    image = a.warps_y.divide(a.warps_x.divide(thread / 32, x), y);
    row = y * rows;
    column = x * columns;
  }
};

// Stores 4 or 2 n tiles of the expansion, clamped and packed: rows g and g + 8 go to two pixels.
// The columns of tiles are such that a lane has 8 (of 4 tiles) or 4 (of 2) consecutive channels.
template <typename T>
__device__ __forceinline__ void store_expanded(const PackedClamp<T>& clamp, const float (*e)[4],
                                               int tiles, uint32_t pixel0, uint32_t pixel1, int q) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t pixel = half == 0 ? pixel0 : pixel1;
    const uint32_t first = clamp(e[0][2 * half], e[0][2 * half + 1]);
    const uint32_t second = clamp(e[1][2 * half], e[1][2 * half + 1]);
    if (tiles == 4) {
      store_shared16(pixel + q * 16, {first, second, clamp(e[2][2 * half], e[2][2 * half + 1]),
                                      clamp(e[3][2 * half], e[3][2 * half + 1])});
    } else {
      store_shared8(pixel + q * 8, first, second);
    }
  }
}

// The expansion of the tile for one chunk, with its weights in registers. kUnits are the units of
// 8 source channels, or 6 for the windows of an image.
template <typename T, typename Shape, int kUnits>
__device__ __forceinline__ void expand_resident(const PackedClamp<T>& clamp, uint32_t fragments,
                                                uint32_t bias, uint32_t rows, int row_step,
                                                uint32_t table, int tiles, int warp, int warps,
                                                int g_row, int my_row, int my_unit, int q,
                                                const uint32_t (&one)[2]) {
  constexpr int kPairs = Shape::kPairs, kSteps = ceil_div(kUnits, 2);
  uint4 b[kSteps][kPairs];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) b[s][p] = load_shared16(fragments + (s * kPairs + p) * 512);
  }
  uint32_t biases[2 * kPairs];
#pragma unroll
  for (int j = 0; j < 2 * kPairs; ++j) biases[j] = load_shared4(bias + j * 128);
#pragma unroll 1
  for (int t = warp; t < tiles; t += warps) {
    // For an image, `rows` is a table of addresses and `row_step` leads from one row of the window
    // to the next; else pixels are `row_step` bytes apart.
    uint32_t row;
    if constexpr (Shape::kImage) {
      row = load_shared4(rows + (t * 16 + my_row) * 4) + my_unit * 16;
    } else {
      row = rows + t * 16 * row_step;
    }
    uint32_t f[kSteps][4];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint32_t at = row + s * (Shape::kImage ? row_step : 32);
      if (2 * s + 1 < kUnits) {
        load_matrices(f[s], at);
      } else {  // the last 8 of an odd number
        load_two_matrices(f[s][0], f[s][1], at);
      }
    }
    const uint32_t pixel0 = load_shared4(table + (t * 16 + g_row) * 4);
    const uint32_t pixel1 = load_shared4(table + (t * 16 + g_row + 8) * 4);
#pragma unroll
    for (int p0 = 0; p0 < kPairs; p0 += 2) {
      const int count = p0 + 2 <= kPairs ? 4 : 2;
      float e[4][4];
#pragma unroll
      for (int j = 0; j < count; ++j) mma_bias<T>(e[j], one, biases[2 * p0 + j]);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int p = 0; p < count / 2; ++p) {
          if (2 * s + 1 < kUnits) {
            mma<T>(e[2 * p], f[s], b[s][p0 + p].x, b[s][p0 + p].y);
            mma<T>(e[2 * p + 1], f[s], b[s][p0 + p].z, b[s][p0 + p].w);
          } else {
            mma_k8<T>(e[2 * p], f[s][0], f[s][1], b[s][p0 + p].x);
            mma_k8<T>(e[2 * p + 1], f[s][0], f[s][1], b[s][p0 + p].z);
          }
        }
      }
      store_expanded<T>(clamp, e, count, pixel0 + p0 * 32, pixel1 + p0 * 32, q);
    }
  }
}

// Source pixels of at most this many units are copied by one thread each.
constexpr int kFewUnits = 4;

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kMaxThreads, Shape::kMinBlocks)
    inverted_residual_kernel(const __grid_constant__ BlockArgs a) {
  constexpr int kStride = Shape::kStride, kTiles = Shape::kTiles, kChunk = Shape::kChunk;
  constexpr int kRows = Shape::kRows, kCols = Shape::kCols, kPitch = Shape::kPitch;
  constexpr int kPairs = Shape::kPairs, kOutTiles = Shape::kOutTiles;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t shared0 = shared_address(shared);
  const int threads = blockDim.x, warps = threads / 32;

  // 1. Where the tile lies.
  const BlockPlace place = find_place(a, kStride);
  const int images = place.images;
  const int64_t image0 = place.image0;
  const int eh = (a.tile_h - 1) * kStride + 3, ew = (a.tile_w - 1) * kStride + 3;
  const int row_bytes = a.row_pixels * kPitch;
  const int top = place.top, left = place.left;
  const int y0 = place.y0, y1 = place.y1, x0 = place.x0, x1 = place.x1;
  const int vw = x1 - x0, vh = y1 - y0;
  const int pixels = images * vh * vw;
  constexpr int kM = 16 * Shape::kPixelTiles;
  const int m_tiles = ceil_div(pixels, kM) * Shape::kPixelTiles;
  const uint32_t source = shared0;
  const uint32_t expanded = shared0 + a.expanded_offset;
  const uint32_t table = shared0 + a.table_offset;  // [pixel of the source] its address in e
  const int pitch_in = (a.k8 | 1) * 16;             // bytes of a source pixel

  const auto load_weights = [&](int c) {
    const unsigned char* const from = slice_weights(a) + int64_t(c) * a.blob_bytes;
    const uint32_t stage = shared0 + a.weights_offset + (c & (a.stages - 1)) * a.blob_bytes;
#pragma unroll 2
    for (int i = threadIdx.x * 16; i < a.blob_bytes; i += threads * 16) {
      copy_async16(stage + i, from + i, true);
    }
  };

  // 2. On their way: weights of the first chunk, and the source. Where its pixels go in e; zeros
  // where e is outside the map, which every chunk leaves alone.
  wait_for_input();
  load_weights(ChunkRange(a).first);
  const T* const input = static_cast<const T*>(a.input);
  for (int p = threadIdx.x; p < a.images * eh * ew; p += threads) {
    uint32_t x, line_y;
    const uint32_t line = a.halo_width.divide(p, x);
    const int image = a.halo_height.divide(line, line_y);
    const int at = Shape::kSplit ? (x & 1) * a.odd + (x >> 1) : x;
    const uint32_t pixel = expanded + (line * a.row_pixels + at) * kPitch;
    const int y = top + int(line_y), column = left + int(x);
    if (image >= images || y < y0 || y >= y1 || column < x0 || column >= x1) {
#pragma unroll
      for (int u = 0; u < kPitch; u += 16) store_shared16(pixel + u, {0, 0, 0, 0});
      continue;
    }
    const int m = (image * vh + y - y0) * vw + column - x0;
    store_shared4(table + m * 4, pixel);
    if constexpr (Shape::kImage) {
      store_shared4(table + (m_tiles * 16 + m) * 4,
                    source + (image * (2 * eh + 1) + 2 * line_y) * a.image_pitch + x * 16);
    } else if (a.k8 <= kFewUnits) {
      const T* const from =
          input + (image0 + image) * a.image_step + (y * a.width + column) * a.in_channels;
#pragma unroll
      for (int u = 0; u < kFewUnits; ++u) {
        if (u >= a.k8) continue;
        const bool real = u * 8 < a.in_channels;
        copy_async16_cached(source + m * pitch_in + u * 16, from + (real ? u * 8 : 0), real);
      }
    }
  }
  for (int m = pixels + threadIdx.x; m < m_tiles * 16; m += threads) {
    store_shared4(table + m * 4, expanded + a.images * eh * row_bytes);  // a pixel nobody reads
    if constexpr (Shape::kImage) store_shared4(table + (m_tiles * 16 + m) * 4, source);
  }
  if constexpr (Shape::kImage) {
    // As 4-channel pixels: k of a row of the window is 4 pixels x 4 channels, of which the last
    // pixel and the last channel have weight 0.
    const int pairs = ew + 1, rows = 2 * eh + 1;  // of pixels
    const int row0 = 2 * top - a.stem_top, column0 = 2 * left - a.stem_left;
    const auto load_image = [&](auto zero, auto four) {
      using Pixel = decltype(zero);
      constexpr bool kFour = decltype(four)::value;
      for (int image = 0; image < images; ++image) {
        const Pixel* const first =
            static_cast<const Pixel*>(a.input) + (image0 + image) * a.image_step;
        const uint64_t channels[4] = {opaque_address(first), opaque_address(first + a.stride_c),
                                      opaque_address(first + int64_t(2) * a.stride_c),
                                      opaque_address(first + int64_t(3) * a.stride_c)};
        const uint32_t image_to = source + image * rows * a.image_pitch;
        constexpr int kAtOnce = 4;  // pairs of neighbours of a thread whose loads fly together
        for (int start = threadIdx.x; start < rows * pairs; start += kAtOnce * threads) {
          Pixel value[kAtOnce][2][4];
          uint32_t to[kAtOnce];
#pragma unroll
          for (int u = 0; u < kAtOnce; ++u) {
            const int i = min(start + u * threads, rows * pairs - 1);
            uint32_t pair;
            const int r = a.image_pairs.divide(i, pair);
            const int y = row0 + r, x = column0 + 2 * int(pair);
            const int at = y * a.stride_h + x * a.stride_w;
            to[u] = image_to + r * a.image_pitch + pair * 16;
#pragma unroll
            for (int v = 0; v < 2; ++v) {
              const bool inside =
                  unsigned(y) < unsigned(a.height) && unsigned(x + v) < unsigned(a.width);
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                value[u][v][k] = from_float<Pixel>(0.0f);
                if (k == 3 && !kFour) continue;
                value[u][v][k] = load_element<Pixel>(channels[k], at + v * a.stride_w,
                                                     inside && (kFour || k < a.in_channels));
              }
            }
          }
#pragma unroll
          for (int u = 0; u < kAtOnce; ++u) {
            T pixels2[8];
#pragma unroll
            for (int v = 0; v < 2; ++v) {
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                if constexpr (std::is_same_v<Pixel, T>) {
                  pixels2[4 * v + k] = value[u][v][k];
                } else {
                  pixels2[4 * v + k] = from_float<T>(to_float(value[u][v][k]));
                }
              }
            }
            uint32_t words[4];
            memcpy(words, pixels2, 16);
            store_shared16(to[u], words);
          }
        }
      }
    };
    const auto load_channels = [&](auto zero) {
      if (a.in_channels == 4) {
        load_image(zero, std::true_type{});
      } else {
        load_image(zero, std::false_type{});
      }
    };
    if (a.image_dtype == DType::kFloat32) {
      load_channels(float{});
    } else if (a.image_dtype == DType::kFloat16) {
      load_channels(__half{});
    } else {
      load_channels(__nv_bfloat16{});
    }
  } else if (a.k8 > kFewUnits) {
#pragma unroll 1
    for (int i = threadIdx.x; i < a.images * eh * ew * a.k8; i += threads) {
      uint32_t unit, x, line_y;
      const uint32_t p = a.units.divide(i, unit);
      const uint32_t line = a.halo_width.divide(p, x);
      const int image = a.halo_height.divide(line, line_y);
      const int y = top + int(line_y), column = left + int(x);
      if (image >= images || y < y0 || y >= y1 || column < x0 || column >= x1) continue;
      const int m = (image * vh + y - y0) * vw + column - x0;
      const bool real = unit * 8 < a.in_channels;
      copy_async16(source + m * pitch_in + unit * 16,
                   input + (image0 + image) * a.image_step +
                       (y * a.width + column) * a.in_channels + (real ? unit * 8 : 0),
                   real);
    }
  }
  copy_async_commit();

  // 3. What a warp reads of e.
  const PackedClamp<T> clamp(a.act);
  const WarpPlace place_of_warp(a, 2 * kRows, 8 * kCols);
  const uint32_t window = expanded +
                          (place_of_warp.image * eh + place_of_warp.row * kStride +
                           DepthwiseColumn<Shape>::lane_row(threadIdx.x % 32)) *
                              row_bytes +
                          (place_of_warp.column / kCols + threadIdx.x % 8) * kPitch;
  const int odd_bytes = Shape::kSplit ? a.odd * kPitch : 0;
  // Where column k of a lane's window lies.
  const auto column_at = [&](int k) {
    return Shape::kSplit ? (k & 1) * odd_bytes + (k >> 1) * kPitch : k * kPitch;
  };
  // Rows of a tile of 16 pixels are ordered so that the two rows that one phase of a 16-byte store
  // meets are in different banks: 4 pixels apart or, where rows of e are split, neighbours.
  const auto order = [](int i) {
    return Shape::kSplit ? (i & 1) + 2 * (i & 2) + (i & 4) / 2
                         : 4 * (i & 1) + (i & 2) + (i & 4) / 4;
  };

  // Sums start from the bias of the projection.
  const ChunkRange chunks(a);
  constexpr PackedSizes kSizes = packed_sizes(kChunk, kTiles);
  float acc[kOutTiles][kTiles][4];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float* const at =
        reinterpret_cast<const float*>(slice_weights(a) + a.slice_bytes - kTiles * 32) + j * 8 +
        threadIdx.x % 4 * 2;
    const float2 bias = chunks.rank == 0 ? __ldg(reinterpret_cast<const float2*>(at)) : float2{};
#pragma unroll
    for (int t = 0; t < kOutTiles; ++t) {
      acc[t][j][0] = acc[t][j][2] = bias.x;
      acc[t][j][1] = acc[t][j][3] = bias.y;
    }
  }

#pragma unroll 1
  for (int c = chunks.first; c < ChunkRange(a).last; ++c) {
    if (a.stages == 1 && c > ChunkRange(a).first) {
      __syncthreads();  // nobody reads the last chunk's weights any more
      load_weights(c);
      copy_async_commit();
    }
    copy_async_wait<0>();
    __syncthreads();  // weights and source are there; nobody reads e or the other weights any more
    const uint32_t weights = shared0 + a.weights_offset + (c & (a.stages - 1)) * a.blob_bytes;
    if (a.stages == 2 && c + 1 < ChunkRange(a).last) {
      load_weights(c + 1);
      copy_async_commit();
    }
    const Lane me;
    const int warp = me.warp, lane = me.lane, g = me.g, q = me.q;
    const int my_row = order(lane % 8) + (lane & 8), my_unit = lane / 16, g_row = order(g);
    const uint32_t expand_fragments = weights + kSizes.fixed + lane * 16;
    const uint32_t expand_bias = weights + kSizes.expand_bias + lane * 4;
    // Left operand of mma_bias. Opaque, so that the compiler does not copy a pair for each use.
    uint32_t one[2];
    asm volatile("mov.b32 %0, %1;"
                 : "=r"(one[0])
                 : "r"(q == 0 ? (std::is_same_v<T, __half> ? 0x3C003C00u : 0x3F803F80u) : 0u));
    asm volatile("mov.b32 %0, %1;" : "=r"(one[1]) : "r"(one[0]));

    // 4. Expand.
    if (!Shape::kImage && a.k8 == 0) {
      const BlockPlace here = find_place(a, kStride);
      const int width = here.x1 - here.x0, height = here.y1 - here.y0;
      for (int line = warp; line < here.images * height; line += warps) {
        const int image = line / height;
        const T* const from = static_cast<const T*>(a.input) +
                              ((here.image0 + image) * a.height + here.y0 + line - image * height) *
                                  int64_t(a.width) * a.in_channels +
                              here.x0 * a.in_channels + c * kChunk;
        constexpr int kUnits = kChunk / 8;
        for (int i = lane; i < width * kUnits; i += 32) {
          const int x = i / kUnits, unit = i % kUnits;
          const bool real = c * kChunk + unit * 8 < a.in_channels;
          copy_async16(load_shared4(table + (line * width + x) * 4) + unit * 16,
                       from + x * a.in_channels + (real ? unit * 8 : 0), real);
        }
      }
      copy_async_commit();
      copy_async_wait<0>();
    } else if constexpr (Shape::kImage) {
      expand_resident<T, Shape, 6>(clamp, expand_fragments, expand_bias, table + m_tiles * 64,
                                   a.image_pitch, table, m_tiles, warp, warps, g_row, my_row,
                                   my_unit, q, one);
    } else if constexpr (Shape::kResident) {
      const auto expand = [&](auto units) {
        constexpr int kUnits = decltype(units)::value;
        // The last unit of an odd number is loaded by half of the lanes.
        const uint32_t rows = source + my_row * pitch_in + my_unit * 16;
        expand_resident<T, Shape, kUnits>(clamp, expand_fragments, expand_bias, rows, pitch_in,
                                          table, m_tiles, warp, warps, g_row, my_row, my_unit, q,
                                          one);
      };
      if (a.k8 == 1) {
        expand(std::integral_constant<int, 1>{});
      } else if (a.k8 == 2) {
        expand(std::integral_constant<int, 2>{});
      } else if (a.k8 == 3) {
        expand(std::integral_constant<int, 3>{});
      } else {
        expand(std::integral_constant<int, 4>{});
      }
    } else {
      constexpr int kAtOnce = Shape::kPixelTiles;
#pragma unroll 1
      for (int t = warp * kAtOnce; t < m_tiles; t += warps * kAtOnce) {
        float e[kAtOnce][2 * kPairs][4];
#pragma unroll
        for (int j = 0; j < 2 * kPairs; ++j) {
          const uint32_t bias = load_shared4(expand_bias + j * 128);
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) mma_bias<T>(e[i][j], one, bias);
        }
        const uint32_t row = source + (t * 16 + my_row) * pitch_in + my_unit * 16;
#pragma unroll 2
        for (int s = 0; s < a.k8 / 2; ++s) {
          uint32_t f[kAtOnce][4];
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) load_matrices(f[i], row + i * 16 * pitch_in + s * 32);
#pragma unroll
          for (int p = 0; p < kPairs; ++p) {
            const uint4 b = load_shared16(expand_fragments + (s * kPairs + p) * 512);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
              mma<T>(e[i][2 * p], f[i], b.x, b.y);
              mma<T>(e[i][2 * p + 1], f[i], b.z, b.w);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const uint32_t entry = table + ((t + i) * 16 + g_row) * 4;
          const uint32_t pixel0 = load_shared4(entry), pixel1 = load_shared4(entry + 32);
#pragma unroll
          for (int p0 = 0; p0 < kPairs; p0 += 2) {
            store_expanded<T>(clamp, &e[i][2 * p0], p0 + 2 <= kPairs ? 4 : 2, pixel0 + p0 * 32,
                              pixel1 + p0 * 32, q);
          }
        }
      }
    }
    __syncthreads();

    // 5. Depthwise and projection, 16 expanded channels at a time. The diagonal matrices: lane (g,
    // q) holds row 2q (low half) and 2q + 1 (high half) of column g, so the lanes with q == g / 2
    // hold the taps of channel g, in the half that they are packed in.
    const bool on_diagonal = q == g >> 1;
    const uint32_t project_fragments = weights + kSizes.project + lane * 16;
#pragma unroll 1
    for (int s = 0; s < kPairs; ++s) {
      uint32_t d[kOutTiles][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int unit = 2 * s + h;
        const uint32_t taps_at = weights + kSizes.depthwise + unit * kSizes.depthwise_unit;
        uint32_t taps[3][3] = {};  // [column of the window][row]
        if (on_diagonal) {
          const uint4 w0 = load_shared16(taps_at + g * 16);
          const uint4 w1 = load_shared16(taps_at + 128 + g * 16);
          taps[0][0] = w0.x, taps[0][1] = w0.y, taps[0][2] = w0.z, taps[1][0] = w0.w;
          taps[1][1] = w1.x, taps[1][2] = w1.y, taps[2][0] = w1.z, taps[2][1] = w1.w;
          taps[2][2] = load_shared4(taps_at + 256 + g * 4);
        }
        float v[kCols][kRows][4];
#pragma unroll
        for (int k = 0; k < Shape::kInCols; ++k) {
          DepthwiseColumn<Shape> column;
          column.load(window + unit * 16 + column_at(k), row_bytes);
#pragma unroll
          for (int x = 0; x < kCols; ++x) {
            const int j = k - kStride * x;  // column of the window
            if (j < 0 || j > 2) continue;
#pragma unroll
            for (int y = 0; y < kRows; ++y) {
              if (j == 0) load_floats4(v[x][y], taps_at + 288 + q * 16);
              column.template add<T>(v[x][y], y, taps[j]);
              if (j == 2) {
                d[x * kRows + y][2 * h] = clamp(v[x][y][0], v[x][y][1]);
                d[x * kRows + y][2 * h + 1] = clamp(v[x][y][2], v[x][y][3]);
              }
            }
          }
        }
      }
      // Keeps the compiler from loading these operands early, for want of registers.
      if (kCols > 1) __syncwarp();
#pragma unroll
      for (int j = 0; j + 2 <= kTiles; j += 2) {
        const uint4 b = load_shared16(project_fragments + s * kTiles * 256 + j * 256);
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t) {
          mma<T>(acc[t][j], d[t], b.x, b.y);
          mma<T>(acc[t][j + 1], d[t], b.z, b.w);
        }
      }
      if constexpr (kTiles % 2 == 1) {
        const uint2 b =
            load_shared8(project_fragments - lane * 8 + s * kTiles * 256 + (kTiles - 1) * 256);
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t) mma<T>(acc[t][kTiles - 1], d[t], b.x, b.y);
      }
    }
  }

  start_next();

  // 6. Output. Groups of 4, 2 and 1 tiles: a lane has 8, 4 or 2 consecutive channels of each.
  constexpr int kGroups = ceil_div(kTiles, 4);
  const BlockPlace here = find_place(a, kStride);
  const WarpPlace warp_here(a, 2 * kRows, 8 * kCols);
  const Lane me;
  const int warp = me.warp, lane = me.lane, g = me.g, q = me.q;
  const int warp_image = warp_here.image;
  const int channel0 = blockIdx.y * kTiles * 8;
  const int64_t image = here.image0 + warp_image;
  const int oy0 = here.tile_y * a.tile_h + warp_here.row;
  const int ox0 = here.tile_x * a.tile_w + warp_here.column + g * kCols;
  T* const output = static_cast<T*>(a.output) + image * a.out_h * int64_t(a.out_w) * a.out_channels;

  const auto write = [&](int x, int y, int half, int j, auto size, const auto& value) {
    constexpr int kGroup = decltype(size)::value;  // tiles
    const int oy = oy0 + output_row<kRows>(y, half), ox = ox0 + x;
    const int channel = j * 8 + q * 2 * kGroup;
    if (warp_image >= here.images || oy >= a.out_h || ox >= a.out_w ||
        channel0 + channel >= a.out_channels) {
      return;
    }
    float v[2 * kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      v[2 * i] = value(i, 0);
      v[2 * i + 1] = value(i, 1);
    }
    const int at = (oy * a.out_w + ox) * a.out_channels + channel0 + channel;
    if (a.residual) {
      float r[2 * kGroup];
      if (a.k8 > 0) {
        const int width = here.x1 - here.x0;
        const int m = (warp_image * (here.y1 - here.y0) + oy - here.y0) * width + ox - here.x0;
        load_floats<T, 2 * kGroup>(
            reinterpret_cast<const T*>(shared + m * pitch_in) + channel0 + channel, r);
      } else {
        load_floats<T, 2 * kGroup>(static_cast<const T*>(a.input) +
                                       image * a.height * int64_t(a.width) * a.in_channels + at,
                                   r);
      }
#pragma unroll
      for (int i = 0; i < 2 * kGroup; ++i) v[i] += r[i];
    }
    store_floats<T, 2 * kGroup>(output + at, v);
  };
  const auto write_groups = [&](int x, int y, int half, auto&& wanted, auto&& value) {
#pragma unroll
    for (int j = 0; j < kTiles / 4 * 4; j += 4) {
      if (wanted(j / 4)) {
        write(x, y, half, j, std::integral_constant<int, 4>{},
              [&](int i, int k) { return value(j + i, k); });
      }
    }
    if constexpr (kTiles % 4 >= 2) {
      constexpr int kPairStart = kTiles / 4 * 4;
      if (wanted(kPairStart / 4)) {
        write(x, y, half, kPairStart, std::integral_constant<int, 2>{},
              [&](int i, int k) { return value(kPairStart + i, k); });
      }
    }
    if constexpr (kTiles % 2 == 1) {
      if (wanted((kTiles - 1) / 4)) {
        write(x, y, half, kTiles - 1, std::integral_constant<int, 1>{},
              [&](int, int k) { return value(kTiles - 1, k); });
      }
    }
  };

  if (a.splits == 1) {
#pragma unroll
    for (int x = 0; x < kCols; ++x) {
#pragma unroll
      for (int y = 0; y < kRows; ++y) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          write_groups(
              x, y, half, [](int) { return true; },
              [&](int j, int k) { return acc[x * kRows + y][j][2 * half + k]; });
        }
      }
    }
    return;
  }

  // 7. The sums of the cluster's blocks, added in the order of their ranks: block r makes every
  // splits-th group of tiles.
  __syncthreads();
  float4* const mine = reinterpret_cast<float4*>(shared + a.weights_offset);
#pragma unroll
  for (int t = 0; t < kOutTiles; ++t) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      mine[((warp * kOutTiles + t) * kTiles + j) * 32 + lane] =
          make_float4(acc[t][j][0], acc[t][j][1], acc[t][j][2], acc[t][j][3]);
    }
  }
  cluster_sync();
  const uint32_t partial = shared0 + a.weights_offset;
#pragma unroll
  for (int t = 0; t < kOutTiles; ++t) {
#pragma unroll
    for (int j0 = 0; j0 < kTiles; j0 += 4) {
      if (((t * kGroups + j0 / 4) & (a.splits - 1)) != here.rank) continue;
      constexpr int kMost = kTiles < 4 ? kTiles : 4;
      float4 sum[kMost] = {};
#pragma unroll 2
      for (int r = 0; r < a.splits; ++r) {
        float4 v[kMost];
#pragma unroll
        for (int j = 0; j < kMost && j0 + j < kTiles; ++j) {
          v[j] = load_cluster(
              partial + (((warp * kOutTiles + t) * kTiles + j0 + j) * 32 + lane) * 16, r);
        }
#pragma unroll
        for (int j = 0; j < kMost && j0 + j < kTiles; ++j) {
          sum[j].x += v[j].x;
          sum[j].y += v[j].y;
          sum[j].z += v[j].z;
          sum[j].w += v[j].w;
        }
      }
#pragma unroll
      for (int j = 0; j < kMost && j0 + j < kTiles; ++j) {
        acc[t][j0 + j][0] = sum[j].x;
        acc[t][j0 + j][1] = sum[j].y;
        acc[t][j0 + j][2] = sum[j].z;
        acc[t][j0 + j][3] = sum[j].w;
      }
    }
  }
#pragma unroll
  for (int x = 0; x < kCols; ++x) {
#pragma unroll
    for (int y = 0; y < kRows; ++y) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = x * kRows + y;
        write_groups(
            x, y, half, [&](int j4) { return ((t * kGroups + j4) & (a.splits - 1)) == here.rank; },
            [&](int j, int k) { return acc[t][j][2 * half + k]; });
      }
    }
  }
  cluster_sync();  // nobody leaves while its sums are read
}

template <typename T, int kIndex>
cudaError_t launch_instance(const BlockArgs& a, const BlockLaunch& launch) {
  const auto kernel = inverted_residual_kernel<T, BlockShape<kIndex>>;
  // Once a device and instance; two threads may both do it.
  static std::atomic<uint64_t> prepared = 0;
  int device = 0;
  cudaGetDevice(&device);
  if (device >= 64 || !(prepared >> device & 1)) {
    int most = 0;
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
    if (device < 64) prepared |= uint64_t{1} << device;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(launch.blocks, launch.slices);
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = launch.stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (launch.splits > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {launch.splits, 1, 1};
    ++config.numAttrs;
  }
  if (launch.overlaps) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, a);
}

template <typename T, int... kIndices>
cudaError_t launch_any(int index, const BlockArgs& a, const BlockLaunch& launch,
                       std::integer_sequence<int, kIndices...>) {
  using Launcher = cudaError_t (*)(const BlockArgs&, const BlockLaunch&);
  static constexpr Launcher kLaunchers[] = {launch_instance<T, kIndices>...};
  return kLaunchers[index](a, launch);
}

template <typename T>
cudaError_t launch_block(int kernel, const BlockArgs& a, const BlockLaunch& launch) {
  return launch_any<T>(kernel, a, launch, std::make_integer_sequence<int, kBlockKernelCount>{});
}

}  // namespace torch_mbv2

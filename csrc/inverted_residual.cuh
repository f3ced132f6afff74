// A whole inverted residual (Sandler et al. 2018) in one kernel:
//
//   e[y, x, :]   = clamp(expand_weight . source[y, x, :] + expand_bias)     inside the map, else 0
//   d[y, x, c]   = clamp(depthwise_bias[c] + sum over i, j < 3 of depthwise_weight[c, i, j]
//                        * e[y * stride - pad_top + i, x * stride - pad_left + j, c])
//   out[y, x, :] = project_weight . d[y, x, :] + project_bias [+ input[y, x, :]]
//
// The expanded map e lives in shared memory, kChunk channels at a time, and d in registers only.
// The source is the input (1x1 expansion), or the 3x3 windows of stride 2 of an image (the stem of
// the network), which lies in shared memory as it does in device memory, or e is the input itself
// (no expansion).
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
// (2) every warp convolves its own pixels depthwise and projects them, 16 channels at a time; where
// registers allow, the next 16 are convolved between the products of a projection. The convolution
// runs on the tensor cores as well, as a product with diagonal matrices: two taps of 8 channels
// are the 16 of k. That is 1/8 of their rate, but exact sums in float32 at the price of 6
// instructions for 16 pixels x 8 channels, where FFMA takes 36 and 64 conversions (sums in float16,
// by HFMA2, were 10 % faster for a whole network but too inaccurate); the windows come by ldmatrix,
// a row is read once for all its taps, and the result is, after clamping and packing, the A operand
// of the projection. Biases are products with ones.
//
// Shared memory, in this order: the source of the tile with its halo (for the expansion and the
// residual); barriers, and weights of two chunks, or of one where there is no room; e (a pixel is
// kChunk * 2 + 16 bytes, an odd number of 16-byte units, so that ldmatrix finds 8 neighbours in
// different banks; where a lane makes pixels of every second column, a row holds its even pixels
// first, then the odd ones); where each pixel of the source goes in e. At the end the partial sums
// of a cluster's blocks overlay all but the source.
//
// Bound: at large batches by tensor-core instructions, the others and shared memory together; at
// small ones by chains of dependent instructions and, in a cluster, by the way of the sums from one
// multiprocessor to another. Device memory only sees input, output and the weights (from L2).
#pragma once

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
template <typename T>
__device__ __forceinline__ void store_shared2(uint32_t address, T v) {
  uint16_t bits;
  memcpy(&bits, &v, 2);
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(bits) : "memory");
}
__device__ __forceinline__ void store_shared16(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}
// These only where `wanted` is not 0.
__device__ __forceinline__ void store_shared16_if(uint32_t wanted, uint32_t address,
                                                  const uint32_t (&v)[4]) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n}" ::
          "r"(address),
      "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(wanted)
      : "memory");
}
__device__ __forceinline__ void store_shared8_if(uint32_t wanted, uint32_t address, uint32_t a,
                                                 uint32_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p st.shared.v2.u32 [%0], {%1, %2};\n}" ::"r"(
          address),
      "r"(a), "r"(b), "r"(wanted)
      : "memory");
}

// An address of which the compiler does not know where it comes from, so that it adds offsets to it
// instead of computing it anew for each access.
__device__ __forceinline__ uint64_t opaque_address(const void* p) {
  uint64_t address;
  asm volatile("mov.u64 %0, %1;" : "=l"(address) : "l"(p));
  return address;
}

// kCount neighbours from element `offset` of an array in device memory that nobody writes, or
// zeros.
template <typename T, int kCount>
__device__ __forceinline__ void load_elements(T (&values)[kCount], uint64_t base, int offset,
                                              bool valid) {
  if constexpr (sizeof(values) == 2) {
    uint16_t bits;
    asm("{\n.reg .pred p;\n.reg .u64 at;\nsetp.ne.u32 p, %3, 0;\nmad.wide.s32 at, %2, %4, %1;\n"
        "mov.u16 %0, 0;\n@p ld.global.nc.u16 %0, [at];\n}"
        : "=h"(bits)
        : "l"(base), "r"(offset), "r"(int(valid)), "n"(int(sizeof(T))));
    memcpy(values, &bits, 2);
  } else if constexpr (sizeof(values) == 4) {
    uint32_t bits;
    asm("{\n.reg .pred p;\n.reg .u64 at;\nsetp.ne.u32 p, %3, 0;\nmad.wide.s32 at, %2, %4, %1;\n"
        "mov.u32 %0, 0;\n@p ld.global.nc.u32 %0, [at];\n}"
        : "=r"(bits)
        : "l"(base), "r"(offset), "r"(int(valid)), "n"(int(sizeof(T))));
    memcpy(values, &bits, 4);
  } else {
    static_assert(sizeof(values) == 8);
    uint64_t bits;
    asm("{\n.reg .pred p;\n.reg .u64 at;\nsetp.ne.u32 p, %3, 0;\nmad.wide.s32 at, %2, %4, %1;\n"
        "mov.u64 %0, 0;\n@p ld.global.nc.u64 %0, [at];\n}"
        : "=l"(bits)
        : "l"(base), "r"(offset), "r"(int(valid)), "n"(int(sizeof(T))));
    memcpy(values, &bits, 8);
  }
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

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(T low, T high) {
  typename PairOf<T>::type pair;
  pair.x = low;
  pair.y = high;
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

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
// What this thread stored to shared memory is there for the blocks of its cluster that have waited
// for its arrival. A release of device memory as well would take much longer.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 8)
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
// Where it stored nothing that others read, and has used all that it read of theirs.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
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

// Barriers that count the bytes of copies. One thread makes them and starts copies; the others may
// wait after the next __syncthreads.
constexpr bool kHasBulkCopies = __CUDA_ARCH__ < 1200;  // sm_120 would spill registers
__device__ __forceinline__ void make_copy_barrier(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void publish_copy_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes,
                                          uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// Until the copies of the barrier's phase of that parity have arrived.
__device__ __forceinline__ void wait_copies(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra wait;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
#else  // never launched with splits there
constexpr bool kHasBulkCopies = false;
__device__ __forceinline__ void make_copy_barrier(uint32_t) {}
__device__ __forceinline__ void publish_copy_barriers() {}
__device__ __forceinline__ void copy_bulk(uint32_t, const void*, int, uint32_t) {}
__device__ __forceinline__ void wait_copies(uint32_t, int) {}
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_arrive_relaxed() {}
__device__ __forceinline__ void cluster_wait() {}
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
  static constexpr bool kPipelined = kKernel.pipelined;
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

// The row of output of a warp that tile t has in its rows g (half 0) and g + 8 (half 1). Rows are
// paired so that what the windows of a pair read are whole operands, without copies.
template <int kRows>
__device__ __forceinline__ constexpr int output_row(int t, int half) {
  return t + half * kRows;
}

// One column of the windows of a warp: matrices of 8 pixels x 8 channels, a row of e each, as left
// operands. A register pair holds the two rows that output rows g and g + 8 of a tile meet with one
// tap; two pairs are two taps.
template <typename Shape>
struct DepthwiseColumn {
  static constexpr int kRows = Shape::kRows, kStride = Shape::kStride;
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
  template <typename T>
  __device__ __forceinline__ void add(float (&c)[4], int t, const uint32_t (&taps)[3]) const {
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

// Coordinates of a block and a thread, opaque to the compiler (the thread's not for sm_90), so that
// what follows from them is computed anew at each use: it would keep more of that than there are
// registers.
__device__ __forceinline__ uint32_t block_index() {
  uint32_t value;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(value));
  return value;
}
__device__ __forceinline__ uint32_t thread_index() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
  uint32_t value;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(value));
  return value;
#else
  return threadIdx.x;
#endif
}

// Where a block's tile lies: its rank in the cluster, its images, its position among the tiles, and
// in coordinates of e, where it starts, (top, left), and the part of it inside the map,
// [y0, y1) x [x0, x1).
struct BlockPlace {
  int rank, images, tile_y, tile_x, top, left, y0, y1, x0, x1;
  int64_t image0;
};

// Computed anew by each call, see block_index.
template <typename Shape>
__device__ __forceinline__ BlockPlace find_place(const BlockArgs& a) {
  constexpr int stride = Shape::kStride;
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
  const int eh = (a.tile_h - 1) * stride + 3, ew = (a.tile_w - 1) * stride + 3;
  p.top = p.tile_y * a.tile_h * stride - a.pad_top;
  p.left = p.tile_x * a.tile_w * stride - a.pad_left;
  p.y0 = max(p.top, 0);
  p.y1 = max(min(p.top + eh, a.e_h), p.y0);
  p.x0 = max(p.left, 0);
  p.x1 = max(min(p.left + ew, a.e_w), p.x0);
  return p;
}

// Pixels of a row of the source of `width`: where e has its even pixels first, one more if they are
// odd, so that the two pixels of a phase of a store are always an even one and the next.
template <typename Shape>
__device__ __forceinline__ int row_of_source(int width) {
  return Shape::kSplit ? width + (width & 1) : width;
}

// The chunks of this block: `count` from `first` on. The first blocks of a cluster take those that
// do not divide evenly.
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

// The packed weights of this block's slice of output channels.
__device__ __forceinline__ const unsigned char* slice_weights(const BlockArgs& a) {
  uint32_t slice;  // opaque: computed anew where it is needed, rather than kept in two registers
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(slice));
  return static_cast<const unsigned char*>(a.packed) + slice * a.slice_bytes;
}

// Which pixels of its block's tile a warp makes: an image, and the first row and column.
template <typename Shape>
struct WarpPlace {
  int image, row, column;

  __device__ explicit WarpPlace(const BlockArgs& a) {
    uint32_t x, y;
    image = a.warps_y.divide(a.warps_x.divide(threadIdx.x / 32, x), y);
    row = y * 2 * Shape::kRows;
    column = x * 8 * Shape::kCols;
  }
};

// Stores 4 or 2 n tiles of the expansion, clamped and packed: rows g and g + 8 go to two pixels of
// e, `offset` bytes into each, or nowhere where its address is 0. The columns of tiles are such
// that a lane has 8 (of 4 tiles) or 4 (of 2) consecutive channels.
template <typename T>
__device__ __forceinline__ void store_expanded(const PackedClamp<T>& clamp, const float (*e)[4],
                                               int tiles, uint32_t pixel0, uint32_t pixel1,
                                               int offset, int q) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t pixel = half == 0 ? pixel0 : pixel1;
    const uint32_t first = clamp(e[0][2 * half], e[0][2 * half + 1]);
    const uint32_t second = clamp(e[1][2 * half], e[1][2 * half + 1]);
    if (tiles == 4) {
      store_shared16_if(pixel, pixel + offset + q * 16,
                        {first, second, clamp(e[2][2 * half], e[2][2 * half + 1]),
                         clamp(e[3][2 * half], e[3][2 * half + 1])});
    } else {
      store_shared8_if(pixel, pixel + offset + q * 8, first, second);
    }
  }
}

// The expansion of the tile for one chunk, with its weights in registers. kUnits are the units of
// 8 source channels.
template <typename T, typename Shape, int kUnits>
__device__ __forceinline__ void expand_resident(const PackedClamp<T>& clamp, uint32_t fragments,
                                                uint32_t bias, uint32_t rows, int row_step,
                                                uint32_t table, int tiles, int warp, int warps,
                                                int g_row, int q, const uint32_t (&one)[2]) {
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
    uint32_t f[kSteps][4];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint32_t at = rows + t * 16 * row_step + s * 32;
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
      store_expanded<T>(clamp, e, count, pixel0, pixel1, p0 * 32, q);
    }
  }
}

// The same where the source is an image: k is 3 rows of 10 elements of it, the 9 of the window and
// the one before it, or after it if it starts in an even column, then the bias. A lane's operands
// are pairs of them, 4 bytes at a time.
template <typename T, typename Shape>
__device__ __forceinline__ void expand_image(const PackedClamp<T>& clamp, uint32_t fragments,
                                             uint32_t windows, int image_pitch, uint32_t table,
                                             int tiles, int warp, int warps, int g_row, int q,
                                             uint32_t ones) {
  constexpr int kPairs = Shape::kPairs;
  uint4 b[2][kPairs];
#pragma unroll
  for (int s = 0; s < 2; ++s) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) b[s][p] = load_shared16(fragments + (s * kPairs + p) * 512);
  }
  int at[4];  // of this lane's pairs of a window; the last one of lane 3 is a pair of ones
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int pair = min(4 * i + q, 14);
    at[i] = pair / 5 * image_pitch + pair % 5 * 4;
  }
#pragma unroll 1
  for (int t = warp; t < tiles; t += warps) {
    const uint32_t entry = (t * 16 + g_row) * 4;
    const uint32_t window0 = load_shared4(windows + entry);
    const uint32_t window1 = load_shared4(windows + entry + 32);
    uint32_t f[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f[i / 2][i % 2 * 2] = load_shared4(window0 + at[i]);
      f[i / 2][i % 2 * 2 + 1] = load_shared4(window1 + at[i]);
    }
    if (q == 3) f[1][2] = f[1][3] = ones;
    const uint32_t pixel0 = load_shared4(table + entry);
    const uint32_t pixel1 = load_shared4(table + entry + 32);
#pragma unroll
    for (int p0 = 0; p0 < kPairs; p0 += 2) {
      const int count = p0 + 2 <= kPairs ? 4 : 2;
      float e[4][4] = {};
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int p = 0; p < count / 2; ++p) {
          mma<T>(e[2 * p], f[s], b[s][p0 + p].x, b[s][p0 + p].y);
          mma<T>(e[2 * p + 1], f[s], b[s][p0 + p].z, b[s][p0 + p].w);
        }
      }
      store_expanded<T>(clamp, e, count, pixel0, pixel1, p0 * 32, q);
    }
  }
}

// Copies `rows` rows of an image, from row0 on, to shared memory at `to`, with zeros outside the
// image. Of a row, pixel column0 - 1 + i goes to kImageLead + 6 i bytes: windows read the element
// before their first pixel.
template <typename T, typename Pixel, bool kPairs>
__device__ void load_image(const BlockArgs& a, const Pixel* image, uint32_t to, int row0,
                           int column0, int rows) {
  const uint64_t channels[3] = {opaque_address(image), opaque_address(image + a.stride_c),
                                opaque_address(image + int64_t(2) * a.stride_c)};
  const int threads = blockDim.x, count = rows * int(a.image_pairs.divisor);
  const int first = column0 % 2 == 0 ? -2 : -1;  // pairs of pixels start at even columns
  constexpr int kAtOnce = 4;                     // whose loads fly together
  for (int start = threadIdx.x; start < count; start += kAtOnce * threads) {
    Pixel value[kAtOnce][3][2];
    uint32_t at[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      uint32_t pair;
      const int r = a.image_pairs.divide(min(start + u * threads, count - 1), pair);
      const int p = first + 2 * int(pair);
      const int y = row0 + r, x = column0 + p;
      const int from = y * a.stride_h + x * a.stride_w;
      at[u] = to + r * a.image_pitch + kImageLead + (p + 1) * 6;
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const bool real = unsigned(y) < unsigned(a.height) && k < a.in_channels;
        if constexpr (kPairs) {
          load_elements(value[u][k], channels[k], from, real && unsigned(x) < unsigned(a.width));
        } else {
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            Pixel one[1];
            load_elements(one, channels[k], from + v * a.stride_w,
                          real && unsigned(x + v) < unsigned(a.width));
            value[u][k][v] = one[0];
          }
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      T elements[6];
#pragma unroll
      for (int v = 0; v < 2; ++v) {
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          if constexpr (std::is_same_v<Pixel, T>) {
            elements[3 * v + k] = value[u][k][v];
          } else {
            elements[3 * v + k] = from_float<T>(to_float(value[u][k][v]));
          }
        }
      }
      if (first == -1) {  // 4-byte aligned
#pragma unroll
        for (int i = 0; i < 6; i += 2) {
          store_shared4(at[u] + i * 2, pack_pair(elements[i], elements[i + 1]));
        }
      } else {
        store_shared2(at[u], elements[0]);
        store_shared4(at[u] + 2, pack_pair(elements[1], elements[2]));
        store_shared4(at[u] + 6, pack_pair(elements[3], elements[4]));
        store_shared2(at[u] + 10, elements[5]);
      }
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
  const BlockPlace place = find_place<Shape>(a);
  const int images = place.images;
  const int64_t image0 = place.image0;
  const int eh = (a.tile_h - 1) * kStride + 3, ew = (a.tile_w - 1) * kStride + 3;
  const int row_bytes = a.row_pixels * kPitch;
  const int top = place.top, left = place.left;
  const int y0 = place.y0, y1 = place.y1, x0 = place.x0, x1 = place.x1;
  const int vw = row_of_source<Shape>(x1 - x0), vh = y1 - y0;
  const int pixels = images * vh * vw;
  constexpr int kM = 16 * Shape::kPixelTiles;
  const int m_tiles = ceil_div(pixels, kM) * Shape::kPixelTiles;
  const uint32_t source = shared0;
  const uint32_t expanded = shared0 + a.expanded_offset;
  const uint32_t table = shared0 + a.table_offset;  // [pixel of the source] its address in e, or 0
  const int pitch_in = (a.k8 | 1) * 16;             // bytes of a source pixel

  const uint32_t copied = shared0 + a.weights_offset - 16;  // a barrier for each stage of weights
  const auto load_weights = [&](int c) {                    // of the c-th chunk of this block
    if (kHasBulkCopies && threadIdx.x > 0) return;
    const unsigned char* const from =
        slice_weights(a) + int64_t(ChunkRange(a).first + c) * a.blob_bytes;
    const int stage = c & (a.stages - 1);
    const uint32_t to = shared0 + a.weights_offset + stage * a.blob_bytes;
    if constexpr (kHasBulkCopies) {
      copy_bulk(to, from, a.blob_bytes, copied + stage * 8);
    } else {
#pragma unroll 1
      for (int i = threadIdx.x * 16; i < a.blob_bytes; i += threads * 16) {
        copy_async16(to + i, from + i, true);
      }
    }
  };

  // An image: its first row and column that windows read, and where in a row of shared memory the
  // even column there or before it lies, or the one before it. Copies of whole rows keep the
  // alignment of device memory.
  const int image_y = 2 * top - a.stem_top, image_x = 2 * left - a.stem_left;
  const bool rows_as_they_are = a.image_load == ImageLoad::kRows;
  const int image_lead = rows_as_they_are ? (image_x & ~1) * 6 & 15 : kImageLead;
  const int first_window = image_lead + (rows_as_they_are && image_x % 2 == 0 ? 0 : 4);

  // 2. On their way: weights of the first chunk, and the source. Where its pixels go in e; zeros
  // where e is outside the map, which every chunk leaves alone.
  if (kHasBulkCopies && threadIdx.x == 0) {
    make_copy_barrier(copied);
    make_copy_barrier(copied + 8);
    publish_copy_barriers();
  }
  // Where all blocks start at once, while the kernel before this one still runs, they do first what
  // needs no input.
  const bool few_units = !Shape::kImage && a.k8 > 0 && a.k8 <= kFewUnits;
  const bool waits_late = a.one_round && !few_units;
  if (!waits_late) {
    wait_for_input();
    load_weights(0);
  }
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
      store_shared4(
          table + (m_tiles * 16 + m) * 4,
          source + (image * (2 * eh + 1) + 2 * line_y) * a.image_pitch + first_window + x * 12);
    } else if (few_units) {
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
  const auto skip_pixel = [&](int m) {
    store_shared4(table + m * 4, 0);
    if constexpr (Shape::kImage) store_shared4(table + (m_tiles * 16 + m) * 4, source);
  };
  for (int m = pixels + threadIdx.x; m < m_tiles * 16; m += threads) skip_pixel(m);
  if (vw > x1 - x0) {
    for (int line = threadIdx.x; line < images * vh; line += threads) {
      skip_pixel(line * vw + x1 - x0);
    }
  }
  if (waits_late) {
    wait_for_input();
    load_weights(0);
  }
  if constexpr (Shape::kImage) {
    const int rows = 2 * eh + 1;
    for (int image = 0; image < images; ++image) {
      const int64_t from = (image0 + image) * a.image_step;
      const uint32_t to = source + image * rows * a.image_pitch;
      const auto load = [&](auto zero) {
        using Pixel = decltype(zero);
        const Pixel* const first = static_cast<const Pixel*>(a.input) + from;
        if (a.image_load == ImageLoad::kPairs) {
          load_image<T, Pixel, true>(a, first, to, image_y, image_x, rows);
        } else {
          load_image<T, Pixel, false>(a, first, to, image_y, image_x, rows);
        }
      };
      if (rows_as_they_are) {
        // 16 threads a row, 16 bytes each at a time.
        for (int at = threadIdx.x % 16 * 16; at < a.image_pitch; at += 256) {
          const int column = (image_x & ~1) * 6 - image_lead + at;  // in bytes
          const int real = column < 0 ? 0 : max(min(a.width * 6 - column, 16), 0);
          int r = threadIdx.x / 16;
          uint32_t row = to + r * a.image_pitch + at;
          const T* p = input + from + (image_y + r) * int64_t(a.stride_h) + column / 2;
          for (; r < rows; r += threads / 16) {
            if (real > 0 && unsigned(image_y + r) < unsigned(a.height)) {
              copy_async_part(row, p, real);
            } else {
              store_shared16(row, {0, 0, 0, 0});
            }
            row += threads / 16 * a.image_pitch;
            p += threads / 16 * a.stride_h;
          }
        }
      } else if (a.image_dtype == DType::kFloat32) {
        load(float{});
      } else if (a.image_dtype == DType::kFloat16) {
        load(__half{});
      } else {
        load(__nv_bfloat16{});
      }
    }
  } else if (a.k8 > kFewUnits) {
    // A warp a line: its units lie one after the other in device memory.
    for (int image = 0; image < images; ++image) {
      for (int line = threadIdx.x / 32; line < vh; line += warps) {
        const T* const from =
            input + (image0 + image) * a.image_step + ((y0 + line) * a.width + x0) * a.in_channels;
        const uint32_t to = source + (image * vh + line) * vw * pitch_in;
#pragma unroll 4
        for (int i = threadIdx.x % 32; i < (x1 - x0) * a.k8; i += 32) {
          uint32_t unit;
          const uint32_t x = a.units.divide(i, unit);
          const bool real = unit * 8 < a.in_channels;
          copy_async16(to + x * pitch_in + unit * 16,
                       from + x * a.in_channels + (real ? unit * 8 : 0), real);
        }
      }
    }
  }
  copy_async_commit();

  // 3. What a warp reads of e.
  const PackedClamp<T> clamp(a.act);
  const WarpPlace<Shape> place_of_warp(a);
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
  constexpr PackedSizes kSizes = packed_sizes(kChunk, kTiles, Shape::kImage);
  float acc[kOutTiles][kTiles][4];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float* const at =
        reinterpret_cast<const float*>(slice_weights(a) + a.slice_bytes - kTiles * 32) + j * 8 +
        threadIdx.x % 4 * 2;
    const float2 bias =
        ChunkRange(a).rank == 0 ? __ldg(reinterpret_cast<const float2*>(at)) : float2{};
#pragma unroll
    for (int t = 0; t < kOutTiles; ++t) {
      acc[t][j][0] = acc[t][j][2] = bias.x;
      acc[t][j][1] = acc[t][j][3] = bias.y;
    }
  }

#pragma unroll 1
  for (int c = 0; c < ChunkRange(a).count; ++c) {
    if (a.stages == 1 && c > 0) {
      __syncthreads();  // nobody reads the last chunk's weights any more
      load_weights(c);
      copy_async_commit();
    }
    copy_async_wait<0>();
    __syncthreads();  // weights and source are there; nobody reads e or the other weights any more
    const int stage = c & (a.stages - 1);
    const uint32_t weights = shared0 + a.weights_offset + stage * a.blob_bytes;
    if (kHasBulkCopies) wait_copies(copied + stage * 8, c >> (a.stages - 1) & 1);
    if (a.stages == 2 && c + 1 < ChunkRange(a).count) {
      load_weights(c + 1);
      copy_async_commit();
    }
    const Lane me;
    const int warp = me.warp, lane = me.lane, g = me.g, q = me.q;
    const int my_row = order(lane % 8) + (lane & 8), my_unit = lane / 16, g_row = order(g);
    const uint32_t expand_fragments = weights + kSizes.fixed + lane * 16;
    const uint32_t expand_bias = weights + kSizes.expand_bias + lane * 4;
    // Left operand of mma_bias. Opaque, so that the compiler does not copy a pair for each use.
    constexpr uint32_t two_ones = std::is_same_v<T, __half> ? 0x3C003C00u : 0x3F803F80u;
    uint32_t one[2];
    asm volatile("mov.b32 %0, %1;" : "=r"(one[0]) : "r"(q == 0 ? two_ones : 0u));
    asm volatile("mov.b32 %0, %1;" : "=r"(one[1]) : "r"(one[0]));

    // 4. Expand.
    if (!Shape::kImage && a.k8 == 0) {
      const BlockPlace here = find_place<Shape>(a);
      const int width = here.x1 - here.x0, height = here.y1 - here.y0;
      const int step = row_of_source<Shape>(width);
      const int channel0 = (ChunkRange(a).first + c) * kChunk;
      for (int line = warp; line < here.images * height; line += warps) {
        const int image = line / height;
        const T* const from = static_cast<const T*>(a.input) +
                              ((here.image0 + image) * a.height + here.y0 + line - image * height) *
                                  int64_t(a.width) * a.in_channels +
                              here.x0 * a.in_channels + channel0;
        constexpr int kUnits = kChunk / 8;
        for (int i = lane; i < width * kUnits; i += 32) {
          const int x = i / kUnits, unit = i % kUnits;
          const bool real = channel0 + unit * 8 < a.in_channels;
          copy_async16(load_shared4(table + (line * step + x) * 4) + unit * 16,
                       from + x * a.in_channels + (real ? unit * 8 : 0), real);
        }
      }
      copy_async_commit();
      copy_async_wait<0>();
    } else if constexpr (Shape::kImage) {
      expand_image<T, Shape>(clamp, expand_fragments, table + m_tiles * 64, a.image_pitch, table,
                             m_tiles, warp, warps, g_row, q, two_ones);
    } else if constexpr (Shape::kResident) {
      const auto expand = [&](auto units) {
        constexpr int kUnits = decltype(units)::value;
        // The last unit of an odd number is loaded by half of the lanes.
        const uint32_t rows = source + my_row * pitch_in + my_unit * 16;
        expand_resident<T, Shape, kUnits>(clamp, expand_fragments, expand_bias, rows, pitch_in,
                                          table, m_tiles, warp, warps, g_row, q, one);
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
        struct Operands {
          uint32_t source[kAtOnce][4];
          uint4 weights[kPairs];
        };
        const auto load = [&](Operands& of, int s) {
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            load_matrices(of.source[i], row + i * 16 * pitch_in + s * 32);
          }
#pragma unroll
          for (int p = 0; p < kPairs; ++p) {
            of.weights[p] = load_shared16(expand_fragments + (s * kPairs + p) * 512);
          }
        };
        const auto multiply = [&](const Operands& of) {
#pragma unroll
          for (int p = 0; p < kPairs; ++p) {
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
              mma<T>(e[i][2 * p], of.source[i], of.weights[p].x, of.weights[p].y);
              mma<T>(e[i][2 * p + 1], of.source[i], of.weights[p].z, of.weights[p].w);
            }
          }
        };
        if constexpr (Shape::kPipelined) {
          // The next step's operands are on their way meanwhile.
          Operands now;
          load(now, 0);
#pragma unroll 2
          for (int s = 1; s < a.k8 / 2; ++s) {
            Operands next;
            load(next, s);
            multiply(now);
            now = next;
          }
          multiply(now);
        } else {
#pragma unroll 2
          for (int s = 0; s < a.k8 / 2; ++s) {
            Operands now;
            load(now, s);
            multiply(now);
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const uint32_t entry = table + ((t + i) * 16 + g_row) * 4;
          const uint32_t pixel0 = load_shared4(entry), pixel1 = load_shared4(entry + 32);
#pragma unroll
          for (int p0 = 0; p0 < kPairs; p0 += 2) {
            store_expanded<T>(clamp, &e[i][2 * p0], p0 + 2 <= kPairs ? 4 : 2, pixel0, pixel1,
                              p0 * 32, q);
          }
        }
      }
    }
    __syncthreads();

    // 5. Depthwise and projection, 16 expanded channels at a time. The diagonal matrices: lane (g,
    // q) holds row 2q (low half) and 2q + 1 (high half) of column g, so of 4 lanes one holds taps,
    // in the half that they are packed in, and three hold zeros. So that two units of 8 channels
    // share the loads of their taps, the columns of the second are 2 channels off: its taps are in
    // the lanes next to those of the first. (The weights of the projection are packed in that
    // order.)
    const int turned = (lane + 8) % 32;
    const bool holds[2] = {q == g / 2, q == turned / 8};
    const int tap_channel = holds[1] ? 8 + turned / 4 : g;
    const uint32_t project_fragments = weights + kSizes.project + lane * 16;
    uint32_t window_at = window;
    const auto convolve = [&](int s, uint32_t(&d)[kOutTiles][4]) {
      uint32_t pair_taps[3][3];  // [column of the window][row]
      const uint32_t taps_at = weights + kSizes.depthwise + s * kSizes.depthwise_pair;
      {
        const uint4 w0 = load_shared16(taps_at + tap_channel * 16);
        const uint4 w1 = load_shared16(taps_at + 256 + tap_channel * 16);
        pair_taps[0][0] = w0.x, pair_taps[0][1] = w0.y, pair_taps[0][2] = w0.z;
        pair_taps[1][0] = w0.w, pair_taps[1][1] = w1.x, pair_taps[1][2] = w1.y;
        pair_taps[2][0] = w1.z, pair_taps[2][1] = w1.w;
        pair_taps[2][2] = load_shared4(taps_at + 512 + tap_channel * 4);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t bias = load_shared4(taps_at + 576 + h * 128 + (h == 0 ? lane : turned) * 4);
        float v[kCols][kRows][4];
#pragma unroll
        for (int k = 0; k < Shape::kInCols; ++k) {
          DepthwiseColumn<Shape> column;
          column.load(window_at + h * 16 + column_at(k), 2 * row_bytes);
#pragma unroll
          for (int x = 0; x < kCols; ++x) {
            const int j = k - kStride * x;  // column of the window
            if (j < 0 || j > 2) continue;
            const uint32_t taps[3] = {holds[h] ? pair_taps[j][0] : 0u,
                                      holds[h] ? pair_taps[j][1] : 0u,
                                      holds[h] ? pair_taps[j][2] : 0u};
#pragma unroll
            for (int y = 0; y < kRows; ++y) {
              if (j == 0) mma_bias<T>(v[x][y], one, bias);
              column.template add<T>(v[x][y], y, taps);
              if (j == 2) {
                d[x * kRows + y][2 * h] = clamp(v[x][y][0], v[x][y][1]);
                d[x * kRows + y][2 * h + 1] = clamp(v[x][y][2], v[x][y][3]);
              }
            }
          }
        }
      }
      window_at += 32;
    };
    const auto project = [&](int s, const uint32_t(&d)[kOutTiles][4]) {
      const uint32_t fragments = project_fragments + s * kTiles * 256;
#pragma unroll
      for (int j = 0; j + 2 <= kTiles; j += 2) {
        const uint4 b = load_shared16(fragments + j * 256);
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t) {
          mma<T>(acc[t][j], d[t], b.x, b.y);
          mma<T>(acc[t][j + 1], d[t], b.z, b.w);
        }
      }
      if constexpr (kTiles % 2 == 1) {
        const uint2 b = load_shared8(fragments - lane * 8 + (kTiles - 1) * 256);
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t) mma<T>(acc[t][kTiles - 1], d[t], b.x, b.y);
      }
    };
    if constexpr (Shape::kPipelined) {
      // The next convolution's chain of products runs between those of this projection.
      uint32_t d[2][kOutTiles][4];
      convolve(0, d[0]);
#pragma unroll
      for (int s = 0; s < kPairs; ++s) {
        if (s + 1 < kPairs) convolve(s + 1, d[(s + 1) % 2]);
        project(s, d[s % 2]);
      }
    } else {
#pragma unroll 1
      for (int s = 0; s < kPairs; ++s) {
        uint32_t d[kOutTiles][4];
        convolve(s, d);
        // Keeps the compiler from loading these operands early, for want of registers.
        if (kCols > 1) __syncwarp();
        project(s, d);
      }
    }
  }

  start_next();

  // 6. Output. Of 4, 2 and 1 tiles a lane has 8, 4 and 2 consecutive channels.
  const BlockPlace here = find_place<Shape>(a);
  const WarpPlace<Shape> warp_here(a);
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
    if (kStride == 1 && !Shape::kImage && a.residual) {
      float r[2 * kGroup];
      if (a.k8 > 0) {
        const int width = row_of_source<Shape>(here.x1 - here.x0);
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
  // Channels of the tiles from j on, at most 4 tiles.
  static_assert(kTiles < 4 || kTiles % 4 == 0);
  const auto write_group = [&](int x, int y, int half, int j, const auto& value) {
    if constexpr (kTiles >= 4) {
      write(x, y, half, j, std::integral_constant<int, 4>{}, value);
    } else {
      if constexpr (kTiles >= 2) write(x, y, half, 0, std::integral_constant<int, 2>{}, value);
      if constexpr (kTiles % 2 == 1) {
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
#pragma unroll
          for (int j = 0; j < kTiles; j += 4) {
            write_group(x, y, half, j,
                        [&](int i, int k) { return acc[x * kRows + y][j + i][2 * half + k]; });
          }
        }
      }
    }
    return;
  }

  // 7. The sums of the cluster's blocks: each adds up and writes every splits-th group of tiles.
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
  cluster_arrive();
  cluster_wait();
  constexpr int kGroup = kTiles < 4 ? kTiles : 4, kGroups = kOutTiles * kTiles / kGroup;
  const int others = a.splits - 1;
#pragma unroll 1
  for (int group = (here.rank - warp * kGroups) & others; group < kGroups; group += a.splits) {
    const int t = group * kGroup / kTiles, j0 = group * kGroup % kTiles;
    const int x = t / kRows, y = t % kRows;
    // Of a pixel outside the output not even the sums are read.
    if (warp_image >= here.images || ox0 + x >= a.out_w ||
        oy0 + output_row<kRows>(y, 0) >= a.out_h) {
      continue;
    }
    const uint32_t partial =
        shared0 + a.weights_offset + ((warp * kGroups + group) * kGroup * 32 + lane) * 16;
    float sum[kGroup][4];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const uint4 v = load_shared16(partial + j * 512);
      sum[j][0] = __uint_as_float(v.x);
      sum[j][1] = __uint_as_float(v.y);
      sum[j][2] = __uint_as_float(v.z);
      sum[j][3] = __uint_as_float(v.w);
    }
    // From the next block on, so that not all read the same one's at a time.
#pragma unroll 4
    for (int r = 1; r < a.splits; ++r) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const float4 v = load_cluster(partial + j * 512, (here.rank + r) & others);
        sum[j][0] += v.x;
        sum[j][1] += v.y;
        sum[j][2] += v.z;
        sum[j][3] += v.w;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      write_group(x, y, half, j0, [&](int i, int k) { return sum[i][2 * half + k]; });
    }
  }
  cluster_arrive_relaxed();
  cluster_wait();  // nobody leaves while its sums are read
}

template <typename T, int kIndex>
cudaError_t launch_instance(const BlockArgs& a, const BlockLaunch& launch) {
  const auto kernel = inverted_residual_kernel<T, BlockShape<kIndex>>;
  const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return error;
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
  if (current_device().is_hopper_or_newer()) {
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

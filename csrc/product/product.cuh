// The matrix product behind pointwise convolutions, linear layers and implicit-GEMM convolutions:
//
//   output[z, m, n] = clamp(sum_k A[z, m, k] * weight[z, n, k] + bias[z, n])
//
// weight is (z, n, k), dense, k innermost; output has `pitch` elements from row to row. What A is,
// a loader decides: rows of a matrix, or windows of an image gathered on the fly. z counts the
// products of a batch, or the groups of a convolution.
//
// Thin products (small n or k) are bound by device memory, wide ones by the tensor cores or FFMA.
#pragma once

#include "device/divider.cuh"
#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/mma.cuh"
#include "device/vector.cuh"
#include "kernels.h"
#include "plan/plans.h"

namespace torch_mbv2 {

struct ProductParams {
  const void* weight;
  const void* bias;  // or null
  void* output;
  int64_t m;
  int n, k;
  int n_tiles;
  int z_count;
  int64_t pitch;
  int64_t weight_step, bias_step, output_step;  // elements from one z to the next
  Clamp act;

  static constexpr std::array<size_t, 3> pointers() {
    return {offsetof(ProductParams, weight), offsetof(ProductParams, bias),
            offsetof(ProductParams, output)};
  }
};

// --------------------------------------------------------------------------------------- loaders
//
// A loader copies pieces of kVecSize<T> consecutive k of one row of A to shared memory, zero where
// outside. kAsync loaders use cp.async; the others move single elements through registers and serve
// any alignment.

// Rows of a dense (m, k) matrix.
template <typename T, bool kVectors>
struct MatrixLoader {
  static constexpr const char* kFamily = "gemm";
  struct Params {
    const T* a;
    int64_t step;  // elements from one z to the next

    static constexpr std::array<size_t, 1> pointers() { return {offsetof(Params, a)}; }
  };
  struct Row {
    const T* p;
    bool inside;
  };

  __device__ static Row row(const Params& p, const ProductParams& g, int z, int64_t m) {
    const bool inside = m < g.m;
    return {p.a + z * p.step + (inside ? m : 0) * g.k, inside};
  }

  __device__ static void load(const Params& p, const ProductParams& g, const Row& row, int z, int k,
                              T* to) {
    if constexpr (kVectors) {
      const bool inside = row.inside && k < g.k;
      copy_async16(shared_address(to), row.p + (inside ? k : 0), inside);
    } else {
      Vec<T, kVecSize<T>> v;
#pragma unroll
      for (int i = 0; i < kVecSize<T>; ++i) {
        v.data[i] = row.inside && k + i < g.k ? row.p[k + i] : from_float<T>(0.0f);
      }
      *reinterpret_cast<Vec<T, kVecSize<T>>*>(to) = v;
    }
  }
};

// Windows of an NHWC image: row m is output pixel (image, oh, ow), k is (i, j, c) of the kernel.
// With kVectors a piece never leaves one tap: channels per group are a multiple of kVecSize<T>, and
// every pixel starts on 16 bytes.
template <typename T, bool kVectors>
struct WindowLoader {
  static constexpr const char* kFamily = "conv_implicit_gemm";
  struct Params {
    ConvParams conv;  // of at most 2^31 - 1 output pixels
    Divider out_w, out_h, group_channels, kernel_w;

    // Of `conv` only the input is read.
    static constexpr std::array<size_t, 1> pointers() {
      return {offsetof(Params, conv) + offsetof(ConvParams, input)};
    }
  };
  struct Row {
    const T* image;
    int ih, iw;  // of the window's first tap; far outside for rows beyond the last
  };

  static Params params(const ConvParams& c) {
    return {c, Divider(c.out_w), Divider(c.out_h), Divider(c.in_channels / c.groups),
            Divider(c.kernel_w)};
  }

  __device__ static Row row(const Params& p, const ProductParams& g, int z, int64_t m) {
    const ConvParams& c = p.conv;
    const bool inside = m < g.m;
    uint32_t oh, ow;
    const uint32_t line = p.out_w.divide(inside ? uint32_t(m) : 0, ow);
    const uint32_t image = p.out_h.divide(line, oh);
    return {static_cast<const T*>(c.input) + image * c.in_stride_n +
                int64_t(z) * int(p.group_channels.divisor) * c.in_stride_c,
            inside ? int(oh) * c.stride_h - c.pad_top : INT32_MIN / 2,
            int(ow) * c.stride_w - c.pad_left};
  }

  __device__ static const T* element(const Params& p, const Row& row, int k, bool* inside) {
    const ConvParams& c = p.conv;
    uint32_t channel, j;
    const uint32_t tap = p.group_channels.divide(k, channel);
    const uint32_t i = p.kernel_w.divide(tap, j);
    const int ih = row.ih + int(i) * c.dilation_h, iw = row.iw + int(j) * c.dilation_w;
    *inside = unsigned(ih) < unsigned(c.height) && unsigned(iw) < unsigned(c.width) &&
              int(i) < c.kernel_h;
    return row.image + (ih * c.in_stride_h + iw * c.in_stride_w + int(channel) * c.in_stride_c);
  }

  __device__ static void load(const Params& p, const ProductParams& g, const Row& row, int z, int k,
                              T* to) {
    bool inside;
    if constexpr (kVectors) {
      const T* from = element(p, row, k, &inside);
      copy_async16(shared_address(to), inside ? from : row.image, inside);
    } else {
      Vec<T, kVecSize<T>> v;
#pragma unroll
      for (int i = 0; i < kVecSize<T>; ++i) {
        const T* from = element(p, row, k + i, &inside);
        v.data[i] = inside ? *from : from_float<T>(0.0f);
      }
      *reinterpret_cast<Vec<T, kVecSize<T>>*>(to) = v;
    }
  }
};

// -------------------------------------------------------------------------- 16-bit: tensor cores

// Where the 16-byte piece `piece` of row `row` lies in a tile of kPieces pieces a row: swizzled so
// that the 8 rows that one ldmatrix phase reads fall into different banks.
template <int kPieces>
__device__ __forceinline__ int swizzled(int row, int piece) {
  static_assert(kPieces == 4 || kPieces % 8 == 0);
  return row * kPieces + (kPieces == 4 ? piece ^ ((row >> 1) & 3) : piece ^ (row & 7));
}

// What follows from an entry of kHalfTiles; splits are warps that share the k of one stage.
template <int kIndex>
struct HalfTile {
  static constexpr plan::ProductTile kTile = plan::kHalfTiles[kIndex];
  static constexpr int kM = kTile.m, kN = kTile.n, kK = kTile.k;
  static constexpr int kSplits = kTile.splits, kStages = kTile.stages;
  static constexpr int kWarps = kM / 16 * kSplits;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPieces = kK / 8;
  static constexpr int kStageBytes = (kM + kN) * kK * 2;
  static constexpr int kPitch = kN + 8;  // of the staged output: rows 16 bytes apart in banks
  static constexpr int kOutputBytes = kM * kPitch * 2;
  static constexpr int kPartialBytes = (kSplits - 1) * kM * kN * 4;
  static_assert(kM % 16 == 0 && kN % 16 == 0 && kK % (16 * kSplits) == 0);
  static_assert(kThreads % kPieces == 0);

  static int shared_bytes(int k) {
    const int steps = ceil_div(k, kK);
    int bytes = (steps < kStages ? steps : kStages) * kStageBytes;
    if (bytes < kOutputBytes) bytes = kOutputBytes;
    return bytes < kPartialBytes ? kPartialBytes : bytes;
  }
};

// A thread block owns a kM x kN tile. Warp w owns rows 16 * (w / kSplits) ... + 16, all columns,
// and every kSplits-th step of 16 k. Shared memory: kStages x { A tile (kM x kK), weight tile (kN x
// kK) }, swizzled; afterwards first the partial sums of the other splits (float), then the rounded
// output (kM x kPitch).
template <typename T, typename Tile, typename Loader, bool kVectors>
__global__ void __launch_bounds__(Tile::kThreads)
    half_product(const __grid_constant__ ProductParams g,
                 const __grid_constant__ typename Loader::Params a) {
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int kPieces = Tile::kPieces;
  constexpr int kRowStep = Tile::kThreads / kPieces;  // rows that one pass of all threads loads
  constexpr int kRowsA = ceil_div(Tile::kM, kRowStep);
  constexpr int kRowsB = ceil_div(Tile::kN, kRowStep);
  constexpr int kColumns = Tile::kN / 8;

  const unsigned m_tile = blockIdx.x / g.n_tiles;
  const int n0 = (blockIdx.x - m_tile * g.n_tiles) * Tile::kN;
  const int64_t m0 = int64_t(m_tile) * Tile::kM;
  const int z = blockIdx.y * gridDim.z + blockIdx.z;
  if (z >= g.z_count) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / Tile::kSplits * 16, split = warp % Tile::kSplits;

  // 1. The pieces this thread loads: always the same rows and the same piece of them.
  const int piece = threadIdx.x % kPieces, first_row = threadIdx.x / kPieces;
  typename Loader::Row rows[kRowsA];
#pragma unroll
  for (int i = 0; i < kRowsA; ++i) {
    rows[i] = Loader::row(a, g, z, m0 + first_row + i * kRowStep);
  }
  using WeightLoader = MatrixLoader<T, kVectors>;
  const ProductParams weight_view = [&] {
    ProductParams w = g;
    w.m = g.n;
    return w;
  }();
  const typename WeightLoader::Params weight = {static_cast<const T*>(g.weight), g.weight_step};

  const int steps = ceil_div(g.k, Tile::kK);
  const auto load_stage = [&](int step) {
    T* const tile = reinterpret_cast<T*>(shared + step % Tile::kStages * Tile::kStageBytes);
    T* const weight_tile = tile + Tile::kM * Tile::kK;
    const int k = step * Tile::kK + piece * 8;
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const int row = first_row + i * kRowStep;
      if (Tile::kM % kRowStep == 0 || row < Tile::kM) {
        Loader::load(a, g, rows[i], z, k, tile + swizzled<kPieces>(row, piece) * 8);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      const int row = first_row + i * kRowStep;
      if (Tile::kN % kRowStep == 0 || row < Tile::kN) {
        WeightLoader::load(weight, weight_view, WeightLoader::row(weight, weight_view, z, n0 + row),
                           z, k, weight_tile + swizzled<kPieces>(row, piece) * 8);
      }
    }
  };

  // 2. The product, kStages - 1 stages of loads ahead of it.
  wait_for_input();
  start_next();
  float acc[kColumns][4] = {};
#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (s < steps) load_stage(s);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<Tile::kStages - 2>();
    __syncthreads();
    if (step + Tile::kStages - 1 < steps) load_stage(step + Tile::kStages - 1);
    copy_async_commit();
    const uint32_t tile = shared_address(shared + step % Tile::kStages * Tile::kStageBytes);
    const uint32_t weight_tile = tile + Tile::kM * Tile::kK * 2;
#pragma unroll
    for (int s = 0; s < Tile::kK / 16 / Tile::kSplits; ++s) {
      const int first_piece = (s * Tile::kSplits + split) * 2;
      uint32_t fragment[4];
      load_matrices(fragment,
                    tile + 16 * swizzled<kPieces>(warp_row + lane % 16, first_piece + lane / 16));
#pragma unroll
      for (int j = 0; j < Tile::kN / 16; ++j) {
        uint32_t b[4];
        load_matrices(b, weight_tile + 16 * swizzled<kPieces>(j * 16 + lane / 16 * 8 + lane % 8,
                                                              first_piece + lane / 8 % 2));
        mma<T>(acc[2 * j], fragment, b[0], b[1]);
        mma<T>(acc[2 * j + 1], fragment, b[2], b[3]);
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();

  // 3. Partial sums of the splits, added in order.
  if constexpr (Tile::kSplits > 1) {
    float4* const partial = reinterpret_cast<float4*>(shared);
    const int mine = (warp_row / 16 * kColumns) * 32 + lane;
    constexpr int kStep = Tile::kM * Tile::kN / 4;
    if (split > 0) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        partial[(split - 1) * kStep + mine + j * 32] =
            make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]);
      }
    }
    __syncthreads();
    if (split == 0) {
      for (int other = 0; other < Tile::kSplits - 1; ++other) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const float4 more = partial[other * kStep + mine + j * 32];
          acc[j][0] += more.x;
          acc[j][1] += more.y;
          acc[j][2] += more.z;
          acc[j][3] += more.w;
        }
      }
    }
    __syncthreads();
  }

  // 4. Bias, activation, one rounding; staged so that the stores are whole rows.
  T* const staged = reinterpret_cast<T*>(shared);
  const T* const bias =
      g.bias == nullptr ? nullptr : static_cast<const T*>(g.bias) + z * g.bias_step;
  if (split == 0) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int column = j * 8 + lane % 4 * 2;
      float b[2] = {};
      if (bias != nullptr) {
        if (n0 + column < g.n) b[0] = to_float(bias[n0 + column]);
        if (n0 + column + 1 < g.n) b[1] = to_float(bias[n0 + column + 1]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float pair[2];
        pair[0] = apply(g.act, acc[j][2 * half] + b[0]);
        pair[1] = apply(g.act, acc[j][2 * half + 1] + b[1]);
        store_floats(staged + (warp_row + lane / 4 + half * 8) * Tile::kPitch + column, pair);
      }
    }
  }
  __syncthreads();
  T* const output = static_cast<T*>(g.output) + z * g.output_step;
  constexpr int kOutputPieces = Tile::kN / 8;
  for (int i = threadIdx.x; i < Tile::kM * kOutputPieces; i += Tile::kThreads) {
    const int row = i / kOutputPieces, column = i % kOutputPieces * 8;
    if (m0 + row >= g.m || n0 + column >= g.n) continue;
    const T* const from = staged + row * Tile::kPitch + column;
    T* const to = output + (m0 + row) * g.pitch + n0 + column;
    if (kVectors && n0 + column + 8 <= g.n && g.pitch % 8 == 0) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int j = 0; j < 8 && n0 + column + j < g.n; ++j) to[j] = from[j];
    }
  }
}

// --------------------------------------------------------------------------------- float32: FFMA

// What follows from an entry of kFloatTiles; splits are groups of threads that share the k of a
// stage.
template <int kIndex>
struct FloatTile {
  static constexpr plan::ProductTile kTile = plan::kFloatTiles[kIndex];
  static constexpr int kM = kTile.m, kN = kTile.n, kK = kTile.k;
  static constexpr int kThreadRows = kTile.thread_rows;
  static constexpr int kSplits = kTile.splits, kStages = kTile.stages;
  static constexpr int kSplitK = kK / kSplits;  // of k a group takes of a stage
  static constexpr int kColumnThreads = 8;
  static constexpr int kRowThreads = kM / kThreadRows;
  static constexpr int kGroup = kColumnThreads * kRowThreads;
  static constexpr int kThreads = kGroup * kSplits;
  static constexpr int kMinBlocks = kSplits > 1 ? 2 : 1;  // on a multiprocessor
  static constexpr int kPitch = kK + 4;  // rows 16 bytes apart in banks: no conflicts
  static constexpr int kStageBytes = (kM + kN) * kPitch * 4;
  static constexpr int kPartialBytes = (kSplits - 1) * kM * kN * 4;
  static int shared_bytes(int k) {
    const int steps = ceil_div(k, kK);
    const int bytes = (steps < kStages ? steps : kStages) * kStageBytes;
    return bytes < kPartialBytes ? kPartialBytes : bytes;
  }
};

// A thread block owns a kM x kN tile; thread (split, y, x) owns rows y + kRowThreads * i, i <
// kThreadRows, and columns x + 8 * j, j < kN / 8, for its share of every stage's k. Both tiles lie
// in shared memory as they do in device memory, k innermost, and are read 4 k at a time. Shared
// memory: kStages x { A tile (kM x kPitch), weight tile (kN x kPitch) }; afterwards the partial
// sums of the other splits.
template <typename Tile, typename Loader, bool kVectors>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    float_product(const __grid_constant__ ProductParams g,
                  const __grid_constant__ typename Loader::Params a) {
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int kPieces = Tile::kK / 4;
  constexpr int kRowStep = Tile::kThreads / kPieces;  // rows that one pass of all threads loads
  constexpr int kRowsA = Tile::kM / kRowStep;
  constexpr int kRowsB = ceil_div(Tile::kN, kRowStep);
  constexpr int kRows = Tile::kThreadRows, kColumns = Tile::kN / 8;
  static_assert(Tile::kM % kRowStep == 0);

  const unsigned m_tile = blockIdx.x / g.n_tiles;
  const int n0 = (blockIdx.x - m_tile * g.n_tiles) * Tile::kN;
  const int64_t m0 = int64_t(m_tile) * Tile::kM;
  const int z = blockIdx.y * gridDim.z + blockIdx.z;
  if (z >= g.z_count) return;
  const int split = threadIdx.x / Tile::kGroup, member = threadIdx.x % Tile::kGroup;
  const int x = member % Tile::kColumnThreads, y = member / Tile::kColumnThreads;

  // 1. The pieces this thread loads: always the same rows and the same piece of them.
  const int piece = threadIdx.x % kPieces, first_row = threadIdx.x / kPieces;
  typename Loader::Row rows[kRowsA];
#pragma unroll
  for (int i = 0; i < kRowsA; ++i) {
    rows[i] = Loader::row(a, g, z, m0 + first_row + i * kRowStep);
  }
  using WeightLoader = MatrixLoader<float, kVectors>;
  const ProductParams weight_view = [&] {
    ProductParams w = g;
    w.m = g.n;
    return w;
  }();
  const typename WeightLoader::Params weight = {static_cast<const float*>(g.weight), g.weight_step};

  const int steps = ceil_div(g.k, Tile::kK);
  const auto load_stage = [&](int step) {
    float* const tile = reinterpret_cast<float*>(shared + step % Tile::kStages * Tile::kStageBytes);
    float* const weight_tile = tile + Tile::kM * Tile::kPitch;
    const int k = step * Tile::kK + piece * 4;
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const int row = first_row + i * kRowStep;
      Loader::load(a, g, rows[i], z, k, tile + row * Tile::kPitch + piece * 4);
    }
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      const int row = first_row + i * kRowStep;
      if (Tile::kN % kRowStep == 0 || row < Tile::kN) {
        WeightLoader::load(weight, weight_view, WeightLoader::row(weight, weight_view, z, n0 + row),
                           z, k, weight_tile + row * Tile::kPitch + piece * 4);
      }
    }
  };

  // 2. The product, kStages - 1 stages of loads ahead of it.
  wait_for_input();
  start_next();
  float acc[kRows][kColumns] = {};
  float total[kRows * kColumns] = {};  // with splits only
#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (s < steps) load_stage(s);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<Tile::kStages - 2>();
    __syncthreads();
    if (step + Tile::kStages - 1 < steps) load_stage(step + Tile::kStages - 1);
    copy_async_commit();
    const float* const tile =
        reinterpret_cast<const float*>(shared + step % Tile::kStages * Tile::kStageBytes) +
        split * Tile::kSplitK;
    const float* const weight_tile = tile + Tile::kM * Tile::kPitch;
#pragma unroll
    for (int k = 0; k < Tile::kSplitK; k += 4) {
      float4 left[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        left[i] =
            *reinterpret_cast<const float4*>(tile + (y + Tile::kRowThreads * i) * Tile::kPitch + k);
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float4 right =
            *reinterpret_cast<const float4*>(weight_tile + (x + 8 * j) * Tile::kPitch + k);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          acc[i][j] = fmaf(left[i].x, right.x, acc[i][j]);
          acc[i][j] = fmaf(left[i].y, right.y, acc[i][j]);
          acc[i][j] = fmaf(left[i].z, right.z, acc[i][j]);
          acc[i][j] = fmaf(left[i].w, right.w, acc[i][j]);
        }
      }
    }
    // Long sums of few outputs are where others split k as well: sums of sums round less.
    if constexpr (Tile::kSplits > 1) {
#pragma unroll
      for (int i = 0; i < kRows * kColumns; ++i) {
        float& part = acc[i / kColumns][i % kColumns];
        total[i] += part;
        part = 0.0f;
      }
    }
  }
  copy_async_wait<0>();

  // 3. Partial sums of the splits, added in order.
  if constexpr (Tile::kSplits > 1) {
    __syncthreads();
    float* const partial = reinterpret_cast<float*>(shared) + member;
    constexpr int kStep = Tile::kM * Tile::kN;
    if (split > 0) {
#pragma unroll
      for (int i = 0; i < kRows * kColumns; ++i) {
        partial[(split - 1) * kStep + i * Tile::kGroup] = total[i];
      }
    }
    __syncthreads();
    if (split > 0) return;
    for (int other = 0; other < Tile::kSplits - 1; ++other) {
#pragma unroll
      for (int i = 0; i < kRows * kColumns; ++i) {
        total[i] += partial[other * kStep + i * Tile::kGroup];
      }
    }
#pragma unroll
    for (int i = 0; i < kRows * kColumns; ++i) acc[i / kColumns][i % kColumns] = total[i];
  }

  // 4. Bias, activation, store.
  const float* const bias =
      g.bias == nullptr ? nullptr : static_cast<const float*>(g.bias) + z * g.bias_step;
  float* const output = static_cast<float*>(g.output) + z * g.output_step;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int column = n0 + x + 8 * j;
    if (column >= g.n) continue;
    const float b = bias == nullptr ? 0.0f : bias[column];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = m0 + y + Tile::kRowThreads * i;
      if (row < g.m) output[row * g.pitch + column] = apply(g.act, acc[i][j] + b);
    }
  }
}

// ---------------------------------------------------------------------------------------- launch

// Runs the product on the tile of a plan, which must be one of product_candidates. kMatrix: A is a
// plain matrix. `share`: how much of what was planned for this is.
template <typename T, typename Loader, bool kVectors, bool kMatrix>
cudaError_t launch_product(ProductParams g, const typename Loader::Params& a, int z_count,
                           const plan::ProductPlan& plan, double share, LaunchQueue& queue) {
  constexpr bool kHalf = sizeof(T) == 2;
  cudaError_t error = cudaErrorInvalidValue;
  const auto launch = [&](auto tile, auto kernel) {
    using Tile = decltype(tile);
    g.n_tiles = ceil_div(g.n, Tile::kN);
    g.z_count = z_count;
    const int64_t blocks = ceil_div(g.m, int64_t(Tile::kM)) * g.n_tiles;
    if (blocks > INT32_MAX) return;
    constexpr int kMostZ = 65535;  // of a grid
    const dim3 grid(unsigned(blocks), ceil_div(z_count, kMostZ),
                    z_count < kMostZ ? z_count : kMostZ);
    error = launch_kernel({Loader::kFamily, share * plan.clocks}, kernel, grid, Tile::kThreads,
                          Tile::shared_bytes(g.k), queue, g, a);
  };
  const auto try_tile = [&]<int kIndex>(std::integral_constant<int, kIndex>) {
    if (plan.tile != kIndex) return;
    if constexpr (kHalf) {
      using Tile = HalfTile<kIndex>;
      launch(Tile{}, half_product<T, Tile, Loader, kVectors>);
    } else {
      using Tile = FloatTile<kIndex>;
      launch(Tile{}, float_product<Tile, Loader, kVectors>);
    }
  };
  plan::with_tiles<kHalf, kMatrix, kVectors>([&]<int... kIndices>(plan::TileIndices<kIndices...>) {
    (try_tile(std::integral_constant<int, kIndices>{}), ...);
  });
  return error;
}

}  // namespace torch_mbv2

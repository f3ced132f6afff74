// Depthwise convolution, NHWC: output[n, oh, ow, c] =
//   clamp(bias[c] + sum over (i, j) of input[n, oh * s + i * d - pad, ..., c] * weight[c, i, j]).
// Bound by device memory: input read once, output written once.
#include "common.cuh"

namespace torch_mbv2 {
namespace {

// How rows of outputs are dealt to threads and blocks.
struct RowTiling {
  int channel_vecs;    // vectors of channels in a pixel
  int row_threads;     // threads that make one strip of rows: column tiles x channel vectors
  int blocks_per_row;  // blocks that those threads fill
  int rows;            // output rows a thread makes, one tile after the other
  int strips;          // ceil(out_h / rows)
};

// Makes the compiler forget what it knows of the weights, so that it does not hold them converted to
// float (72 registers) across rows.
template <typename T>
__device__ __forceinline__ void keep_packed(Packed (&weight)[9]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      uint4& w = weight[i].bits;
      asm volatile("" : "+r"(w.x), "+r"(w.y), "+r"(w.z), "+r"(w.w));
    }
  }
}

// 3x3, dilation 1, stride kStride in both directions.
//
// Layout: input, output (batch, height, width, channels); weight (channels, 3, 3).
// A thread owns 16 bytes of channels and walks down `rows` output rows in tiles of kTileH x kTileW
// pixels; its 9 weights a channel stay in registers. Neighbouring threads own neighbouring channels
// (then columns), so that each access of a warp is whole sectors; the overlap of windows and of
// tiles comes from L1. A block owns a run of threads of one strip of rows of one image. No shared
// memory.
template <typename T, int kStride, int kTileH, int kTileW>
__global__ void __launch_bounds__(256, 2)
    depthwise3x3(const __grid_constant__ ConvParams p, const __grid_constant__ RowTiling t) {
  constexpr int kV = kVecSize<T>;
  constexpr int kRows = (kTileH - 1) * kStride + 3;  // input rows and columns under a tile
  constexpr int kCols = (kTileW - 1) * kStride + 3;

  // 1. What this thread owns.
  const unsigned block = blockIdx.x;
  const unsigned strip_index = block / t.blocks_per_row;
  const int thread = (block - strip_index * t.blocks_per_row) * blockDim.x + threadIdx.x;
  if (thread >= t.row_threads) return;
  const unsigned image = strip_index / t.strips;
  const int strip = strip_index - image * t.strips;
  const int column_tile = unsigned(thread) / unsigned(t.channel_vecs);
  const int c0 = (thread - column_tile * t.channel_vecs) * kV;
  const int ow0 = column_tile * kTileW;
  const int channels = p.in_channels;
  const T* const input =
      static_cast<const T*>(p.input) + int64_t(image) * p.height * p.width * channels + c0;
  T* const output = static_cast<T*>(p.output) + int64_t(image) * p.out_h * p.out_w * channels + c0;

  // 2. Its weights: kV channels x 9 taps are 144 contiguous bytes.
  // They stay packed (36 registers): occupancy is worth more here than conversions.
  Packed weight[9];
  {
    const T* const w = static_cast<const T*>(p.weight) + c0 * 9;
    T flat[9 * kV], by_tap[9][kV];
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      reinterpret_cast<uint4&>(flat[i * kV]) = *reinterpret_cast<const uint4*>(w + i * kV);
    }
#pragma unroll
    for (int i = 0; i < 9; ++i) {
#pragma unroll
      for (int v = 0; v < kV; ++v) by_tap[i][v] = flat[v * 9 + i];
      weight[i].bits = reinterpret_cast<const uint4&>(by_tap[i]);
    }
  }
  float bias[kV] = {};
  if (p.bias != nullptr) load_floats(static_cast<const T*>(p.bias) + c0, bias);

  // 3. Its output tiles, downwards.
  const int iw0 = ow0 * kStride - p.pad_left;
  const int oh_end = min((strip + 1) * t.rows, p.out_h);
  for (int oh = strip * t.rows; oh < oh_end; oh += kTileH) {
    float acc[kTileH][kTileW][kV];
#pragma unroll
    for (int y = 0; y < kTileH; ++y) {
#pragma unroll
      for (int x = 0; x < kTileW; ++x) {
#pragma unroll
        for (int v = 0; v < kV; ++v) acc[y][x][v] = bias[v];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int ih = oh * kStride - p.pad_top + r;
      const bool row_inside = unsigned(ih) < unsigned(p.height);
      keep_packed<T>(weight);
      Packed pixels[kCols];
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        const int iw = iw0 + c;
        pixels[c].bits = make_uint4(0, 0, 0, 0);
        if (row_inside && unsigned(iw) < unsigned(p.width)) {
          pixels[c] = load_packed(input + (ih * p.width + iw) * channels);
        }
      }
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        float value[kV];
        unpack<T>(pixels[c], value);
#pragma unroll
        for (int y = 0; y < kTileH; ++y) {
#pragma unroll
          for (int x = 0; x < kTileW; ++x) {
            const int i = r - y * kStride;
            const int j = c - x * kStride;
            if (i >= 0 && i < 3 && j >= 0 && j < 3) {
              float tap[kV];
              unpack<T>(weight[i * 3 + j], tap);
#pragma unroll
              for (int v = 0; v < kV; ++v) acc[y][x][v] = fmaf(value[v], tap[v], acc[y][x][v]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int y = 0; y < kTileH; ++y) {
#pragma unroll
      for (int x = 0; x < kTileW; ++x) {
        if (oh + y < oh_end && ow0 + x < p.out_w) {
#pragma unroll
          for (int v = 0; v < kV; ++v) acc[y][x][v] = apply(p.act, acc[y][x][v]);
          store_floats(output + ((oh + y) * p.out_w + ow0 + x) * channels, acc[y][x]);
        }
      }
    }
  }
}

// Any kernel, stride and dilation. A thread owns one output pixel and kV channels; weights come from
// L1. kV is 16 bytes where the channel count and all bases allow it, else 1.
template <typename T, int kV>
__global__ void __launch_bounds__(256)
    depthwise_any(const __grid_constant__ ConvParams p, int channel_vecs, int64_t threads) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= threads) return;
  const int64_t pixel = thread / channel_vecs;
  const int c0 = int(thread - pixel * channel_vecs) * kV;
  const int64_t row = pixel / p.out_w;
  const int ow = int(pixel - row * p.out_w);
  const int64_t image = row / p.out_h;
  const int oh = int(row - image * p.out_h);
  const int channels = p.in_channels;
  const int taps = p.kernel_h * p.kernel_w;
  const T* const input =
      static_cast<const T*>(p.input) + image * p.height * p.width * channels + c0;
  const T* const weight = static_cast<const T*>(p.weight) + int64_t(c0) * taps;

  float acc[kV] = {};
  if (p.bias != nullptr) load_floats(static_cast<const T*>(p.bias) + c0, acc);
  for (int i = 0; i < p.kernel_h; ++i) {
    const int ih = oh * p.stride_h - p.pad_top + i * p.dilation_h;
    if (unsigned(ih) >= unsigned(p.height)) continue;
    for (int j = 0; j < p.kernel_w; ++j) {
      const int iw = ow * p.stride_w - p.pad_left + j * p.dilation_w;
      if (unsigned(iw) >= unsigned(p.width)) continue;
      float value[kV];
      load_floats(input + (ih * p.width + iw) * channels, value);
      const T* const w = weight + i * p.kernel_w + j;
#pragma unroll
      for (int v = 0; v < kV; ++v) acc[v] = fmaf(value[v], to_float(w[v * taps]), acc[v]);
    }
  }
#pragma unroll
  for (int v = 0; v < kV; ++v) acc[v] = apply(p.act, acc[v]);
  store_floats(static_cast<T*>(p.output) + pixel * channels + c0, acc);
}

// Tall strips read the least, but a small batch needs many short ones to fill the chip: the tallest
// strip, of at most 16 rows, that still gives every multiprocessor four blocks.
int rows_per_strip(int64_t blocks_per_tile_row, int out_h, int tile_h, int multiprocessors) {
  int rows = 16;
  while (rows > tile_h &&
         blocks_per_tile_row * ceil_div(out_h, rows) < int64_t(4) * multiprocessors) {
    rows /= 2;
  }
  return rows;
}

template <typename T, int kStride>
cudaError_t launch3x3(const ConvParams& p, cudaStream_t stream) {
  constexpr int kTileH = 1, kTileW = 2;
  RowTiling t;
  t.channel_vecs = p.in_channels / kVecSize<T>;
  t.row_threads = ceil_div(p.out_w, kTileW) * t.channel_vecs;
  t.blocks_per_row = ceil_div(t.row_threads, 256);
  const int block = ceil_div(ceil_div(t.row_threads, t.blocks_per_row), 32) * 32;
  t.rows = rows_per_strip(p.batch * t.blocks_per_row, p.out_h, kTileH, sm_count());
  t.strips = ceil_div(p.out_h, t.rows);
  // One launch covers as many images as fit the grid (2^31 - 1 blocks).
  const int64_t blocks_per_image = int64_t(t.strips) * t.blocks_per_row;
  const int64_t images_per_launch = INT32_MAX / blocks_per_image;
  ConvParams part = p;
  for (int64_t first = 0; first < p.batch; first += images_per_launch) {
    part.batch = p.batch - first < images_per_launch ? p.batch - first : images_per_launch;
    part.input = static_cast<const T*>(p.input) + first * p.height * p.width * p.in_channels;
    part.output = static_cast<T*>(p.output) + first * p.out_h * p.out_w * p.in_channels;
    depthwise3x3<T, kStride, kTileH, kTileW>
        <<<unsigned(part.batch * blocks_per_image), block, 0, stream>>>(part, t);
  }
  return cudaGetLastError();
}

template <typename T, int kV>
cudaError_t launch_any(const ConvParams& p, cudaStream_t stream) {
  const int channel_vecs = p.in_channels / kV;
  const int64_t threads = p.batch * p.out_h * p.out_w * channel_vecs;
  const int64_t blocks = ceil_div(threads, int64_t(256));
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  depthwise_any<T, kV><<<unsigned(blocks), 256, 0, stream>>>(p, channel_vecs, threads);
  return cudaGetLastError();
}

}  // namespace

cudaError_t conv_depthwise(const ConvParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.out_channels == 0 || p.out_h == 0 || p.out_w == 0) return cudaSuccess;
  return dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = p.in_channels % kVecSize<T> == 0 && is_aligned16(p.input) &&
                         is_aligned16(p.weight) && is_aligned16(p.output) &&
                         (p.bias == nullptr || is_aligned16(p.bias));
    if (!vectors) return launch_any<T, 1>(p, stream);
    const bool plain = p.kernel_h == 3 && p.kernel_w == 3 && p.dilation_h == 1 &&
                       p.dilation_w == 1 && p.stride_h == p.stride_w;
    if (plain && p.stride_h == 1) return launch3x3<T, 1>(p, stream);
    if (plain && p.stride_h == 2) return launch3x3<T, 2>(p, stream);
    return launch_any<T, kVecSize<T>>(p, stream);
  });
}

}  // namespace torch_mbv2

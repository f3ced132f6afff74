// Winograd convolution F(2x2, 3x3), after Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks" (2016). Each 2 x 2 tile of the output comes from a 4 x 4 patch d of the input:
//
//   Y = A^T [ sum over Cin of (G g G^T) * (B^T d B) ] A     (* elementwise)
//
// so 16 products do the work of 36. The 16 sums over Cin are 16 matrix products, one per position
// in the transformed patch:
//
//   U[t, cout, cin] = (G g G^T)_t      V[t, tile, cin] = (B^T d B)_t
//   M[t, tile, cout] = sum over cin of V[t, tile, cin] * U[t, cout, cin]          t < 16
//
// Transforms and products are float32 in every dtype. U, V and M live in the workspace; tiles are
// worked off in chunks so that it stays small.
#include <algorithm>

#include "device/element.cuh"
#include "device/launch.cuh"
#include "kernels.h"
#include "plan/winograd.h"

namespace torch_mbv2 {
namespace {

constexpr int kThreads = 256;
plan::WinogradPlan plan_of(const ConvParams& p) {
  return plan::plan_winograd({p.batch, p.out_h, p.out_w, p.in_channels, p.out_channels});
}

// The tiles [first, first + count) of the batch, numbered image, row, column.
struct TileArgs {
  ConvParams conv;
  float* transformed;  // V, or M
  int64_t first, count;
  int tiles_h, tiles_w;

  static constexpr std::array<size_t, 5> pointers() {
    static_assert(offsetof(TileArgs, conv) == 0);
    const auto conv = ConvParams::pointers();
    return {conv[0], conv[1], conv[2], conv[3], offsetof(TileArgs, transformed)};
  }
};

struct TilePlace {
  int64_t image;
  int row, column;
};

__device__ __forceinline__ TilePlace place(const TileArgs& a, int64_t tile) {
  const int64_t line = tile / a.tiles_w;
  const int64_t image = line / a.tiles_h;
  return {image, int(line - image * a.tiles_h), int(tile - line * a.tiles_w)};
}

// U = G g G^T. A thread owns one (cout, cin); weight is (cout, 3, 3, cin).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    transform_weight(const T* weight, float* transformed, int out_channels, int in_channels) {
  const int64_t count = int64_t(out_channels) * in_channels;
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= count) return;
  const int64_t cout = item / in_channels;
  const T* const g = weight + cout * 9 * in_channels + (item - cout * in_channels);
  float rows[4][3];
  wait_for_input();
  start_next();
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    const float g0 = to_float(g[j * int64_t(in_channels)]);
    const float g1 = to_float(g[(3 + j) * int64_t(in_channels)]);
    const float g2 = to_float(g[(6 + j) * int64_t(in_channels)]);
    rows[0][j] = g0;
    rows[1][j] = 0.5f * (g0 + g1 + g2);
    rows[2][j] = 0.5f * (g0 - g1 + g2);
    rows[3][j] = g2;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* const r = rows[i];
    transformed[(4 * i + 0) * count + item] = r[0];
    transformed[(4 * i + 1) * count + item] = 0.5f * (r[0] + r[1] + r[2]);
    transformed[(4 * i + 2) * count + item] = 0.5f * (r[0] - r[1] + r[2]);
    transformed[(4 * i + 3) * count + item] = r[2];
  }
}

// V = B^T d B. A thread owns one channel of one tile, channels innermost; outside of the image is
// 0. Bound: device memory (each input element is read 4 times, mostly from cache, and written 4
// times).
template <typename T>
__global__ void __launch_bounds__(kThreads) transform_input(const __grid_constant__ TileArgs a) {
  const ConvParams& p = a.conv;
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t tile = item / p.in_channels;
  if (tile >= a.count) return;
  const int channel = int(item - tile * p.in_channels);
  const TilePlace at = place(a, a.first + tile);
  const int top = 2 * at.row - p.pad_top, left = 2 * at.column - p.pad_left;
  const T* const image = static_cast<const T*>(p.input) + at.image * p.in_stride_n + channel;

  wait_for_input();
  start_next();
  float d[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int y = top + i, x = left + j;
      const bool inside = unsigned(y) < unsigned(p.height) && unsigned(x) < unsigned(p.width);
      d[i][j] = inside ? to_float(image[y * p.in_stride_h + x * p.in_stride_w]) : 0.0f;
    }
  }
  float rows[4][4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    rows[0][j] = d[0][j] - d[2][j];
    rows[1][j] = d[1][j] + d[2][j];
    rows[2][j] = d[2][j] - d[1][j];
    rows[3][j] = d[1][j] - d[3][j];
  }
  const int64_t step = a.count * p.in_channels;
  float* const out = a.transformed + item;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* const r = rows[i];
    out[(4 * i + 0) * step] = r[0] - r[2];
    out[(4 * i + 1) * step] = r[1] + r[2];
    out[(4 * i + 2) * step] = r[2] - r[1];
    out[(4 * i + 3) * step] = r[1] - r[3];
  }
}

// Y = A^T m A, bias, activation, one rounding. A thread owns one output channel of one tile;
// outputs beyond an odd edge are dropped. Bound: device memory (16 floats read for 4 outputs).
template <typename T>
__global__ void __launch_bounds__(kThreads) transform_output(const __grid_constant__ TileArgs a) {
  const ConvParams& p = a.conv;
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t tile = item / p.out_channels;
  if (tile >= a.count) return;
  const int channel = int(item - tile * p.out_channels);
  const TilePlace at = place(a, a.first + tile);

  const int64_t step = a.count * p.out_channels;
  const float* const m = a.transformed + item;
  wait_for_input();
  start_next();
  float rows[2][4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float m0 = m[j * step], m1 = m[(4 + j) * step];
    const float m2 = m[(8 + j) * step], m3 = m[(12 + j) * step];
    rows[0][j] = m0 + m1 + m2;
    rows[1][j] = m1 - m2 - m3;
  }
  const float bias = p.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p.bias)[channel]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float y[2] = {rows[i][0] + rows[i][1] + rows[i][2], rows[i][1] - rows[i][2] - rows[i][3]};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int oh = 2 * at.row + i, ow = 2 * at.column + j;
      if (oh >= p.out_h || ow >= p.out_w) continue;
      const int64_t pixel = (at.image * p.out_h + oh) * p.out_w + ow;
      static_cast<T*>(p.output)[pixel * p.out_channels + channel] =
          from_float<T>(apply(p.act, y[j] + bias));
    }
  }
}

unsigned blocks_of(int64_t items) { return unsigned(ceil_div<int64_t>(items, kThreads)); }

}  // namespace

int64_t conv_winograd_workspace(const ConvParams& p) {
  const plan::WinogradPlan plan = plan_of(p);
  return plan.weight_bytes + plan.input_bytes + plan.product_bytes;
}

cudaError_t conv_winograd(const ConvParams& p, void* workspace, LaunchQueue& to) {
  FamilyQueue queue("conv_winograd", to);
  const plan::WinogradPlan plan = plan_of(p);
  if (plan.tiles == 0 || p.out_channels == 0) return cudaSuccess;
  char* const base = static_cast<char*>(workspace);
  float* const u = reinterpret_cast<float*>(base);
  float* const v = reinterpret_cast<float*>(base + plan.weight_bytes);
  float* const m = reinterpret_cast<float*>(base + plan.weight_bytes + plan.input_bytes);
  return dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t weights = int64_t(p.out_channels) * p.in_channels;
    cudaError_t error = cudaSuccess;
    if (weights > 0) {
      error =
          launch_kernel({"conv_winograd"}, transform_weight<T>, blocks_of(weights), kThreads, 0,
                        queue, static_cast<const T*>(p.weight), u, p.out_channels, p.in_channels);
      if (error != cudaSuccess) return error;
    }
    for (int64_t first = 0; first < plan.tiles; first += plan.chunk) {
      const int64_t count = std::min(plan.chunk, plan.tiles - first);
      TileArgs args = {p, v, first, count, plan.tiles_h, plan.tiles_w};
      if (p.in_channels > 0) {
        error = launch_kernel({"conv_winograd"}, transform_input<T>,
                              blocks_of(count * p.in_channels), kThreads, 0, queue, args);
        if (error != cudaSuccess) return error;
      }
      constexpr float kInfinity = INFINITY;
      error = gemm({v,
                    u,
                    nullptr,
                    m,
                    count,
                    p.out_channels,
                    p.in_channels,
                    16,
                    {-kInfinity, kInfinity},
                    DType::kFloat32},
                   queue);
      if (error != cudaSuccess) return error;
      args.transformed = m;
      error = launch_kernel({"conv_winograd"}, transform_output<T>,
                            blocks_of(count * p.out_channels), kThreads, 0, queue, args);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}

}  // namespace torch_mbv2

// Average pooling, NHWC. Both kernels round once and are bound by device memory; windows are summed
// in float32, whole images in float64.
#include "device/launch.cuh"
#include "device/vector.cuh"
#include "kernels.h"

namespace torch_mbv2 {
namespace {

constexpr int kLanes = 32;  // channel vectors of a thread block of global_pool
constexpr int kSplits = 8;  // shares of the pixels of a thread block of global_pool
constexpr int kRun = 8;     // pixels summed in float32 before they join a sum in float64

// output[n, c] = mean over pixels of input[n, pixel, c].
//
// A thread block owns one image and kLanes vectors of kV channels; thread (x, y) sums every
// kSplits-th pixel of vector x, from y on. Shared memory: double partial[kSplits][kLanes * kV], at
// most 16 KB; thread row 0 adds the kSplits partial sums in order, so that the result does not
// depend on timing. A mean of thousands of pixels of either sign is small beside its terms: float32
// alone would show it.
template <typename T, int kV>
__global__ void __launch_bounds__(kLanes* kSplits)
    global_pool(const __grid_constant__ GlobalPoolParams p, int slices, double scale) {
  __shared__ double partial[kSplits][kLanes * kV];
  const unsigned image = blockIdx.x / slices;
  const int slice = blockIdx.x - image * slices;
  const int c0 = (slice * kLanes + threadIdx.x) * kV;
  const bool inside = c0 < p.channels;

  wait_for_input();
  start_next();

  // 1. This thread's share of the pixels.
  double sum[kV] = {};
  if (inside) {
    const T* const input = static_cast<const T*>(p.input) + int64_t(image) * p.pixels * p.channels;
    for (int64_t pixel = threadIdx.y; pixel < p.pixels;) {
      float part[kV] = {};
      for (int i = 0; i < kRun && pixel < p.pixels; ++i, pixel += kSplits) {
        float value[kV];
        load_floats(input + pixel * p.channels + c0, value);
#pragma unroll
        for (int v = 0; v < kV; ++v) part[v] += value[v];
      }
#pragma unroll
      for (int v = 0; v < kV; ++v) sum[v] += part[v];
    }
  }
#pragma unroll
  for (int v = 0; v < kV; ++v) partial[threadIdx.y][v * kLanes + threadIdx.x] = sum[v];
  __syncthreads();

  // 2. The shares, added in order.
  if (threadIdx.y == 0 && inside) {
    float mean[kV];
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      for (int y = 1; y < kSplits; ++y) sum[v] += partial[y][v * kLanes + threadIdx.x];
      mean[v] = float(sum[v] * scale);
    }
    store_floats(static_cast<T*>(p.output) + int64_t(image) * p.channels + c0, mean);
  }
}

// One output pixel and kV channels a thread; neighbouring threads own neighbouring channels.
template <typename T, int kV>
__global__ void BOUNDS_WITHOUT_SPILLS(256)
    window_pool(const __grid_constant__ PoolParams p, int channel_vecs, int64_t threads) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= threads) return;
  const int64_t pixel = thread / channel_vecs;
  const int c0 = int(thread - pixel * channel_vecs) * kV;
  const int64_t row = pixel / p.out_w;
  const int ow = int(pixel - row * p.out_w);
  const int64_t image = row / p.out_h;
  const int oh = int(row - image * p.out_h);

  // 1. The window, cut to the padded input (for the divisor) and to the input.
  const int h0 = oh * p.stride_h - p.pad_h, w0 = ow * p.stride_w - p.pad_w;
  const int h1 = min(h0 + p.kernel_h, p.height + p.pad_h);
  const int w1 = min(w0 + p.kernel_w, p.width + p.pad_w);
  const int top = max(h0, 0), left = max(w0, 0);
  const int bottom = min(h1, p.height), right = min(w1, p.width);
  int64_t divisor = p.divisor_override;
  if (divisor == 0) {
    divisor =
        p.count_include_pad ? int64_t(h1 - h0) * (w1 - w0) : int64_t(bottom - top) * (right - left);
  }

  // 2. Its sum.
  wait_for_input();
  start_next();
  const T* const input =
      static_cast<const T*>(p.input) + image * p.height * p.width * p.channels + c0;
  float sum[kV] = {};
  for (int h = top; h < bottom; ++h) {
    for (int w = left; w < right; ++w) {
      float value[kV];
      load_floats(input + (h * p.width + w) * p.channels, value);
#pragma unroll
      for (int v = 0; v < kV; ++v) sum[v] += value[v];
    }
  }
  // A window with no input pixel gives 0, as in stock PyTorch.
  const bool empty = top >= bottom || left >= right;
#pragma unroll
  for (int v = 0; v < kV; ++v) sum[v] = empty ? 0.0f : sum[v] / float(divisor);
  store_floats(static_cast<T*>(p.output) + pixel * p.channels + c0, sum);
}

template <typename T, int kV>
cudaError_t launch_global(const GlobalPoolParams& p, LaunchQueue& queue) {
  const int slices = ceil_div(p.channels, kLanes * kV);
  const int64_t images_per_launch = INT32_MAX / slices;
  const double scale = 1.0 / double(p.pixels);
  GlobalPoolParams part = p;
  for (int64_t first = 0; first < p.batch; first += images_per_launch) {
    part.batch = p.batch - first < images_per_launch ? p.batch - first : images_per_launch;
    part.input = static_cast<const T*>(p.input) + first * p.pixels * p.channels;
    part.output = static_cast<T*>(p.output) + first * p.channels;
    const cudaError_t error =
        launch_kernel({"global_avg_pool2d"}, global_pool<T, kV>, unsigned(part.batch * slices),
                      dim3(kLanes, kSplits), 0, queue, part, slices, scale);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename T, int kV>
cudaError_t launch_window(const PoolParams& p, LaunchQueue& queue) {
  const int channel_vecs = p.channels / kV;
  const int64_t threads = p.batch * p.out_h * p.out_w * channel_vecs;
  const int64_t blocks = ceil_div(threads, int64_t(256));
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel({"avg_pool2d"}, window_pool<T, kV>, unsigned(blocks), 256, 0, queue, p,
                       channel_vecs, threads);
}

}  // namespace

cudaError_t global_avg_pool2d(const GlobalPoolParams& p, LaunchQueue& queue) {
  if (p.batch == 0 || p.channels == 0) return cudaSuccess;
  return dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors =
        p.channels % kVecSize<T> == 0 && is_aligned16(p.input) && is_aligned16(p.output);
    return vectors ? launch_global<T, kVecSize<T>>(p, queue) : launch_global<T, 1>(p, queue);
  });
}

cudaError_t avg_pool2d(const PoolParams& p, LaunchQueue& queue) {
  if (p.batch == 0 || p.channels == 0 || p.out_h == 0 || p.out_w == 0) return cudaSuccess;
  return dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors =
        p.channels % kVecSize<T> == 0 && is_aligned16(p.input) && is_aligned16(p.output);
    return vectors ? launch_window<T, kVecSize<T>>(p, queue) : launch_window<T, 1>(p, queue);
  });
}

}  // namespace torch_mbv2

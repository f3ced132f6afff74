// Depthwise convolution.
//
//   output[n, y, x, c] = clamp(bias[c] + sum over i < kh, j < kw of weight[c, i, j]
//                              * input[n, y * stride_h - pad_top + i * dilation_h,
//                                      x * stride_w - pad_left + j * dilation_w, c])
//
// input (n, height, width, c) and output (n, out_h, out_w, c) dense; weight (c, kh, kw); bias (c)
// or null; input outside the image is 0. Accumulates in float32 in a fixed order, rounds once.
//
// Two kernels: depthwise_strip for the square windows and strides that networks use, with vectors
// of channels; depthwise_any for everything else.
#include "device/divider.cuh"
#include "device/launch.cuh"
#include "device/vector.cuh"
#include "kernels.h"
#include "plan/depthwise.h"

namespace torch_mbv2 {
namespace {

using plan::DepthwiseStrip;
constexpr int kThreads = plan::kDepthwiseThreads;

struct StripArgs {
  const void* input;
  const void* weight;
  const void* bias;
  void* output;
  int height, width, channels, out_h, out_w, pad_top, pad_left;
  int run_rows;     // output rows of a run
  uint32_t items;   // images * runs * strips * vectors, below 2^31
  Divider vectors;  // channel vectors of a pixel
  Divider strips;   // column strips of a row
  Divider runs;     // runs of an image
  Clamp act;

  static constexpr std::array<size_t, 4> pointers() {
    return {offsetof(StripArgs, input), offsetof(StripArgs, weight), offsetof(StripArgs, bias),
            offsetof(StripArgs, output)};
  }
};

// depthwise_strip: window kK x kK, stride kS, dilation 1.
//
// Ownership: a thread owns kVec channels, kWidth output columns and `run_rows` output rows, walked
// downwards. Items are numbered channel vector first, then strip of columns, run of rows, image, so
// a warp's accesses are consecutive along the channels and a thread block's strips are neighbours,
// which find each other's columns in L1. Registers: the weights (kK * kK * kVec floats, read once);
// a step brings kS input rows, of which each element is read once, converted once and added to
// every output that it touches, so kLive = ceil(kK / kS) output rows are being summed at a time;
// input of the next kAhead steps. Row r = kS * t + j of step t meets output row t - d by window row
// kS * d + j, d < kLive; the sums of output row o are in slot o % kLive, a compile-time index in
// the loop unrolled kLive times. Shared memory: none. Bound: device memory (2 x 2 or 4 bytes an
// output at stride 1, where 15 to 20 instructions an output are about half of the issue slots).
template <typename T, int kK, int kS, int kVec, int kWidth, int kAhead>
__global__ void BOUNDS_WITHOUT_SPILLS(kThreads) depthwise_strip(const StripArgs a) {
  constexpr int kLive = (kK + kS - 1) / kS;
  constexpr int kCols = kS * (kWidth - 1) + kK;
  constexpr int kTaps = kK * kK;
  static_assert(kLive % kAhead == 0, "the slot of a step must be a compile-time index");

  // 1. Which channels, columns, rows and image.
  uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= a.items) return;
  uint32_t vector, strip, run;
  item = a.vectors.divide(item, vector);
  item = a.strips.divide(item, strip);
  const uint32_t image = a.runs.divide(item, run);
  wait_for_input();
  start_next();
  const int channel = after_wait<int>(vector * kVec);
  const int x0 = strip * kWidth;
  const int y0 = run * a.run_rows;
  const int rows = min(a.run_rows, a.out_h - y0);
  const int needed = kS * (rows - 1) + kK;  // input rows of the run
  const int steps = rows + kLive - 1;
  const int top = y0 * kS - a.pad_top;
  const int left = x0 * kS - a.pad_left;

  const int64_t in_row = static_cast<int64_t>(a.width) * a.channels;
  const T* next = static_cast<const T*>(a.input) +
                  (image * static_cast<int64_t>(a.height) + top) * in_row +
                  static_cast<int64_t>(left) * a.channels + channel;
  T* out = static_cast<T*>(a.output) +
           ((image * static_cast<int64_t>(a.out_h) + y0) * a.out_w + x0) * a.channels + channel;

  bool in_column[kCols];
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    in_column[c] = static_cast<unsigned>(left + c) < static_cast<unsigned>(a.width);
  }

  // 2. Fill the pipeline: input of the first kAhead steps.
  Word<T, kVec> ahead[kAhead][kS][kCols];
  int next_row = 0;  // of the run's input rows; `next` points at it
  auto load_column = [&](int column, int j) {
    const int r = next_row + j;
    const bool in_rows =
        r < needed && static_cast<unsigned>(top + r) < static_cast<unsigned>(a.height);
    return load_word<T, kVec>(next + j * in_row + static_cast<int64_t>(column) * a.channels,
                              in_rows && in_column[column]);
  };
#pragma unroll
  for (int t = 0; t < kAhead; ++t) {
#pragma unroll
    for (int j = 0; j < kS; ++j) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) ahead[t][j][c] = load_column(c, j);
    }
    next += kS * in_row;
    next_row += kS;
  }

  // 3. Weights and bias. A thread's weights are kTaps consecutive vectors of kVec.
  float weight[kTaps][kVec];
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    float part[kVec];
    unpack<T, kVec>(load_word<T, kVec>(static_cast<const T*>(a.weight) +
                                       static_cast<int64_t>(channel) * kTaps + i * kVec),
                    part);
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      const int e = i * kVec + v;
      weight[e % kTaps][e / kTaps] = part[v];
    }
  }
  float bias[kVec];
  unpack<T, kVec>(load_word<T, kVec>(static_cast<const T*>(a.bias) + channel, a.bias != nullptr),
                  bias);

  float sum[kLive][kWidth][kVec];
#pragma unroll
  for (int d = 0; d < kLive; ++d) {
#pragma unroll
    for (int x = 0; x < kWidth; ++x) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) sum[d][x][v] = 0.0f;
    }
  }

  // 4. Walk down. Sums of rows above the run collect parts too and are dropped.
  for (int t0 = 0;; t0 += kLive) {
#pragma unroll
    for (int u = 0; u < kLive; ++u) {
      const int t = t0 + u;
      if (t >= steps) return;
        // 4a. Add the rows of this step; refill each vector as soon as it is unpacked.
#pragma unroll
      for (int j = 0; j < kS; ++j) {
#pragma unroll
        for (int c = 0; c < kCols; ++c) {
          float value[kVec];
          unpack<T, kVec>(ahead[u % kAhead][j][c], value);
          ahead[u % kAhead][j][c] = load_column(c, j);
#pragma unroll
          for (int d = 0; d < kLive; ++d) {
            if (kS * d + j >= kK) continue;
#pragma unroll
            for (int x = 0; x < kWidth; ++x) {
              const int tap = c - kS * x;
              if (tap < 0 || tap >= kK) continue;
#pragma unroll
              for (int v = 0; v < kVec; ++v) {
                float& s = sum[(u - d + kLive) % kLive][x][v];
                s = fmaf(value[v], weight[(kS * d + j) * kK + tap][v], s);
              }
            }
          }
        }
      }
      next += kS * in_row;
      next_row += kS;
      // 4b. The oldest row is complete; its slot starts anew.
      constexpr int kOldest = 1;
      float(&done)[kWidth][kVec] = sum[(u + kOldest) % kLive];
      if (t >= kLive - 1) {
#pragma unroll
        for (int x = 0; x < kWidth; ++x) {
          float result[kVec];
#pragma unroll
          for (int v = 0; v < kVec; ++v) result[v] = apply(a.act, done[x][v] + bias[v]);
          if (x0 + x < a.out_w)
            store_floats<T, kVec>(out + static_cast<int64_t>(x) * a.channels, result);
        }
        out += static_cast<int64_t>(a.out_w) * a.channels;
      }
#pragma unroll
      for (int x = 0; x < kWidth; ++x) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) done[x][v] = 0.0f;
      }
    }
  }
}

template <typename T, int kK, int kS>
cudaError_t launch_strip(const ConvParams& p, int run_rows, LaunchQueue& queue) {
  constexpr DepthwiseStrip kStrip = plan::depthwise_strip(kK, kS, dtype_of<T>);
  const int64_t vectors = p.out_channels / kStrip.vector;
  const int64_t strips = ceil_div(p.out_w, kStrip.width);
  const int64_t runs = ceil_div(p.out_h, run_rows);
  const int64_t in_image = static_cast<int64_t>(p.height) * p.width * p.in_channels;
  const int64_t out_image = static_cast<int64_t>(p.out_h) * p.out_w * p.out_channels;
  return for_each_chunk(p.batch, runs * strips * vectors, [&](int64_t first, int64_t images) {
    StripArgs a;
    a.input = static_cast<const T*>(p.input) + first * in_image;
    a.weight = p.weight;
    a.bias = p.bias;
    a.output = static_cast<T*>(p.output) + first * out_image;
    a.height = p.height;
    a.width = p.width;
    a.channels = p.out_channels;
    a.out_h = p.out_h;
    a.out_w = p.out_w;
    a.pad_top = p.pad_top;
    a.pad_left = p.pad_left;
    a.run_rows = run_rows;
    a.items = static_cast<uint32_t>(images * runs * strips * vectors);
    a.vectors = Divider(static_cast<uint32_t>(vectors));
    a.strips = Divider(static_cast<uint32_t>(strips));
    a.runs = Divider(static_cast<uint32_t>(runs));
    a.act = p.act;
    const unsigned blocks = ceil_div<uint32_t>(a.items, kThreads);
    return launch_kernel({"conv_depthwise"},
                         depthwise_strip<T, kK, kS, kStrip.vector, kStrip.width, kStrip.ahead>,
                         blocks, kThreads, 0, queue, a);
  });
}

struct AnyArgs {
  ConvParams conv;
  uint32_t items;  // images * out_h * out_w * vectors, below 2^31
  Divider vectors, columns, rows;

  static constexpr auto pointers() {
    static_assert(offsetof(AnyArgs, conv) == 0);
    return ConvParams::pointers();
  }
};

// depthwise_any: any window, stride and dilation. A thread owns kVec channels of one output pixel
// and walks the window; items are numbered channel vector first. Shared memory: none. Bound: L1
// (every input element is read kh * kw times).
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) depthwise_any(const AnyArgs a) {
  uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= a.items) return;
  const ConvParams& p = a.conv;
  uint32_t vector, x, y;
  item = a.vectors.divide(item, vector);
  item = a.columns.divide(item, x);
  const int64_t image = a.rows.divide(item, y);
  wait_for_input();
  start_next();
  const int channel = after_wait<int>(vector * kVec);
  const int taps = p.kernel_h * p.kernel_w;

  const T* input = static_cast<const T*>(p.input) +
                   image * p.height * p.width * static_cast<int64_t>(p.in_channels) + channel;
  const T* weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(channel) * taps;
  float sum[kVec] = {};

  const int64_t top = static_cast<int64_t>(y) * p.stride_h - p.pad_top;
  const int64_t left = static_cast<int64_t>(x) * p.stride_w - p.pad_left;
  for (int i = 0; i < p.kernel_h; ++i) {
    const int64_t row = top + static_cast<int64_t>(i) * p.dilation_h;
    if (row < 0 || row >= p.height) continue;
    for (int j = 0; j < p.kernel_w; ++j) {
      const int64_t column = left + static_cast<int64_t>(j) * p.dilation_w;
      if (column < 0 || column >= p.width) continue;
      float value[kVec];
      unpack<T, kVec>(load_word<T, kVec>(input + (row * p.width + column) * p.in_channels), value);
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const float w = to_float(weight[static_cast<int64_t>(v) * taps + i * p.kernel_w + j]);
        sum[v] = fmaf(value[v], w, sum[v]);
      }
    }
  }
  float bias[kVec];
  unpack<T, kVec>(load_word<T, kVec>(static_cast<const T*>(p.bias) + channel, p.bias != nullptr),
                  bias);
#pragma unroll
  for (int v = 0; v < kVec; ++v) sum[v] = apply(p.act, sum[v] + bias[v]);
  store_floats<T, kVec>(
      static_cast<T*>(p.output) + ((image * p.out_h + y) * p.out_w + x) * p.out_channels + channel,
      sum);
}

template <typename T, int kVec>
cudaError_t launch_any(const ConvParams& p, LaunchQueue& queue) {
  const int64_t vectors = p.out_channels / kVec;
  const int64_t per_image = static_cast<int64_t>(p.out_h) * p.out_w * vectors;
  const int64_t in_image = static_cast<int64_t>(p.height) * p.width * p.in_channels;
  const int64_t out_image = static_cast<int64_t>(p.out_h) * p.out_w * p.out_channels;
  return for_each_chunk(p.batch, per_image, [&](int64_t first, int64_t images) {
    AnyArgs a;
    a.conv = p;
    a.conv.input = static_cast<const T*>(p.input) + first * in_image;
    a.conv.output = static_cast<T*>(p.output) + first * out_image;
    a.items = static_cast<uint32_t>(images * per_image);
    a.vectors = Divider(static_cast<uint32_t>(vectors));
    a.columns = Divider(static_cast<uint32_t>(p.out_w));
    a.rows = Divider(static_cast<uint32_t>(p.out_h));
    return launch_kernel({"conv_depthwise"}, depthwise_any<T, kVec>,
                         ceil_div<uint32_t>(a.items, kThreads), kThreads, 0, queue, a);
  });
}

}  // namespace

cudaError_t conv_depthwise(const ConvParams& p, LaunchQueue& queue) {
  if (p.batch <= 0 || p.out_h <= 0 || p.out_w <= 0 || p.out_channels <= 0) return cudaSuccess;
  const plan::DepthwisePlan plan =
      plan::plan_depthwise({.batch = p.batch,
                            .out_h = p.out_h,
                            .out_w = p.out_w,
                            .channels = p.out_channels,
                            .kernel_h = p.kernel_h,
                            .kernel_w = p.kernel_w,
                            .stride_h = p.stride_h,
                            .stride_w = p.stride_w,
                            .dilation_h = p.dilation_h,
                            .dilation_w = p.dilation_w,
                            .aligned = is_aligned16(p.input) && is_aligned16(p.weight) &&
                                       is_aligned16(p.bias) && is_aligned16(p.output),
                            .dtype = p.dtype},
                           queue.device());
  return dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!plan.strips) {
      return plan.vectors ? launch_any<T, kVecSize<T>>(p, queue) : launch_any<T, 1>(p, queue);
    }
    if (p.kernel_h == 3) {
      return p.stride_h == 1 ? launch_strip<T, 3, 1>(p, plan.run_rows, queue)
                             : launch_strip<T, 3, 2>(p, plan.run_rows, queue);
    }
    return p.stride_h == 1 ? launch_strip<T, 5, 1>(p, plan.run_rows, queue)
                           : launch_strip<T, 5, 2>(p, plan.run_rows, queue);
  });
}

}  // namespace torch_mbv2

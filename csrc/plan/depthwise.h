// Which kernel a depthwise convolution runs on, and how it is cut: a pure host function, no CUDA
// needed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan/device.h"
#include "plan/types.h"

namespace torch_mbv2::plan {

constexpr int kDepthwiseThreads = 128;  // of a thread block

struct DepthwiseProblem {
  int64_t batch;
  int out_h, out_w, channels;
  int kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  bool aligned;  // all tensors to 16 bytes
  DType dtype;
};

// An instance of depthwise_strip, for a square window, dilation 1.
struct DepthwiseStrip {
  int vector;  // channels of a thread
  int width;   // output columns of a thread
  int ahead;   // steps whose input is in flight or waiting in registers
};

constexpr bool has_depthwise_strip(int window, int stride) {
  return (window == 3 || window == 5) && (stride == 1 || stride == 2);
}

// Chosen for at most 168 registers, so that 12 or more warps fit a multiprocessor, with 96 to 128
// bytes in flight a thread.
constexpr DepthwiseStrip depthwise_strip(int window, int stride, DType dtype) {
  const int wider = dtype == DType::kFloat32 ? 1 : 2;
  if (window == 3)
    return stride == 1 ? DepthwiseStrip{4, 2 * wider, 3} : DepthwiseStrip{4, wider, 2};
  return stride == 1 ? DepthwiseStrip{2, 4, 1} : DepthwiseStrip{2, 2, 1};
}

struct DepthwisePlan {
  bool strips;   // on depthwise_strip, else on depthwise_any
  bool vectors;  // depthwise_any with vectors of channels
  int run_rows;  // output rows that a thread of depthwise_strip walks
};

// Output rows of a run, given the strips of one output row of the whole batch (in threads).
//
// Model of the time of a multiprocessor, in steps of one thread: it works through `threads` threads
// in whole thread blocks, each of rows + live - 1 steps after a start (indices, weights, first
// loads) worth kStart steps; below kBusy threads it is latency that counts and fewer threads are no
// faster. Long runs read the rows between runs less often; short ones spread a small batch over
// every multiprocessor.
constexpr int choose_run_rows(int out_h, int64_t strips, int live, int multiprocessors) {
  constexpr int64_t kStart = 2, kBusy = 256, kLongest = 28;
  int best_rows = 1;
  int64_t best_cost = INT64_MAX;
  for (int64_t rows = 1; rows <= out_h && rows <= kLongest; ++rows) {
    const int64_t runs = ceil_div<int64_t>(out_h, rows);
    const int64_t blocks = ceil_div<int64_t>(strips * runs, kDepthwiseThreads);
    const int64_t threads = ceil_div<int64_t>(blocks, multiprocessors) * kDepthwiseThreads;
    const int64_t cost = (kStart + rows + live - 1) * std::max(threads, kBusy);
    if (cost < best_cost) {
      best_cost = cost;
      best_rows = static_cast<int>(rows);
    }
  }
  return best_rows;
}

constexpr DepthwisePlan plan_depthwise(const DepthwiseProblem& p, const Device& device) {
  const bool vectors = p.aligned && p.channels % (16 / bytes_of(p.dtype)) == 0;
  const bool square = p.kernel_h == p.kernel_w && p.stride_h == p.stride_w && p.dilation_h == 1 &&
                      p.dilation_w == 1;
  if (!vectors || !square || !has_depthwise_strip(p.kernel_h, p.stride_h)) {
    return {false, vectors, 0};
  }
  const DepthwiseStrip strip = depthwise_strip(p.kernel_h, p.stride_h, p.dtype);
  const int64_t strips = p.batch * ceil_div(p.out_w, strip.width) * (p.channels / strip.vector);
  const int live = ceil_div(p.kernel_h, p.stride_h);
  return {true, true, choose_run_rows(p.out_h, strips, live, device.multiprocessors)};
}

}  // namespace torch_mbv2::plan

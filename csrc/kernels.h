// Launchers of every kernel, torch-free: raw pointers in, cudaError_t out.
//
// All activations are NHWC (channels_last) and dense unless a struct carries strides. Callers
// (bind/) have checked dtypes, ranks, sizes and bounds; launchers choose tiles and add launches for
// the queue's device to it, never allocate, never synchronise, and add none for an empty output.
// Every size that includes the batch is 64-bit.
//
// Structs that kernels take as they are list their pointers, see launch.h.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "launch.h"
#include "plan/block.h"
#include "plan/types.h"

namespace torch_mbv2 {

// output[b, m, n] = clamp(sum_k a[b, m, k] * weight[b, n, k] + bias[n])
// a (batch, m, k), weight (batch, n, k), output (batch, m, n), all row-major and dense; bias (n) or
// null. Accumulates in float32, rounds once. float32 is exact FFMA, never TF32.
struct GemmParams {
  const void* a;
  const void* weight;
  const void* bias;
  void* output;
  int64_t m;
  int n;
  int k;
  int batch;
  Clamp act;
  DType dtype;
};
cudaError_t gemm(const GemmParams& p, LaunchQueue& queue);

// 2-D convolution. Weight layouts: conv_implicit_gemm (out_channels, kernel_h, kernel_w,
// in_channels / groups); conv_depthwise (channels, kernel_h, kernel_w).
// Bottom and right padding follow from out_h and out_w: input outside [0, height) x [0, width) is
// 0.
struct ConvParams {
  const void* input;
  const void* weight;
  const void* bias;  // (out_channels) or null
  void* output;      // NHWC, dense
  int64_t batch;
  int height, width, in_channels;
  int out_h, out_w, out_channels;
  int kernel_h, kernel_w;
  int stride_h, stride_w;
  int pad_top, pad_left;
  int dilation_h, dilation_w;
  int groups;
  // Element strides of the input; offsets within one image are below 2^31. conv_depthwise needs
  // dense NHWC; conv_implicit_gemm takes any, and is fast where in_stride_c == 1.
  int64_t in_stride_n;
  int in_stride_h, in_stride_w, in_stride_c;
  Clamp act;
  DType dtype;

  static constexpr std::array<size_t, 4> pointers() {
    return {offsetof(ConvParams, input), offsetof(ConvParams, weight), offsetof(ConvParams, bias),
            offsetof(ConvParams, output)};
  }
};
cudaError_t conv_implicit_gemm(const ConvParams& p, LaunchQueue& queue);
// in_channels == out_channels == groups.
cudaError_t conv_depthwise(const ConvParams& p, LaunchQueue& queue);

// F(2x2, 3x3) Winograd convolution (Lavin and Gray 2016): stride 1, dilation 1, groups 1, dense
// NHWC input, weight (out_channels, 3, 3, in_channels). Transforms and products are float32 in
// every dtype. `workspace` holds conv_winograd_workspace(p) bytes, 16-byte aligned.
int64_t conv_winograd_workspace(const ConvParams& p);
cudaError_t conv_winograd(const ConvParams& p, void* workspace, LaunchQueue& queue);

// A whole inverted residual, or the stem and the first block of a network: see block/kernel.cuh. On
// a fused plan for the problem, see plan/block.h.
struct BlockParams {
  const void* input;   // NHWC, dense; for a stem an image with the strides and the dtype below
  const void* packed;  // weights/packing.py's, 16-byte aligned
  void* output;        // NHWC, dense
  plan::BlockProblem problem;
  int height, width, in_channels;  // of the input
  bool residual;
  // Of a stem's image; strides are in elements.
  int64_t stride_n;
  int stride_h, stride_w, stride_c;
  DType image_dtype;
};
cudaError_t inverted_residual(const BlockParams& p, const plan::BlockPlan& plan,
                              LaunchQueue& queue);

// Average pooling. The window of output row i is rows [i * stride_h - pad_h, ... + kernel_h), cut
// to the input; the divisor is `divisor_override` if not 0, else the window's size cut to the
// padded input (count_include_pad) or to the input.
struct PoolParams {
  const void* input;  // NHWC, dense
  void* output;       // NHWC, dense
  int64_t batch;
  int height, width, channels;
  int out_h, out_w;
  int kernel_h, kernel_w;
  int stride_h, stride_w;
  int pad_h, pad_w;
  bool count_include_pad;
  int64_t divisor_override;
  DType dtype;

  static constexpr std::array<size_t, 2> pointers() {
    return {offsetof(PoolParams, input), offsetof(PoolParams, output)};
  }
};
cudaError_t avg_pool2d(const PoolParams& p, LaunchQueue& queue);

// output[n, c] = mean over pixels of clamp(sum_k input[n, pixel, k] * weight[c, k] + bias[c]); the
// map before the mean is never stored.
struct ConvPoolParams {
  const void* input;   // (batch, pixels, k), NHWC, dense
  const void* weight;  // (n, k), dense
  const void* bias;    // (n) or null
  void* output;        // (batch, n), dense
  int64_t batch;
  int pixels, k, n;
  Clamp act;
  DType dtype;

  static constexpr std::array<size_t, 4> pointers() {
    return {offsetof(ConvPoolParams, input), offsetof(ConvPoolParams, weight),
            offsetof(ConvPoolParams, bias), offsetof(ConvPoolParams, output)};
  }
};
cudaError_t conv_pool(const ConvPoolParams& p, LaunchQueue& queue);

// output[n, c] = mean over pixels of input[n, pixel, c]; input (batch, pixels, channels) dense.
struct GlobalPoolParams {
  const void* input;
  void* output;
  int64_t batch;
  int64_t pixels;
  int channels;
  DType dtype;

  static constexpr std::array<size_t, 2> pointers() {
    return {offsetof(GlobalPoolParams, input), offsetof(GlobalPoolParams, output)};
  }
};
cudaError_t global_avg_pool2d(const GlobalPoolParams& p, LaunchQueue& queue);

// output[i] = clamp(a[i] + b[i]), rounded once.
struct AddParams {
  const void* a;
  const void* b;
  void* output;
  int64_t numel;
  Clamp act;
  DType dtype;

  static constexpr std::array<size_t, 3> pointers() {
    return {offsetof(AddParams, a), offsetof(AddParams, b), offsetof(AddParams, output)};
  }
};
cudaError_t add(const AddParams& p, LaunchQueue& queue);

// output[n, c * kernel_h * kernel_w + i * kernel_w + j, oh * out_w + ow], as F.unfold; the input
// may have any element strides.
struct Im2colParams {
  const void* input;
  void* output;  // (batch, channels * kernel_h * kernel_w, out_h * out_w), dense
  int64_t batch;
  int height, width, channels;
  int out_h, out_w;
  int kernel_h, kernel_w;
  int stride_h, stride_w;
  int pad_h, pad_w;
  int dilation_h, dilation_w;
  int64_t in_stride_n, in_stride_h, in_stride_w, in_stride_c;
  int element_size;  // bytes: 2 or 4

  static constexpr std::array<size_t, 2> pointers() {
    return {offsetof(Im2colParams, input), offsetof(Im2colParams, output)};
  }
};
cudaError_t im2col(const Im2colParams& p, LaunchQueue& queue);

}  // namespace torch_mbv2

// Launchers of every kernel, torch-free: raw pointers in, cudaError_t out.
//
// All activations are NHWC (channels_last) and dense unless a struct carries strides. Callers
// (bindings.cpp) have checked dtypes, ranks, sizes and bounds; launchers choose tiles and launch on
// `stream` of the current device, never allocate, never synchronise, and do nothing for an empty
// output. Every size that includes the batch is 64-bit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace torch_mbv2 {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

// Output activation: min(max(x, lo), hi) with NaN passed through; -inf and +inf mean unbounded.
struct Clamp {
  float lo;
  float hi;
};

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
cudaError_t gemm(const GemmParams& p, cudaStream_t stream);

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
};
cudaError_t conv_implicit_gemm(const ConvParams& p, cudaStream_t stream);
// in_channels == out_channels == groups.
cudaError_t conv_depthwise(const ConvParams& p, cudaStream_t stream);

// F(2x2, 3x3) Winograd convolution (Lavin and Gray 2016): stride 1, dilation 1, groups 1, dense
// NHWC input, weight (out_channels, 3, 3, in_channels). Transforms and products are float32 in
// every dtype. `workspace` holds conv_winograd_workspace(p) bytes, 16-byte aligned.
int64_t conv_winograd_workspace(const ConvParams& p);
cudaError_t conv_winograd(const ConvParams& p, void* workspace, cudaStream_t stream);

// A whole inverted residual, or the stem and the first block of a network: see
// inverted_residual.cuh. float16 and bfloat16 only; a 3x3 depthwise convolution of stride 1 or 2.
struct InvertedResidualParams {
  const void* input;   // NHWC, dense; for a stem an image with the strides and the dtype below
  const void* packed;  // packing.py's, 16-byte aligned
  void* output;        // NHWC, dense
  int64_t batch;
  int height, width, in_channels;
  int expanded;                // channels of the depthwise convolution
  int expanded_h, expanded_w;  // size of its input
  int out_h, out_w, out_channels;
  int stride;
  int pad_top, pad_left;
  bool expands;             // false: there is no expansion, expanded == in_channels
  bool stem;                // the expansion is a 3x3 convolution of stride 2 of at most 3 channels
  int stem_top, stem_left;  // its padding
  int64_t stride_n;         // element strides of its image
  int stride_h, stride_w, stride_c;
  DType image_dtype;
  bool residual;
  Clamp act;
  DType dtype;
};
// Bytes of the packed weights, or -1 where no kernel serves these channels, strides or dtype.
int64_t inverted_residual_packed_bytes(const InvertedResidualParams& p);
// Whether a tile of the kernel fits the shared memory of the current device.
bool inverted_residual_fits(const InvertedResidualParams& p);
// Only where both of the above say yes.
cudaError_t inverted_residual(const InvertedResidualParams& p, cudaStream_t stream);

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
};
cudaError_t avg_pool2d(const PoolParams& p, cudaStream_t stream);

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
};
cudaError_t conv_pool(const ConvPoolParams& p, cudaStream_t stream);

// output[n, c] = mean over pixels of input[n, pixel, c]; input (batch, pixels, channels) dense.
struct GlobalPoolParams {
  const void* input;
  void* output;
  int64_t batch;
  int64_t pixels;
  int channels;
  DType dtype;
};
cudaError_t global_avg_pool2d(const GlobalPoolParams& p, cudaStream_t stream);

// output[i] = clamp(a[i] + b[i]), rounded once.
struct AddParams {
  const void* a;
  const void* b;
  void* output;
  int64_t numel;
  Clamp act;
  DType dtype;
};
cudaError_t add(const AddParams& p, cudaStream_t stream);

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
};
cudaError_t im2col(const Im2colParams& p, cudaStream_t stream);

}  // namespace torch_mbv2

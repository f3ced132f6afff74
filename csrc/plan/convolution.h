// Which kernel a convolution runs on: a pure host function, no CUDA needed.
#pragma once

#include <cstdint>

#include "plan/types.h"

namespace torch_mbv2::plan {

enum class ConvolutionKernel { kGemm, kDepthwise, kWinograd, kImplicitGemm };

struct ConvolutionProblem {
  int in_channels, out_channels, groups;
  int kernel_h, kernel_w;
  int stride_h, stride_w;
  int dilation_h, dilation_w;
  bool padded;  // on any side
  DType dtype;
};

inline ConvolutionKernel plan_convolution(const ConvolutionProblem& p) {
  if (p.groups > 1) {
    const bool depthwise = p.groups == p.in_channels && p.groups == p.out_channels;
    return depthwise ? ConvolutionKernel::kDepthwise : ConvolutionKernel::kImplicitGemm;
  }
  const bool whole = p.stride_h == 1 && p.stride_w == 1;
  if (p.kernel_h == 1 && p.kernel_w == 1) {
    return whole && !p.padded ? ConvolutionKernel::kGemm : ConvolutionKernel::kImplicitGemm;
  }
  // Winograd's transforms pay off with many channels, and in float32 only, where there are no
  // tensor cores to beat.
  const bool dense = whole && p.dilation_h == 1 && p.dilation_w == 1;
  const bool winograd = p.kernel_h == 3 && p.kernel_w == 3 && dense && p.in_channels >= 64 &&
                        p.out_channels >= 64 && p.dtype == DType::kFloat32;
  return winograd ? ConvolutionKernel::kWinograd : ConvolutionKernel::kImplicitGemm;
}

// Whether the kernel reads an input of any strides, of which one image spans `image_span` elements,
// as it is; otherwise it is copied. Channels that lie apart are gathered one by one, which costs
// nothing where there are few: then they are in any case.
inline bool reads_in_place(const ConvolutionProblem& p, ConvolutionKernel kernel,
                           int64_t image_span, bool dense_channels) {
  constexpr int kFewChannels = 8;
  return kernel == ConvolutionKernel::kImplicitGemm && image_span < INT32_MAX &&
         (dense_channels || p.in_channels / p.groups < kFewChannels);
}

}  // namespace torch_mbv2::plan

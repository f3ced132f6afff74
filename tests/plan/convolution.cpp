// Prints which kernel a convolution runs on, of which the arguments NAME=VALUE change one thing
// each; with "span" or "apart" also whether an input that spans so many elements, or whose channels
// lie apart, is read in place or copied.
#include "plan/convolution.h"

#include <cstdio>

#include "settings.h"

using namespace torch_mbv2;
using namespace torch_mbv2::plan;

int main(int argc, char** argv) {
  ConvolutionProblem p = {.in_channels = 64,
                          .out_channels = 64,
                          .groups = 1,
                          .kernel_h = 3,
                          .kernel_w = 3,
                          .stride_h = 1,
                          .stride_w = 1,
                          .dilation_h = 1,
                          .dilation_w = 1,
                          .padded = true,
                          .dtype = DType::kFloat32};
  int span = -1, apart = -1;
  const Settings settings = {
      {"in", [&](int v) { p.in_channels = v; }},
      {"out", [&](int v) { p.out_channels = v; }},
      {"groups", [&](int v) { p.groups = v; }},
      {"kernel", [&](int v) { p.kernel_h = p.kernel_w = v; }},
      {"kernel_w", [&](int v) { p.kernel_w = v; }},
      {"stride", [&](int v) { p.stride_h = p.stride_w = v; }},
      {"stride_w", [&](int v) { p.stride_w = v; }},
      {"dilation_h", [&](int v) { p.dilation_h = v; }},
      {"padded", [&](int v) { p.padded = v != 0; }},
      {"dtype", [&](int v) { p.dtype = DType(v); }},
      {"span", [&](int v) { span = v; }},
      {"apart", [&](int v) { apart = v; }},
  };
  apply(settings, argc, argv);
  constexpr const char* kNames[] = {"gemm", "depthwise", "winograd", "implicit_gemm"};
  const ConvolutionKernel kernel = plan_convolution(p);
  std::printf("%s\n", kNames[int(kernel)]);
  if (span >= 0 || apart >= 0) {
    std::puts(reads_in_place(p, kernel, span < 0 ? 1000 : span, apart <= 0) ? "in place"
                                                                            : "copied");
  }
}

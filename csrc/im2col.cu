// output[n, (c, i, j), (oh, ow)] = input[n, c, oh * s + i * d - pad, ow * s + j * d - pad], as
// F.unfold. Bound by device memory: the output is kernel_h * kernel_w times the input.
#include "device/launch.cuh"
#include "kernels.h"

namespace torch_mbv2 {
namespace {

constexpr int kBlock = 256;

// A thread block owns 256 windows of one row (n, c, i, j) of the output, so that it writes
// contiguously; a thread owns one window. Word is an unsigned integer of the element's size.
template <typename Word>
__global__ void __launch_bounds__(kBlock)
    im2col_kernel(const __grid_constant__ Im2colParams p, int blocks_per_row) {
  const unsigned row_index = blockIdx.x / blocks_per_row;
  const int window = (blockIdx.x - row_index * blocks_per_row) * kBlock + threadIdx.x;
  if (window >= p.out_h * p.out_w) return;
  const int taps = p.kernel_h * p.kernel_w;
  const unsigned image = row_index / (p.channels * taps);
  const int row = row_index - image * (p.channels * taps);
  const int c = row / taps;
  const int tap = row - c * taps;
  const int i = tap / p.kernel_w, j = tap - i * p.kernel_w;
  const int oh = window / p.out_w, ow = window - oh * p.out_w;
  const int ih = oh * p.stride_h - p.pad_h + i * p.dilation_h;
  const int iw = ow * p.stride_w - p.pad_w + j * p.dilation_w;
  wait_for_input();
  start_next();
  Word value = 0;
  if (unsigned(ih) < unsigned(p.height) && unsigned(iw) < unsigned(p.width)) {
    value = static_cast<const Word*>(p.input)[image * p.in_stride_n + c * p.in_stride_c +
                                              ih * p.in_stride_h + iw * p.in_stride_w];
  }
  static_cast<Word*>(p.output)[int64_t(row_index) * p.out_h * p.out_w + window] = value;
}

template <typename Word>
cudaError_t launch(const Im2colParams& p, LaunchQueue& queue) {
  const int blocks_per_row = ceil_div(p.out_h * p.out_w, kBlock);
  const int64_t rows_per_image = int64_t(p.channels) * p.kernel_h * p.kernel_w;
  const int64_t images_per_launch = INT32_MAX / (rows_per_image * blocks_per_row);
  if (images_per_launch == 0) return cudaErrorInvalidValue;
  Im2colParams part = p;
  for (int64_t first = 0; first < p.batch; first += images_per_launch) {
    part.batch = p.batch - first < images_per_launch ? p.batch - first : images_per_launch;
    part.input = static_cast<const Word*>(p.input) + first * p.in_stride_n;
    part.output = static_cast<Word*>(p.output) + first * rows_per_image * p.out_h * p.out_w;
    const cudaError_t error = launch_kernel({"im2col"}, im2col_kernel<Word>,
                                            unsigned(part.batch * rows_per_image * blocks_per_row),
                                            kBlock, 0, queue, part, blocks_per_row);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t im2col(const Im2colParams& p, LaunchQueue& queue) {
  if (p.batch == 0 || p.channels == 0 || p.out_h == 0 || p.out_w == 0) return cudaSuccess;
  return p.element_size == 4 ? launch<uint32_t>(p, queue) : launch<uint16_t>(p, queue);
}

}  // namespace torch_mbv2

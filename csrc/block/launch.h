// What the host and the kernel of kernel.cuh share: its arguments and its launchers, one for each
// element type, which are compiled apart because they take long.
#pragma once

#include "device/divider.cuh"
#include "kernels.h"
#include "plan/block.h"

namespace torch_mbv2::block {

// How the stem reads its image.
enum class ImageLoad {
  kRows,   // 3 channels of a pixel are neighbours, in the dtype of the weights: rows as they are
  kPairs,  // columns are neighbours, and pairs of them aligned
  kPixels  // anything else
};

struct BlockArgs {
  const void* input;
  const void* packed;
  void* output;
  int64_t batch;
  int height, width;  // of the input or image
  int e_h, e_w;       // of the expanded map
  int out_h, out_w, in_channels, out_channels;
  int pad_top, pad_left;    // of the depthwise convolution
  int chunks, more_chunks;  // of a thread block; the first `more_chunks` of a cluster have one more
  int tile_h, tile_w, images;
  Divider warps_x, warps_y, tiles_x, tiles_y, units, halo_width, halo_height;
  int splits, split_bits;  // a power of 2, its logarithm
  int64_t slice_bytes;
  plan::BlockStorage storage;
  bool residual;
  bool one_round;  // no more thread blocks than multiprocessors
  float upper_bound;
  int64_t image_step;  // elements from one image of the input to the next
  // The stem alone: element strides of the image, its padding, its dtype.
  int stride_h, stride_w, stride_c;
  int stem_top, stem_left;
  DType image_dtype;
  ImageLoad image_load;
  Divider image_pairs;  // pairs of pixels of a row, unless rows are copied as they are

  static constexpr std::array<size_t, 3> pointers() {
    return {offsetof(BlockArgs, input), offsetof(BlockArgs, packed), offsetof(BlockArgs, output)};
  }
};

// Adds the launch of a fused plan. `thread_blocks` are those of all clusters, for one slice of the
// output channels.
cudaError_t launch_f16(const BlockArgs& a, const plan::BlockPlan& plan, int64_t thread_blocks,
                       LaunchQueue& queue);
cudaError_t launch_bf16(const BlockArgs& a, const plan::BlockPlan& plan, int64_t thread_blocks,
                        LaunchQueue& queue);

}  // namespace torch_mbv2::block

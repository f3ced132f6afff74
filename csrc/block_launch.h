// What the host and the kernel of inverted_residual.cuh share: its arguments and its launchers, one
// for each element type, which are compiled apart because they take long.
#pragma once

#include "block_tiles.h"
#include "common.cuh"

namespace torch_mbv2 {

// How the stem reads its image.
enum class ImageLoad {
  kRows,   // 3 channels of a pixel are neighbours, in the dtype of the weights: rows as they are
  kPairs,  // columns are neighbours, and pairs of them aligned
  kPixels  // anything else
};
// Bytes of a row of the image in shared memory before the pixel that precedes its windows, unless
// rows are copied as they are.
constexpr int kImageLead = 8;

struct BlockArgs {
  const void* input;
  const void* packed;
  void* output;
  int64_t batch;
  int height, width;  // of the input or image
  int e_h, e_w;       // of the expanded map
  int out_h, out_w, in_channels, out_channels;
  int pad_top, pad_left;    // of the depthwise convolution
  int k8;                   // 16-byte units of a source pixel in shared memory; 0: no expansion
  int chunks, more_chunks;  // of a block; the first `more_chunks` blocks of a cluster have one more
  int tile_h, tile_w, images;
  Divider warps_x, warps_y, tiles_x, tiles_y, units, halo_width, halo_height;
  int row_pixels;          // of a row of e, with what separates its even and odd pixels
  int odd;                 // where its odd pixels start, if they are apart
  int splits, split_bits;  // a power of 2, its logarithm
  int stages;              // chunks whose weights are in shared memory: 2, or 1
  int blob_bytes;          // of a chunk's weights
  int64_t slice_bytes;
  int weights_offset, expanded_offset, table_offset;  // in shared memory
  bool residual;
  bool one_round;  // no more thread blocks than multiprocessors
  Clamp act;
  int64_t image_step;  // elements from one image of the input to the next
  // The stem alone: element strides of the image, its padding, its dtype.
  int stride_h, stride_w, stride_c;
  int stem_top, stem_left;
  int image_pitch;  // bytes of a row of the image in shared memory
  DType image_dtype;
  ImageLoad image_load;
  Divider image_pairs;  // pairs of pixels of a row, unless rows are copied as they are
};

struct BlockLaunch {
  unsigned blocks, slices, threads, splits;
  size_t shared_bytes;
  cudaStream_t stream;
};

// `kernel` is an index of kBlockKernels.
cudaError_t launch_block_f16(int kernel, const BlockArgs& a, const BlockLaunch& launch);
cudaError_t launch_block_bf16(int kernel, const BlockArgs& a, const BlockLaunch& launch);

}  // namespace torch_mbv2

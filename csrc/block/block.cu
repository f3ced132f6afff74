// inverted_residual of kernels.h: what the kernel is told, and its launch.
#include <algorithm>

#include "block/launch.h"
#include "device/launch.cuh"

namespace torch_mbv2 {
namespace block {
namespace {

ImageLoad image_load(const BlockParams& p) {
  const auto aligned = [&](int64_t stride, int bytes) {
    return stride * bytes_of(p.image_dtype) % bytes == 0;
  };
  const auto start = reinterpret_cast<uintptr_t>(p.input);
  const bool rows = p.image_dtype == p.problem.dtype && p.in_channels == plan::kImageChannels &&
                    p.stride_c == 1 && p.stride_w == p.in_channels && start % 16 == 0 &&
                    aligned(p.stride_h, 16) && aligned(p.stride_n, 16);
  if (rows) return ImageLoad::kRows;
  const int pair = p.image_dtype == DType::kFloat32 ? 8 : 4;
  const bool pairs = p.stride_w == 1 && p.width % 2 == 0 && start % pair == 0 &&
                     aligned(p.stride_h, pair) && aligned(p.stride_c, pair) &&
                     aligned(p.stride_n, pair);
  return pairs ? ImageLoad::kPairs : ImageLoad::kPixels;
}

plan::ImageOrder image_order(const BlockParams& p) {
  // load_image_pixels, which makes the rows of all others, lets windows start in odd columns.
  return image_load(p) == ImageLoad::kRows && p.problem.stem_left % 2 == 0 ? plan::kEvenWindows
                                                                           : plan::kOddWindows;
}

// All that the kernel is told, but for the parts of a batch that it may be launched in.
BlockArgs arguments(const BlockParams& p, const plan::BlockPlan& plan) {
  const plan::BlockProblem& problem = p.problem;
  const plan::BlockTile& t = plan.tile;
  BlockArgs a{};
  a.packed = p.packed;
  if (p.problem.image) {
    a.packed = static_cast<const char*>(p.packed) +
               image_order(p) * plan::order_bytes(problem, plan.layout);
  }
  a.height = p.height;
  a.width = p.width;
  a.e_h = p.problem.e_h;
  a.e_w = p.problem.e_w;
  a.out_h = p.problem.out_h;
  a.out_w = p.problem.out_w;
  a.in_channels = p.in_channels;
  a.out_channels = p.problem.out_channels;
  a.pad_top = p.problem.pad_top;
  a.pad_left = p.problem.pad_left;
  a.chunks = t.chunks / t.cut.splits;
  a.more_chunks = t.chunks % t.cut.splits;
  a.tile_h = t.tile_h;
  a.tile_w = t.tile_w;
  a.images = t.cut.images;
  a.warps_x = Divider(t.cut.warps_x);
  a.warps_y = Divider(t.cut.warps_y);
  a.tiles_x = Divider(t.tiles_x);
  a.tiles_y = Divider(t.tiles_y);
  a.units = Divider(std::max(t.storage.source_units, 1));
  a.halo_height = Divider(t.halo_h);
  a.halo_width = Divider(t.halo_w);
  a.splits = t.cut.splits;
  while (1 << a.split_bits < a.splits) ++a.split_bits;
  a.slice_bytes = plan::slice_bytes(problem, plan.layout);
  a.storage = t.storage;
  a.residual = p.residual;
  a.one_round = t.one_round;
  a.upper_bound = p.problem.activation.hi;
  a.image_step = p.problem.image ? p.stride_n : int64_t(p.height) * p.width * p.in_channels;
  a.stride_h = p.stride_h;
  a.stride_w = p.stride_w;
  a.stride_c = p.stride_c;
  a.stem_top = p.problem.stem_top;
  a.stem_left = p.problem.stem_left;
  a.image_dtype = p.image_dtype;
  a.image_load = image_load(p);
  // Two more than windows, for the pixel before them and an odd start.
  a.image_pairs = Divider(t.halo_w + 2);
  return a;
}

}  // namespace

}  // namespace block

cudaError_t inverted_residual(const BlockParams& p, const plan::BlockPlan& plan,
                              LaunchQueue& queue) {
  const plan::BlockProblem& problem = p.problem;
  if (problem.batch == 0) return cudaSuccess;
  if (!plan.fused) return cudaErrorInvalidValue;
  const plan::BlockTile& t = plan.tile;
  block::BlockArgs a = block::arguments(p, plan);
  const int element = bytes_of(problem.dtype);
  const int source_element = problem.image ? bytes_of(p.image_dtype) : element;
  const int64_t image_out = int64_t(problem.out_h) * problem.out_w * problem.out_channels;
  const int64_t blocks_per_image = int64_t(t.tiles_x) * t.tiles_y * t.cut.splits;
  return for_each_chunk(ceil_div(problem.batch, int64_t(t.cut.images)), blocks_per_image,
                        [&](int64_t first, int64_t groups) {
                          const int64_t image = first * t.cut.images;
                          a.input = static_cast<const char*>(p.input) +
                                    image * a.image_step * source_element;
                          a.output = static_cast<char*>(p.output) + image * image_out * element;
                          a.batch = problem.batch - image;
                          const auto launch = problem.dtype == DType::kFloat16 ? block::launch_f16
                                                                               : block::launch_bf16;
                          return launch(a, plan, groups * blocks_per_image, queue);
                        });
}

}  // namespace torch_mbv2

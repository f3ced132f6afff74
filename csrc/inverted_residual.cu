// inverted_residual of kernels.h: the choice of an instance and a tile, made once for each problem.
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "block_launch.h"

namespace torch_mbv2 {
namespace {

ImageLoad image_load(const InvertedResidualParams& p) {
  const auto aligned = [&](int64_t stride, int bytes) {
    return stride * (p.image_dtype == DType::kFloat32 ? 4 : 2) % bytes == 0;
  };
  const auto start = reinterpret_cast<uintptr_t>(p.input);
  const bool rows = p.image_dtype == p.dtype && p.in_channels == 3 && p.stride_c == 1 &&
                    p.stride_w == 3 && start % 16 == 0 && aligned(p.stride_h, 16) &&
                    aligned(p.stride_n, 16);
  if (rows) return ImageLoad::kRows;
  const int pair = p.image_dtype == DType::kFloat32 ? 8 : 4;
  const bool pairs = p.stride_w == 1 && p.width % 2 == 0 && start % pair == 0 &&
                     aligned(p.stride_h, pair) && aligned(p.stride_c, pair) &&
                     aligned(p.stride_n, pair);
  return pairs ? ImageLoad::kPairs : ImageLoad::kPixels;
}

ImageOrder image_order(const InvertedResidualParams& p) {
  // load_image, which makes the rows of all others, lets windows start in odd columns.
  return image_load(p) == ImageLoad::kRows && p.stem_left % 2 == 0 ? kEvenWindows : kOddWindows;
}

BlockProblem problem_of(const InvertedResidualParams& p) {
  return {p.batch,    p.expanded_h,   p.expanded_w, p.out_h, p.out_w, p.expands ? p.in_channels : 0,
          p.expanded, p.out_channels, p.stride,     p.stem};
}

bool layout_of(const InvertedResidualParams& p, BlockLayout& layout) {
  return p.dtype != DType::kFloat32 && choose_block_layout(problem_of(p), layout);
}

// Bytes of a chunk's weights.
int chunk_bytes(const InvertedResidualParams& p, const BlockLayout& layout) {
  const int steps = p.expands ? expand_steps(p.stem, p.in_channels) : 0;
  return packed_chunk_bytes(layout.chunk, layout.tiles, p.stem, steps);
}

// Bytes of the packed weights, of one order of those of a stem.
int64_t order_bytes(const InvertedResidualParams& p, const BlockLayout& layout) {
  const int chunks = ceil_div(p.expanded, layout.chunk);
  return int64_t(output_slices(p.out_channels)) *
         (int64_t(chunks) * chunk_bytes(p, layout) + layout.tiles * 32);
}

struct Choice {
  bool fits;
  BlockTile tile;
};

// The tile for a problem on the current device. Trying all takes longer than a launch, so it is
// remembered.
Choice choose(const InvertedResidualParams& p) {
  int device = 0;
  cudaGetDevice(&device);
  const BlockProblem problem = problem_of(p);
  const auto key = std::make_tuple(device, problem.batch, problem.e_h, problem.e_w, problem.out_h,
                                   problem.out_w, problem.source_channels, problem.expanded,
                                   problem.out_channels, problem.stride, problem.image);
  static std::mutex mutex;
  static std::map<std::remove_const_t<decltype(key)>, Choice> choices;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = choices.find(key);
  if (found != choices.end()) return found->second;
  const Device limits = current_device();
  Choice choice{};
  choice.fits = choose_block_tile(problem, limits, choice.tile);
  if (limits.arch == 0) return choice;
  // Batches of any size come and go; what they would fill memory with is soon chosen again.
  if (choices.size() >= 4096) choices.clear();
  choices[key] = choice;
  return choice;
}

}  // namespace

int64_t inverted_residual_packed_bytes(const InvertedResidualParams& p) {
  BlockLayout layout;
  if (!layout_of(p, layout)) return -1;
  return order_bytes(p, layout) * (p.stem ? kImageOrders : 1);
}

bool inverted_residual_fits(const InvertedResidualParams& p) {
  BlockLayout layout;
  return layout_of(p, layout) && (p.batch == 0 || choose(p).fits);
}

cudaError_t inverted_residual(const InvertedResidualParams& p, cudaStream_t stream) {
  BlockLayout layout;
  if (!layout_of(p, layout)) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  const Choice choice = choose(p);
  if (!choice.fits) return cudaErrorInvalidValue;
  const BlockTile& t = choice.tile;

  BlockArgs a{};
  a.packed = p.packed;
  if (p.stem) {
    a.packed = static_cast<const char*>(p.packed) + image_order(p) * order_bytes(p, layout);
  }
  a.height = p.height;
  a.width = p.width;
  a.e_h = p.expanded_h;
  a.e_w = p.expanded_w;
  a.out_h = p.out_h;
  a.out_w = p.out_w;
  a.in_channels = p.in_channels;
  a.out_channels = p.out_channels;
  a.pad_top = p.pad_top;
  a.pad_left = p.pad_left;
  a.k8 = p.expands && !p.stem ? source_units(kBlockKernels[t.kernel], p.in_channels) : 0;
  a.chunks = t.chunks / t.splits;
  a.more_chunks = t.chunks % t.splits;
  a.tile_h = t.tile_h;
  a.tile_w = t.tile_w;
  a.warps_x = Divider(t.warps_x);
  a.warps_y = Divider(t.warps_y);
  a.images = t.images;
  a.tiles_x = Divider(t.tiles_x);
  a.tiles_y = Divider(t.tiles_y);
  a.units = Divider(a.k8 > 0 ? a.k8 : 1);
  a.halo_height = Divider((t.tile_h - 1) * p.stride + 3);
  a.halo_width = Divider((t.tile_w - 1) * p.stride + 3);
  a.row_pixels = t.row_pixels;
  a.odd = t.odd;
  a.splits = t.splits;
  while (1 << a.split_bits < a.splits) ++a.split_bits;
  a.stages = t.stages;
  a.blob_bytes = chunk_bytes(p, layout);
  a.slice_bytes = int64_t(t.chunks) * a.blob_bytes + layout.tiles * 32;
  a.weights_offset = t.weights_offset;
  a.expanded_offset = t.expanded_offset;
  a.table_offset = t.table_offset;
  a.residual = p.residual;
  a.one_round = t.one_round;
  a.act = p.act;
  a.stride_h = p.stride_h;
  a.stride_w = p.stride_w;
  a.stride_c = p.stride_c;
  a.stem_top = p.stem_top;
  a.stem_left = p.stem_left;
  a.image_pitch = t.image_pitch;
  a.image_dtype = p.image_dtype;
  a.image_load = image_load(p);
  // Two more than windows, for the pixel before them and an odd start.
  a.image_pairs = Divider(a.halo_width.divisor + 2);

  a.image_step = p.stem ? p.stride_n : int64_t(p.height) * p.width * p.in_channels;
  const int64_t image_out = int64_t(p.out_h) * p.out_w * p.out_channels;
  const int64_t blocks_per_image = int64_t(t.tiles_x) * t.tiles_y * t.splits;
  const int slices = output_slices(p.out_channels);
  return for_each_chunk(
      ceil_div(p.batch, int64_t(t.images)), blocks_per_image, [&](int64_t first, int64_t groups) {
        const int64_t image = first * t.images;
        const int size = p.stem && p.image_dtype == DType::kFloat32 ? 4 : 2;
        a.input = static_cast<const char*>(p.input) + image * a.image_step * size;
        a.output = static_cast<char*>(p.output) + image * image_out * 2;
        a.batch = p.batch - image;
        const BlockLaunch launch = {unsigned(groups * blocks_per_image),
                                    unsigned(slices),
                                    unsigned(32 * t.warps_x * t.warps_y * t.images),
                                    unsigned(t.splits),
                                    size_t(t.shared_bytes),
                                    stream};
        return p.dtype == DType::kFloat16 ? launch_block_f16(t.kernel, a, launch)
                                          : launch_block_bf16(t.kernel, a, launch);
      });
}

}  // namespace torch_mbv2

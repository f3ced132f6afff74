// inverted_residual of kernels.h: the plan of a problem, made once, and its launch.
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "block/launch.h"

namespace torch_mbv2 {
namespace block {
namespace {

ImageLoad image_load(const InvertedResidualParams& p) {
  const auto aligned = [&](int64_t stride, int bytes) {
    return stride * (p.image_dtype == DType::kFloat32 ? 4 : 2) % bytes == 0;
  };
  const auto start = reinterpret_cast<uintptr_t>(p.input);
  const bool rows = p.image_dtype == p.dtype && p.in_channels == plan::kImageChannels &&
                    p.stride_c == 1 && p.stride_w == p.in_channels && start % 16 == 0 &&
                    aligned(p.stride_h, 16) && aligned(p.stride_n, 16);
  if (rows) return ImageLoad::kRows;
  const int pair = p.image_dtype == DType::kFloat32 ? 8 : 4;
  const bool pairs = p.stride_w == 1 && p.width % 2 == 0 && start % pair == 0 &&
                     aligned(p.stride_h, pair) && aligned(p.stride_c, pair) &&
                     aligned(p.stride_n, pair);
  return pairs ? ImageLoad::kPairs : ImageLoad::kPixels;
}

plan::ImageOrder image_order(const InvertedResidualParams& p) {
  // load_image_pixels, which makes the rows of all others, lets windows start in odd columns.
  return image_load(p) == ImageLoad::kRows && p.stem_left % 2 == 0 ? plan::kEvenWindows
                                                                   : plan::kOddWindows;
}

// The plan for a problem on the current device. Trying all tiles takes longer than a launch, so it
// is remembered.
plan::BlockPlan find_plan(const InvertedResidualParams& p) {
  const plan::BlockProblem problem = problem_of(p);
  plan::BlockPlan made = plan::plan_block_layout(problem);
  if (!made.reason.empty()) return made;
  int device = 0;
  cudaGetDevice(&device);
  const auto key =
      std::make_tuple(device, p.dtype, problem.batch, problem.e_h, problem.e_w, problem.out_h,
                      problem.out_w, problem.source_channels, problem.expanded,
                      problem.out_channels, problem.window_h, problem.stride_h, problem.image);
  static std::mutex mutex;
  static std::map<std::remove_const_t<decltype(key)>, plan::BlockPlan> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  const Device limits = current_device();
  made = plan::plan_block(problem, limits);
  if (limits.arch == 0) return made;
  // Batches of any size come and go; what they would fill memory with is soon planned again.
  if (plans.size() >= 4096) plans.clear();
  plans[key] = made;
  return made;
}

// All that the kernel is told, but for the parts of a batch that it may be launched in.
BlockArgs arguments(const InvertedResidualParams& p, const plan::BlockPlan& plan) {
  const plan::BlockProblem problem = problem_of(p);
  const plan::BlockTile& t = plan.tile;
  BlockArgs a{};
  a.packed = p.packed;
  if (p.stem) {
    a.packed = static_cast<const char*>(p.packed) +
               image_order(p) * plan::order_bytes(problem, plan.layout);
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
  a.upper_bound = p.act.hi;
  a.image_step = p.stem ? p.stride_n : int64_t(p.height) * p.width * p.in_channels;
  a.stride_h = p.stride_h;
  a.stride_w = p.stride_w;
  a.stride_c = p.stride_c;
  a.stem_top = p.stem_top;
  a.stem_left = p.stem_left;
  a.image_dtype = p.image_dtype;
  a.image_load = image_load(p);
  // Two more than windows, for the pixel before them and an odd start.
  a.image_pairs = Divider(t.halo_w + 2);
  return a;
}

}  // namespace

plan::BlockProblem problem_of(const InvertedResidualParams& p) {
  plan::BlockProblem problem{};
  problem.dtype = static_cast<plan::DType>(p.dtype);
  problem.activation = {plan::Activation::kClamp, p.act.lo, p.act.hi};
  problem.batch = p.batch;
  problem.e_h = p.expanded_h;
  problem.e_w = p.expanded_w;
  problem.out_h = p.out_h;
  problem.out_w = p.out_w;
  problem.source_channels = p.expands ? p.in_channels : 0;
  problem.expanded = p.expanded;
  problem.out_channels = p.out_channels;
  problem.window_h = problem.window_w = 3;
  problem.stride_h = problem.stride_w = p.stride;
  problem.pad_top = p.pad_top;
  problem.pad_left = p.pad_left;
  problem.image = p.stem;
  problem.stem_window_h = problem.stem_window_w = plan::kStemWindow;
  problem.stem_stride_h = problem.stem_stride_w = plan::kStemStride;
  problem.stem_top = p.stem_top;
  problem.stem_left = p.stem_left;
  problem.image_span = 0;  // the binding has compared the strides
  return problem;
}

cudaError_t run(const InvertedResidualParams& p, const plan::BlockPlan& plan, cudaStream_t stream) {
  if (!plan.fused) return cudaErrorInvalidValue;
  const plan::BlockTile& t = plan.tile;
  BlockArgs a = arguments(p, plan);
  const int element = plan::bytes_of(static_cast<plan::DType>(p.dtype));
  const int source_element =
      p.stem ? plan::bytes_of(static_cast<plan::DType>(p.image_dtype)) : element;
  const int64_t image_out = int64_t(p.out_h) * p.out_w * p.out_channels;
  const int64_t blocks_per_image = int64_t(t.tiles_x) * t.tiles_y * t.cut.splits;
  return for_each_chunk(
      ceil_div(p.batch, int64_t(t.cut.images)), blocks_per_image,
      [&](int64_t first, int64_t groups) {
        const int64_t image = first * t.cut.images;
        a.input = static_cast<const char*>(p.input) + image * a.image_step * source_element;
        a.output = static_cast<char*>(p.output) + image * image_out * element;
        a.batch = p.batch - image;
        const BlockLaunch launch = {unsigned(groups * blocks_per_image),
                                    unsigned(plan.slices),
                                    unsigned(32 * t.cut.warps_x * t.cut.warps_y * t.cut.images),
                                    unsigned(t.cut.splits),
                                    size_t(t.shared_bytes),
                                    stream};
        return p.dtype == DType::kFloat16 ? launch_f16(t.cut.kernel, a, launch)
                                          : launch_bf16(t.cut.kernel, a, launch);
      });
}

}  // namespace block

int64_t inverted_residual_packed_bytes(const InvertedResidualParams& p) {
  return plan::plan_block_layout(block::problem_of(p)).packed_bytes;
}

bool inverted_residual_fits(const InvertedResidualParams& p) { return block::find_plan(p).fused; }

cudaError_t inverted_residual(const InvertedResidualParams& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  return block::run(p, block::find_plan(p), stream);
}

}  // namespace torch_mbv2

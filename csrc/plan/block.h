// The plan of an inverted residual: whether the fused kernel runs it, on which instance and which
// tile, how its weights are packed and how shared memory is cut up; or why not, in words. Pure host
// functions with a cost model, no CUDA needed.
//
//   const BlockPlan plan = plan_for(problem, device);  // of plan/plans.h
//
// The kernel (csrc/block) takes from here its instances, the layout of the packed weights and the
// map of its shared memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "plan/device.h"
#include "plan/types.h"

namespace torch_mbv2::plan {

// ---------------------------------------------------------------------------- Problem

// An inverted residual, or the stem of a network (a 3x3 convolution of stride 2) and its first
// block, as the choice sees it.
struct BlockProblem {
  DType dtype;  // of weights and output
  Activation activation;
  int64_t batch;
  int e_h, e_w;  // the expanded map, which is the input of the depthwise convolution
  int out_h, out_w;
  int source_channels;  // of what is expanded: the input or the image; 0: no expansion
  int expanded, out_channels;
  int window_h, window_w, stride_h, stride_w, pad_top, pad_left;  // of the depthwise convolution
  bool image;  // the source is an image, the expansion a stem
  // Of a stem alone.
  int stem_window_h, stem_window_w, stem_stride_h, stem_stride_w, stem_top, stem_left;
  int64_t image_span;  // elements from the first to the last of one image, which has any strides

  auto operator<=>(const BlockProblem&) const = default;
};

constexpr int kMaxPadding = 64;
constexpr int kImageChannels = 3;  // at most; as many are stored
constexpr int kStemWindow = 3, kStemStride = 2;
constexpr int64_t kMaxImageSpan = INT32_MAX;  // offsets within an image are 32-bit

// ---------------------------------------------------------------------------- Packed weights

constexpr int kMaxBlockTiles = 40;      // of 8 output channels; more are made by several slices
constexpr int kUnitChannels = 8;        // channels that move together: of 2 bytes each,
constexpr int kUnitBytes = 16;          // one access of a lane
constexpr int kFragmentBytes = 32 * 4;  // of 8x8 elements: a register of each lane

// Where the weights of one chunk lie, in bytes; packing.py writes them in this order. Fragments are
// in the order of registers: 16 bytes a lane for two n tiles of 8, and 8 for an odd last one.
struct PackedSizes {
  int project;      // [k step of 16][n tile] fragments
  int depthwise;    // [pair of units of 8 channels]
  int expand_bias;  // [n tile][lane] the fragment for 8 of k: the bias, what rounding lost of it,
                    // zeros; none for an image, where they are the last two of k
  int fixed;        // end of the above; here start the fragments of the expansion,
                    // [k step of 16][pair of n tiles]
  // A pair of units of the depthwise convolution, in bytes: [channel][4 taps], [channel][4 taps],
  // [channel][tap], in the order (0,0) (1,0) (2,0) (0,1) (1,1) (2,1) (0,2) (1,2) (2,2) of (row,
  // column), as pairs of a tap and a zero, where the tap is the low half of even channels and the
  // high half of odd ones; then, of each unit, [lane] the fragment of its biases as in expand_bias.
  int depthwise_pair;
  int depthwise_bias;  // within a pair
};
constexpr PackedSizes packed_sizes(int chunk, int tiles, bool image) {
  PackedSizes s{};
  s.depthwise_bias = 2 * kUnitChannels * 9 * 4;
  s.depthwise_pair = s.depthwise_bias + 2 * kFragmentBytes;
  s.depthwise = chunk / 16 * tiles * 2 * kFragmentBytes;
  s.expand_bias = s.depthwise + chunk / 16 * s.depthwise_pair;
  s.fixed = s.expand_bias + (image ? 0 : chunk / 8 * kFragmentBytes);
  return s;
}
constexpr int packed_chunk_bytes(int chunk, int tiles, bool image, int k_steps) {
  return packed_sizes(chunk, tiles, image).fixed + k_steps * chunk / 16 * 4 * kFragmentBytes;
}
// Biases of the projection, in float32, which end a slice.
constexpr int project_bias_bytes(int tiles) { return tiles * kUnitChannels * 4; }

// What packed weights depend on.
struct BlockLayout {
  int tiles, chunk;
};

// How the weights of a stem are packed, one after the other: for windows that start in odd columns
// of the rows in shared memory, and in even ones.
enum ImageOrder { kOddWindows, kEvenWindows };
constexpr int kImageOrders = 2;

// ---------------------------------------------------------------------------- Instances

// What a kernel instance is compiled for; see BlockInstance of block/instance.cuh.
struct BlockKernel {
  int stride;
  int tiles;               // of 8 output channels
  int rows, cols = 1;      // a warp makes 2 * rows rows of 8 * cols pixels, a lane cols neighbours
  int chunk;               // expanded channels at a time
  bool image = false;      // the source is an image
  bool resident = false;   // at most kFewUnits of the source
  bool pipelined = false;  // a warp starts on its next channels meanwhile, which takes registers
  int pixel_tiles = 1;     // of 16 source pixels that share a read of the expansion's weights
  int warps = 8;           // at most, of a thread block
  int min_blocks = 2;      // thread blocks that a multiprocessor must have registers for
  int window = 3;          // of the depthwise convolution
};
// Of 8 source channels: pixels of so many are copied by one thread each, and a warp can keep the
// weights of their expansion in registers.
constexpr int kFewUnits = 4;
constexpr BlockKernel kBlockKernels[] = {
    // stride 1, few channels: early blocks
    {.stride = 1, .tiles = 2, .rows = 2, .chunk = 48, .resident = true},
    {.stride = 1, .tiles = 3, .rows = 2, .chunk = 48, .resident = true},
    {.stride = 1, .tiles = 3, .rows = 4, .chunk = 48, .resident = true, .warps = 6},
    {.stride = 1, .tiles = 4, .rows = 2, .chunk = 48, .resident = true},
    {.stride = 1,
     .tiles = 8,
     .rows = 1,
     .chunk = 48,
     .resident = true,
     .pipelined = true,
     .warps = 6},
    {.stride = 1, .tiles = 3, .rows = 2, .chunk = 32, .resident = true},
    // stride 2, few channels
    {.stride = 2, .tiles = 2, .rows = 1, .chunk = 48, .resident = true, .pipelined = true},
    {.stride = 2, .tiles = 3, .rows = 1, .chunk = 48, .resident = true, .pipelined = true},
    {.stride = 2, .tiles = 4, .rows = 1, .chunk = 48, .resident = true, .pipelined = true},
    {.stride = 2, .tiles = 4, .rows = 2, .chunk = 48, .resident = true},
    {.stride = 2, .tiles = 8, .rows = 1, .chunk = 48, .resident = true},
    {.stride = 2, .tiles = 3, .rows = 1, .chunk = 32, .resident = true, .pipelined = true},
    // many channels
    {.stride = 1, .tiles = 8, .rows = 1, .cols = 2, .chunk = 48},
    {.stride = 1, .tiles = 8, .rows = 1, .chunk = 48, .pipelined = true},
    {.stride = 1,
     .tiles = 8,
     .rows = 1,
     .cols = 2,
     .chunk = 48,
     .pipelined = true,
     .min_blocks = 1},
    {.stride = 1,
     .tiles = 12,
     .rows = 1,
     .chunk = 48,
     .pipelined = true,
     .warps = 12,
     .min_blocks = 1},
    {.stride = 1,
     .tiles = 12,
     .rows = 1,
     .cols = 2,
     .chunk = 48,
     .pipelined = true,
     .pixel_tiles = 2,
     .min_blocks = 1},
    {.stride = 1, .tiles = 20, .rows = 1, .chunk = 48, .pipelined = true, .min_blocks = 1},
    {.stride = 1, .tiles = 40, .rows = 1, .chunk = 48, .pipelined = true, .min_blocks = 1},
    {.stride = 2, .tiles = 8, .rows = 1, .chunk = 48},
    {.stride = 2,
     .tiles = 12,
     .rows = 1,
     .chunk = 48,
     .pipelined = true,
     .pixel_tiles = 2,
     .min_blocks = 1},
    {.stride = 2,
     .tiles = 20,
     .rows = 1,
     .chunk = 48,
     .pipelined = true,
     .pixel_tiles = 2,
     .min_blocks = 1},
    {.stride = 2, .tiles = 40, .rows = 1, .chunk = 48, .pipelined = true, .min_blocks = 1},
    // the stem and the first block
    {.stride = 1, .tiles = 2, .rows = 2, .chunk = 32, .image = true, .resident = true},
    {.stride = 1, .tiles = 2, .rows = 4, .chunk = 32, .image = true, .resident = true, .warps = 6},
    {.stride = 1, .tiles = 4, .rows = 2, .chunk = 32, .image = true, .resident = true},
    {.stride = 1, .tiles = 2, .rows = 2, .chunk = 48, .image = true, .resident = true},
    {.stride = 1,
     .tiles = 4,
     .rows = 2,
     .chunk = 48,
     .image = true,
     .resident = true,
     .min_blocks = 1},
    {.stride = 1, .tiles = 2, .rows = 1, .cols = 2, .chunk = 32, .image = true, .resident = true},
};
constexpr int kBlockKernelCount = sizeof(kBlockKernels) / sizeof(kBlockKernels[0]);

namespace block_detail {

constexpr int up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

template <typename... Values>
std::string words(const char* format, Values... values) {
  char text[128];
  std::snprintf(text, sizeof(text), format, values...);
  return text;
}

}  // namespace block_detail

// Units of 8 channels of a source pixel in shared memory.
constexpr int source_units(const BlockKernel& kernel, int channels) {
  const int units = ceil_div(channels, kUnitChannels);
  return kernel.resident ? units : block_detail::up(units, 2);
}

// Steps of 16 of k of the expansion.
constexpr int expand_steps(const BlockProblem& p) {
  if (p.source_channels == 0) return 0;
  return p.image ? 2 : ceil_div(p.source_channels, 16);
}

// Of output channels: as few as have no more than kMaxBlockTiles tiles.
constexpr int output_slices(int out_channels) {
  return ceil_div(out_channels, kUnitChannels * kMaxBlockTiles);
}

constexpr int chunk_bytes(const BlockProblem& p, const BlockLayout& layout) {
  return packed_chunk_bytes(layout.chunk, layout.tiles, p.image, expand_steps(p));
}
constexpr int64_t slice_bytes(const BlockProblem& p, const BlockLayout& layout) {
  return int64_t(ceil_div(p.expanded, layout.chunk)) * chunk_bytes(p, layout) +
         project_bias_bytes(layout.tiles);
}
// Of the packed weights; of a stem's, in one order.
constexpr int64_t order_bytes(const BlockProblem& p, const BlockLayout& layout) {
  return output_slices(p.out_channels) * slice_bytes(p, layout);
}

// Whether an instance serves a problem that has a fused kernel, however its weights are laid out.
constexpr bool serves(const BlockKernel& k, const BlockProblem& p) {
  const int slices = output_slices(p.out_channels);
  const int tiles = ceil_div(p.out_channels / kUnitChannels, slices);
  return k.stride == p.stride_h && k.window == p.window_h && k.image == p.image &&
         k.tiles >= tiles &&
         (k.image || !k.resident || p.source_channels <= kFewUnits * kUnitChannels);
}

// The layout with the fewest products to spare; false if no instance serves the problem. packing.py
// makes the same choice.
constexpr bool choose_block_layout(const BlockProblem& p, BlockLayout& best) {
  int64_t least = 0;
  for (const BlockKernel& k : kBlockKernels) {
    if (!serves(k, p)) continue;
    const int64_t cost = int64_t(ceil_div(p.expanded, k.chunk)) * k.chunk * (k.tiles + 8);
    if (least == 0 || cost < least || (cost == least && k.chunk < best.chunk)) {
      least = cost;
      best = {k.tiles, k.chunk};
    }
  }
  return least > 0;
}

// ---------------------------------------------------------------------------- Reasons

namespace block_detail {

inline std::string why_not_channels(const char* which, int channels) {
  if (channels > 0 && channels % kUnitChannels == 0) return {};
  return words("%s channels must be multiples of %d, got %d", which, kUnitChannels, channels);
}

inline std::string why_not_padding(int top, int left) {
  if (top <= kMaxPadding && left <= kMaxPadding) return {};
  return words("padding beyond %d has no fused kernel, got (%d, %d)", kMaxPadding, top, left);
}

inline std::string why_not_stem(const BlockProblem& p) {
  if (p.stem_window_h != kStemWindow || p.stem_window_w != kStemWindow) {
    return words("%dx%d windows of a stem have no fused kernel", p.stem_window_h, p.stem_window_w);
  }
  if (p.stem_stride_h != kStemStride || p.stem_stride_w != kStemStride) {
    return words("a stem's stride must be %d, got (%d, %d)", kStemStride, p.stem_stride_h,
                 p.stem_stride_w);
  }
  if (p.stride_h != 1) return words("a stem's block must have stride 1, got %d", p.stride_h);
  if (p.source_channels < 1 || p.source_channels > kImageChannels) {
    return words("a stem's image must have 1 to %d channels, got %d", kImageChannels,
                 p.source_channels);
  }
  if (p.image_span >= kMaxImageSpan) return "offsets within an image must be below 2^31";
  return why_not_padding(p.stem_top, p.stem_left);
}

}  // namespace block_detail

// Why no instance serves a problem on any GPU; empty if one does, and then `layout` is its layout.
inline std::string why_not_fused(const BlockProblem& p, BlockLayout& layout) {
  using namespace block_detail;
  if (p.dtype == DType::kFloat32) return "float32 has no fused kernel";
  if (p.activation.kind != Activation::kClamp) {
    return words("%s has no fused kernel", name_of(p.activation.kind));
  }
  if (p.activation.lo != 0) {
    return words("the activation's lower bound must be 0, got %g", double(p.activation.lo));
  }
  if (p.window_h != p.window_w ||
      std::none_of(std::begin(kBlockKernels), std::end(kBlockKernels),
                   [&](const BlockKernel& k) { return k.window == p.window_h; })) {
    return words("%dx%d windows have no fused kernel", p.window_h, p.window_w);
  }
  if (p.stride_h != p.stride_w) {
    return words("strides must be equal, got (%d, %d)", p.stride_h, p.stride_w);
  }
  if (p.stride_h != 1 && p.stride_h != 2) {
    return words("stride %d has no fused kernel", p.stride_h);
  }
  std::string reason = why_not_padding(p.pad_top, p.pad_left);
  if (reason.empty() && p.image) reason = why_not_stem(p);
  if (reason.empty() && !p.image && p.source_channels != 0) {
    reason = why_not_channels("input", p.source_channels);
  }
  if (reason.empty()) reason = why_not_channels("expanded", p.expanded);
  if (reason.empty()) reason = why_not_channels("output", p.out_channels);
  if (reason.empty() && !choose_block_layout(p, layout)) {
    reason = words("%d output channels have no fused kernel", p.out_channels);
  }
  return reason;
}

// ---------------------------------------------------------------------------- Tiles

// Into what a problem is cut: the choice. All else follows from it.
struct BlockCut {
  int kernel;            // index of kBlockKernels
  int warps_x, warps_y;  // of an image's tile
  int images;            // of a thread block; more than 1 only where a tile is a whole image
  int splits;            // thread blocks of a cluster that share the expanded channels

  bool operator==(const BlockCut&) const = default;
};

// Rows or columns of the expanded map that an output tile of that size reads.
constexpr int halo_size(int outputs, int stride, int window) {
  return (outputs - 1) * stride + window;
}
// Rows of an image that so many rows of the expanded map read.
constexpr int image_rows(int e_rows) { return (e_rows - 1) * kStemStride + kStemWindow; }
// Bytes of a pixel of the source in shared memory, and of the expanded map: an odd number of
// 16-byte units, so that ldmatrix finds 8 neighbours in different banks.
constexpr int source_pixel_bytes(int units) { return (units | 1) * kUnitBytes; }
constexpr int expanded_pixel_bytes(int chunk, int element_bytes) {
  return chunk * element_bytes + kUnitBytes;
}
// Whether a row of the expanded map holds its even pixels first, then the odd ones: where a lane
// reads every second column, so that 8 lanes find 8 neighbours.
constexpr bool splits_columns(const BlockKernel& k) { return k.stride * k.cols > 1; }

// The shared memory of a thread block. All offsets are in bytes from its start.
struct BlockStorage {
  static constexpr int kSource = 0;  // of the tile with its halo: pixels, or rows of an image
  static constexpr int kBarrierBytes = 8;
  static constexpr int kAddressBytes = 4;  // of `places` and `windows`
  int barriers;                            // [stage] counts the bytes of the stage's weights
  int weights;                             // [stage] of a chunk
  int expanded;                            // [image][row][pixel] of a chunk
  int places;        // [pixel of the source] the address of its pixel in `expanded`, or 0
  int windows;       // [pixel of the source] the address of its window in an image; only for images
  int partial_sums;  // of a cluster's thread blocks, at the end, when only the source is still read
  int bytes;         // of all
  int stages;        // chunks whose weights are there: 2, or 1 where there is no room for more
  int stage_bytes;   // of a chunk's weights
  int source_units;  // of 16 bytes, of a pixel of the source; 0 for an image and if there is none
  int image_row;     // bytes of a row of an image
  int row_pixels;    // of `expanded`, with what separates even and odd ones
  int odd_pixels;    // where the odd ones start, if they are apart
};

// A problem cut into thread blocks, and what that is expected to cost.
struct BlockTile {
  BlockCut cut;
  int tile_h, tile_w;
  int tiles_y, tiles_x;
  int halo_h, halo_w;  // of the expanded map
  int source_rows;     // pixels of the source, filled up to tiles of the tensor cores
  int chunks;
  BlockStorage storage;
  int shared_bytes;      // that a launch asks for: storage.bytes or more
  double thread_blocks;  // of all slices
  bool one_round;        // no more thread blocks than multiprocessors
  double clocks;
};

// What the cost model takes for known; each architecture has its own, see architecture.h. These
// were measured on an H100 (and an H200, which differs in memory alone): instructions were counted
// in the machine code for sm_90, the other constants were fitted to times of the likely tiles of
// the blocks of MobileNetV2 at batch 1, 8, 32 and 256.
struct BlockCosts {
  // Instructions of a warp for 16 pixels of the expansion, ...
  double expand_tile = 10;
  double expand_pair = 16;  // for 16 expanded channels: the bias, clamping, storing
  // ... for its pixels of a chunk, ...
  double convolve_chunk = 130;
  double convolve_pair = 48;   // for 16 expanded channels, besides what follows
  double convolve_tile = 11;   // for 8 channels of 16 pixels, besides the loads of windows
  double project_loads = 0.5;  // of weights, for 16 channels to 8
  // ... to fill shared memory, for 32 pixels or pieces each, ...
  double fill_pixel = 60;
  double fill_image = 19;  // 16 bytes of an image
  double fill_unit = 25;   // 8 channels, where a pixel has many
  // ... and around the chunks.
  double around = 300;
  double output_group = 35;  // to write up to 32 channels of 8 pixels

  // Clocks of a busy multiprocessor for an instruction of a warp, ...
  double busy_instruction = 0.47;
  // ... and for 8 channels of 16 pixels, to add up the sums of a cluster.
  double cluster_sum = 63.0;
  // Clocks from the start of a thread block to its end: for an instruction of its busiest warp, for
  // a tensor-core instruction that another one waits for, and for the rest.
  double alone_instruction = 0.66;
  double alone_product = 45.2;
  double alone_start = 2240;
  // How much longer that is where a warp has nothing to do beside the products that it waits for.
  double waits = 1.47;
  // Between the larger of both (infinity) and their sum (1).
  double blend = 2.47;
  // Share of the multiprocessors that clusters of 4 and more fill: groups of multiprocessors are no
  // multiples of theirs.
  int cluster_share = 10, cluster_whole = 11;
};

namespace block_detail {

// What follows from the cut alone; false if it cuts nothing that a kernel runs.
inline bool set_geometry(const BlockProblem& p, const Device& device, BlockTile& t) {
  const BlockKernel& k = kBlockKernels[t.cut.kernel];
  t.tile_h = 2 * k.rows * t.cut.warps_y;
  t.tile_w = 8 * k.cols * t.cut.warps_x;
  t.tiles_y = ceil_div(p.out_h, t.tile_h);
  t.tiles_x = ceil_div(p.out_w, t.tile_w);
  t.halo_h = halo_size(t.tile_h, k.stride, k.window);
  t.halo_w = halo_size(t.tile_w, k.stride, k.window);
  t.chunks = ceil_div(p.expanded, k.chunk);
  const int height = std::min(t.halo_h, p.e_h), width = std::min(t.halo_w, p.e_w);
  // A row of the source gets an even number of pixels where columns are split.
  const int pixels = t.cut.images * height * (splits_columns(k) ? up(width, 2) : width);
  t.source_rows = up(pixels, 16 * k.pixel_tiles);
  t.thread_blocks = double(ceil_div(p.batch, t.cut.images)) * t.tiles_x * t.tiles_y * t.cut.splits *
                    output_slices(p.out_channels);
  t.one_round = t.thread_blocks <= device.multiprocessors;
  if (t.cut.images > 1 && (t.tiles_x > 1 || t.tiles_y > 1)) return false;
  return t.cut.splits <= t.chunks && (t.cut.splits == 1 || device.is_hopper_or_newer());
}

// The map of shared memory: once for host and kernel. False if it does not fit.
inline bool set_storage(const BlockProblem& p, const Device& device, BlockTile& t) {
  const BlockKernel& k = kBlockKernels[t.cut.kernel];
  const int element = bytes_of(p.dtype);
  BlockStorage& s = t.storage;
  s.source_units = k.image || p.source_channels == 0 ? 0 : source_units(k, p.source_channels);
  // Each column of the expanded map is kStemStride of the image; two units more for an odd start
  // and for the alignment of device memory.
  s.image_row =
      k.image ? up(t.halo_w * kStemStride * kImageChannels * element + 2 * kUnitBytes, kUnitBytes)
              : 0;
  const int source_bytes = k.image ? t.cut.images * image_rows(t.halo_h) * s.image_row
                           : s.source_units == 0
                               ? 0
                               : t.source_rows * source_pixel_bytes(s.source_units);
  // Odd pixels start 4 pixels off a multiple of 8, which keeps the banks of neighbours apart.
  s.odd_pixels = splits_columns(k) ? up((t.halo_w + 1) / 2 + 4, 8) - 4 : 0;
  s.row_pixels = splits_columns(k) ? s.odd_pixels + t.halo_w / 2 : t.halo_w;
  const int expanded_bytes =
      t.cut.images * t.halo_h * s.row_pixels * expanded_pixel_bytes(k.chunk, element);
  const int warps = t.cut.warps_x * t.cut.warps_y * t.cut.images;
  const int sum_bytes =
      t.cut.splits == 1 ? 0 : warps * k.rows * k.cols * k.tiles * 4 * kFragmentBytes;
  s.stage_bytes = chunk_bytes(p, {k.tiles, k.chunk});
  s.weights = up(source_bytes + 2 * BlockStorage::kBarrierBytes, 128);
  s.barriers = s.weights - 2 * BlockStorage::kBarrierBytes;
  s.partial_sums = s.weights;
  for (s.stages = 2; s.stages > 0; --s.stages) {
    s.expanded = up(s.weights + s.stages * s.stage_bytes, 128);
    s.places = up(s.expanded + expanded_bytes, 16);
    s.windows = s.places + t.source_rows * BlockStorage::kAddressBytes;
    s.bytes = s.windows + (k.image ? t.source_rows * BlockStorage::kAddressBytes : 0);
    s.bytes = std::max(s.bytes, s.partial_sums + sum_bytes);
    if (s.bytes <= device.shared_per_block) break;
  }
  t.shared_bytes = s.bytes;
  // (Larger clusters would wait for each other: they do not fill every group of multiprocessors.)
  if (t.cut.splits <= 2 && t.one_round) {
    t.shared_bytes = std::max(t.shared_bytes, device.shared_if_alone());
  }
  return s.stages > 0;
}

// Instructions of warps, and tensor-core instructions that wait for one another.
struct BlockWork {
  double all;        // of all warps of a thread block
  double busiest;    // of its busiest warp
  double dependent;  // of a warp, one after the other
};
inline BlockWork count_work(const BlockProblem& p, const BlockCosts& costs, const BlockTile& t) {
  const BlockKernel& k = kBlockKernels[t.cut.kernel];
  const int steps = expand_steps(p), images = t.cut.images, units = t.storage.source_units;
  const int warps = t.cut.warps_x * t.cut.warps_y * images;
  const int pairs = k.chunk / 16, out_tiles = k.rows * k.cols;
  const int in_cols = halo_size(k.cols, k.stride, k.window);  // of a lane's windows
  const int loads = k.stride == 2 ? k.rows + 1 : k.rows == 1 ? 1 : (k.rows + 3) / 2;
  const int groups = k.tiles / 4 + (k.tiles % 4 >= 2 ? 1 : 0) + k.tiles % 2;  // of output channels
  const double expand =
      steps * (1 + 2 * pairs) + costs.expand_pair * pairs + costs.expand_tile +
      (k.resident ? 0.0 : double(steps * (pairs + 4) + 2 * pairs) / k.pixel_tiles);
  const double convolve =
      pairs * (2 * (in_cols * loads + costs.convolve_tile * out_tiles) +
               k.tiles * (costs.project_loads + out_tiles) + costs.convolve_pair) +
      costs.convolve_chunk;
  const double pixels = images * t.halo_h * t.halo_w;
  const double pieces = images * image_rows(t.halo_h) * (t.storage.image_row / kUnitBytes);
  const double fill = pixels / 32.0 * costs.fill_pixel +
                      (k.image ? pieces / 32.0 * costs.fill_image : 0.0) +
                      (units > kFewUnits ? pixels * units / 32.0 * costs.fill_unit : 0.0);
  const double around = costs.around + out_tiles * 2 * groups * costs.output_group;
  const int rounds = ceil_div(t.source_rows / 16 / k.pixel_tiles, warps);  // of the busiest warp
  const int chunks = ceil_div(t.chunks, t.cut.splits);
  BlockWork work{};
  work.all = chunks * (t.source_rows / 16.0 * expand + warps * convolve) + fill + warps * around;
  work.busiest = chunks * (rounds * k.pixel_tiles * expand + convolve) + fill / warps + around;
  work.dependent = chunks * (rounds * (steps + 1) + pairs * 15);
  return work;
}

// Thread blocks at a time on a multiprocessor: 64 K registers in four parts, shared memory.
inline int resident_thread_blocks(const Device& device, const BlockTile& t) {
  const BlockKernel& k = kBlockKernels[t.cut.kernel];
  const int warps = t.cut.warps_x * t.cut.warps_y * t.cut.images;
  const int registers = (65536 / (k.min_blocks * k.warps * 32)) / 8 * 8;
  const int by_registers = 16384 / (registers * 32) * 4 / warps;
  const int by_shared = device.shared_per_multiprocessor / (t.shared_bytes + 1024);
  return std::max(1, std::min({by_shared, by_registers, 16}));
}

// Clocks of the whole problem: of a thread block those that it takes of a busy multiprocessor
// (throughput), and from its start to its end (latency), blended.
inline double expected_clocks(const BlockProblem& p, const Device& device, const BlockCosts& costs,
                              const BlockTile& t) {
  const BlockKernel& k = kBlockKernels[t.cut.kernel];
  const BlockWork work = count_work(p, costs, t);
  const int warps = t.cut.warps_x * t.cut.warps_y * t.cut.images;
  const double throughput =
      costs.busy_instruction * work.all +
      (t.cut.splits > 1 ? costs.cluster_sum * warps * k.rows * k.cols * k.tiles : 0.0);
  const double latency =
      (k.resident || k.pipelined ? 1.0 : costs.waits) *
          (costs.alone_instruction * work.busiest + costs.alone_product * work.dependent) +
      costs.alone_start;
  const int multiprocessors =
      t.cut.splits >= 4
          ? std::max(1, device.multiprocessors * costs.cluster_share / costs.cluster_whole)
          : device.multiprocessors;
  const double rounds = std::max(1.0, std::ceil(t.thread_blocks / multiprocessors));
  const double together = std::min<double>(resident_thread_blocks(device, t), rounds);
  return std::pow(std::pow(together * throughput, costs.blend) + std::pow(latency, costs.blend),
                  1 / costs.blend) *
         rounds / together;
}

}  // namespace block_detail

// Fills in everything that follows from `cut`; false if that does not fit the device.
inline bool make_block_tile(const BlockProblem& p, const Device& device, const BlockCosts& costs,
                            const BlockCut& cut, BlockTile& t) {
  t = {};
  t.cut = cut;
  if (!block_detail::set_geometry(p, device, t) || !block_detail::set_storage(p, device, t)) {
    return false;
  }
  t.clocks = block_detail::expected_clocks(p, device, costs, t);
  return true;
}

// Every tile that fits, of every instance for the layout that is packed, in the order tried. The
// problem must have a fused kernel (why_not_fused).
inline std::vector<BlockTile> block_candidates(const BlockProblem& p, const Device& device,
                                               const BlockLayout& layout, const BlockCosts& costs) {
  std::vector<BlockTile> found;
  BlockTile t{};
  for (int kernel = 0; kernel < kBlockKernelCount; ++kernel) {
    const BlockKernel& k = kBlockKernels[kernel];
    if (!serves(k, p) || k.tiles != layout.tiles || k.chunk != layout.chunk) continue;
    for (int warps_x = 1; warps_x <= k.warps; ++warps_x) {
      if (warps_x > 1 && (warps_x - 1) * 8 * k.cols >= p.out_w) break;
      for (int warps_y = 1; warps_x * warps_y <= k.warps; ++warps_y) {
        if (warps_y > 1 && (warps_y - 1) * 2 * k.rows >= p.out_h) break;
        for (int images = 1; images * warps_x * warps_y <= k.warps; images *= 2) {
          if (images > 1 && images / 2 >= p.batch) break;
          for (int splits = 1; splits <= 8; splits *= 2) {
            const BlockCut cut = {kernel, warps_x, warps_y, images, splits};
            if (make_block_tile(p, device, costs, cut, t)) found.push_back(t);
          }
        }
      }
    }
  }
  return found;
}

// ---------------------------------------------------------------------------- Plan

struct BlockPlan {
  bool fused;
  std::string reason;  // why not, a clause; empty if it is
  // What weights are packed for, and how many bytes they are then; -1 if no GPU has a fused kernel.
  BlockLayout layout;
  int64_t packed_bytes;
  int slices;      // of output channels
  BlockTile tile;  // only where `fused`
};

// As much of a plan as holds on every GPU.
inline BlockPlan plan_block_layout(const BlockProblem& p) {
  BlockPlan plan{};
  plan.packed_bytes = -1;
  plan.reason = why_not_fused(p, plan.layout);
  if (!plan.reason.empty()) return plan;
  plan.packed_bytes = order_bytes(p, plan.layout) * (p.image ? kImageOrders : 1);
  plan.slices = output_slices(p.out_channels);
  return plan;
}

// The plan on the cheapest tile. Ties go to the first.
inline BlockPlan plan_block(const BlockProblem& p, const Device& device, const BlockCosts& costs) {
  BlockPlan plan = plan_block_layout(p);
  if (!plan.reason.empty()) return plan;
  const std::vector<BlockTile> found = block_candidates(p, device, plan.layout, costs);
  plan.fused = !found.empty();
  if (plan.fused) {
    plan.tile = *std::min_element(
        found.begin(), found.end(),
        [](const BlockTile& a, const BlockTile& b) { return a.clocks < b.clocks; });
  } else {
    plan.reason = "no tile fits the shared memory of this GPU";
  }
  return plan;
}

// The plan on a given candidate, whatever it costs: for those who measure.
inline BlockPlan plan_block(const BlockProblem& p, const Device& device, const BlockCut& forced,
                            const BlockCosts& costs) {
  BlockPlan plan = plan_block_layout(p);
  if (!plan.reason.empty()) return plan;
  for (const BlockTile& tile : block_candidates(p, device, plan.layout, costs)) {
    if (tile.cut != forced) continue;
    plan.fused = true;
    plan.tile = tile;
    return plan;
  }
  plan.reason = "the forced tile is no candidate";
  return plan;
}

}  // namespace torch_mbv2::plan

// Which kernel instance and which tile an inverted residual runs on: pure host functions with a
// cost model, no CUDA needed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "device.h"

namespace torch_mbv2 {

constexpr int kMaxBlockTiles = 40;  // of 8 output channels; more are made by several slices

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
};
constexpr PackedSizes packed_sizes(int chunk, int tiles, bool image) {
  PackedSizes s{};
  s.depthwise_pair = 832;
  s.depthwise = chunk / 16 * tiles * 256;
  s.expand_bias = s.depthwise + chunk / 16 * s.depthwise_pair;
  s.fixed = s.expand_bias + (image ? 0 : chunk / 8 * 128);
  return s;
}
constexpr int packed_chunk_bytes(int chunk, int tiles, bool image, int k_steps) {
  return packed_sizes(chunk, tiles, image).fixed + k_steps * chunk / 16 * 512;
}

// What a kernel instance is compiled for; see BlockShape of inverted_residual.cuh.
struct BlockKernel {
  int stride;
  int tiles;        // of 8 output channels
  int rows, cols;   // a warp makes 2 * rows rows of 8 * cols pixels, a lane cols neighbours
  int chunk;        // expanded channels at a time
  bool image;       // the source is an image
  bool resident;    // at most 4 units of 8 source channels
  bool pipelined;   // a warp starts on its next channels meanwhile, which takes registers
  int pixel_tiles;  // of 16 source pixels that share a read of the expansion's weights
  int warps;        // at most, of a block
  int min_blocks;   // that a multiprocessor must have registers for
};
constexpr BlockKernel kBlockKernels[] = {
    // stride 1, few channels: early blocks
    {1, 2, 2, 1, 48, false, true, false, 1, 8, 2},
    {1, 3, 2, 1, 48, false, true, false, 1, 8, 2},
    {1, 3, 4, 1, 48, false, true, false, 1, 6, 2},
    {1, 4, 2, 1, 48, false, true, false, 1, 8, 2},
    {1, 8, 1, 1, 48, false, true, true, 1, 6, 2},
    {1, 3, 2, 1, 32, false, true, false, 1, 8, 2},
    // stride 2, few channels
    {2, 2, 1, 1, 48, false, true, true, 1, 8, 2},
    {2, 3, 1, 1, 48, false, true, true, 1, 8, 2},
    {2, 4, 1, 1, 48, false, true, true, 1, 8, 2},
    {2, 4, 2, 1, 48, false, true, false, 1, 8, 2},
    {2, 8, 1, 1, 48, false, true, false, 1, 8, 2},
    {2, 3, 1, 1, 32, false, true, true, 1, 8, 2},
    // many channels
    {1, 8, 1, 2, 48, false, false, false, 1, 8, 2},
    {1, 8, 1, 1, 48, false, false, true, 1, 8, 2},
    {1, 8, 1, 2, 48, false, false, true, 1, 8, 1},
    {1, 12, 1, 1, 48, false, false, true, 1, 12, 1},
    {1, 12, 1, 2, 48, false, false, true, 2, 8, 1},
    {1, 20, 1, 1, 48, false, false, true, 1, 8, 1},
    {1, 40, 1, 1, 48, false, false, true, 1, 8, 1},
    {2, 8, 1, 1, 48, false, false, false, 1, 8, 2},
    {2, 12, 1, 1, 48, false, false, true, 2, 8, 1},
    {2, 20, 1, 1, 48, false, false, true, 2, 8, 1},
    {2, 40, 1, 1, 48, false, false, true, 1, 8, 1},
    // the stem and the first block
    {1, 2, 2, 1, 32, true, true, false, 1, 8, 2},
    {1, 2, 4, 1, 32, true, true, false, 1, 6, 2},
    {1, 4, 2, 1, 32, true, true, false, 1, 8, 2},
    {1, 2, 2, 1, 48, true, true, false, 1, 8, 2},
    {1, 4, 2, 1, 48, true, true, false, 1, 8, 1},
    {1, 2, 1, 2, 32, true, true, false, 1, 8, 2},
};
constexpr int kBlockKernelCount = sizeof(kBlockKernels) / sizeof(kBlockKernels[0]);

// An inverted residual as the choice sees it.
struct BlockProblem {
  int64_t batch;
  int e_h, e_w;  // the expanded map
  int out_h, out_w;
  int source_channels;  // 0: no expansion
  int expanded, out_channels;
  int stride;
  bool image;
};

// Units of 8 channels of a source pixel in shared memory.
inline int source_units(const BlockKernel& kernel, int channels) {
  const int units = (channels + 7) / 8;
  return kernel.resident ? units : (units + 1) / 2 * 2;
}
// How the weights of a stem are packed, one after the other: for windows that start in odd columns
// of the rows in shared memory, and in even ones.
enum ImageOrder { kOddWindows, kEvenWindows };
constexpr int kImageOrders = 2;

inline int expand_steps(bool image, int channels) { return image ? 2 : (channels + 15) / 16; }
inline int output_slices(int out_channels) {
  return (out_channels + 8 * kMaxBlockTiles - 1) / (8 * kMaxBlockTiles);
}

// What packed weights depend on.
struct BlockLayout {
  int tiles, chunk;
};

// Whether an instance serves a problem, however its weights are laid out.
inline bool serves(const BlockKernel& k, const BlockProblem& p) {
  const int slices = output_slices(p.out_channels);
  const int tiles = (p.out_channels / 8 + slices - 1) / slices;
  return k.stride == p.stride && k.image == p.image && k.tiles >= tiles &&
         (k.image || !k.resident || p.source_channels <= 32);
}

// The layout with the fewest products to spare; false if there is no instance: channels that are no
// multiples of 8, a stride other than 1 and 2, an image of more than 3 channels. packing.py makes
// the same choice.
inline bool choose_block_layout(const BlockProblem& p, BlockLayout& best) {
  if (p.expanded < 8 || p.expanded % 8 != 0 || p.out_channels < 8 || p.out_channels % 8 != 0 ||
      (p.image ? p.source_channels > 3 : p.source_channels % 8 != 0)) {
    return false;
  }
  int least = 0;
  for (const BlockKernel& k : kBlockKernels) {
    if (!serves(k, p)) continue;
    const int cost = (p.expanded + k.chunk - 1) / k.chunk * k.chunk * (k.tiles + 8);
    if (least == 0 || cost < least || (cost == least && k.chunk < best.chunk)) {
      least = cost;
      best = {k.tiles, k.chunk};
    }
  }
  return least > 0;
}

// How a problem is cut into thread blocks, and what that is expected to cost.
struct BlockTile {
  int kernel;            // index of kBlockKernels
  int warps_x, warps_y;  // of an image's tile
  int images;            // of a thread block; more than 1 only where a tile is a whole image
  int splits;            // thread blocks of a cluster that share the expanded channels
  int tile_h, tile_w;
  int tiles_y, tiles_x;
  int chunks;
  int stages;           // of weights in shared memory: 2, or 1 where there is no room for more
  int row_pixels, odd;  // of a row of e; see BlockArgs
  int weights_offset, expanded_offset, table_offset, image_pitch;
  int shared_bytes;
  bool one_round;  // no more thread blocks than multiprocessors
  double clocks;
};

namespace block_detail {

inline int up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Fills in everything that follows from the first five fields; false if it does not fit.
inline bool complete(const BlockProblem& p, const Device& device, BlockTile& t) {
  const BlockKernel& k = kBlockKernels[t.kernel];
  t.tile_h = 2 * k.rows * t.warps_y;
  t.tile_w = 8 * k.cols * t.warps_x;
  t.tiles_y = (p.out_h + t.tile_h - 1) / t.tile_h;
  t.tiles_x = (p.out_w + t.tile_w - 1) / t.tile_w;
  t.chunks = (p.expanded + k.chunk - 1) / k.chunk;
  if (t.images > 1 && (t.tiles_x > 1 || t.tiles_y > 1)) return false;
  if (t.splits > t.chunks || (t.splits > 1 && !device.is_hopper_or_newer())) return false;
  const int eh = (t.tile_h - 1) * p.stride + 3, ew = (t.tile_w - 1) * p.stride + 3;
  const int vh = std::min(eh, p.e_h), vw = std::min(ew, p.e_w);
  // Odd pixels start 4 pixels off a multiple of 8, which keeps the banks of neighbours apart.
  const bool split = k.stride * k.cols > 1;
  t.odd = split ? up((ew + 1) / 2 + 4, 8) - 4 : 0;
  t.row_pixels = split ? t.odd + ew / 2 : ew;
  // A row of the source gets an even number of pixels then.
  const int halo = t.images * eh * t.row_pixels;
  const int pixels = t.images * vh * (split ? up(vw, 2) : vw);
  const int steps = p.source_channels == 0 ? 0 : expand_steps(k.image, p.source_channels);
  const int warps = t.warps_x * t.warps_y * t.images;
  const int rows = up(pixels, 16 * k.pixel_tiles);
  t.image_pitch = k.image ? up(12 * ew + 32, 16) : 0;
  const int units = p.source_channels == 0 ? 0 : source_units(k, p.source_channels);
  const int source_bytes = k.image      ? t.images * (2 * eh + 1) * t.image_pitch
                           : units == 0 ? 0
                                        : rows * (units | 1) * 16;
  const int blob = packed_chunk_bytes(k.chunk, k.tiles, k.image, steps);
  t.weights_offset = up(source_bytes + 16, 128);  // two barriers before it
  for (t.stages = 2; t.stages > 0; --t.stages) {
    t.expanded_offset = up(t.weights_offset + t.stages * blob, 128);
    t.table_offset = up(t.expanded_offset + halo * (k.chunk * 2 + 16), 16);
    t.shared_bytes = t.table_offset + rows * (k.image ? 8 : 4);
    if (t.splits > 1) {
      const int partial = warps * k.rows * k.cols * k.tiles * 512;
      t.shared_bytes = std::max(t.shared_bytes, t.weights_offset + partial);
    }
    if (t.shared_bytes <= device.shared_per_block) break;
  }
  if (t.stages == 0) return false;

  const double blocks = double((p.batch + t.images - 1) / t.images) * t.tiles_x * t.tiles_y *
                        t.splits * output_slices(p.out_channels);
  t.one_round = blocks <= device.multiprocessors;
  // Then one for each, as launch_kernel has it for all other kernels. (Not for larger clusters,
  // which would wait for each other: they do not fill every group of multiprocessors.)
  if (t.splits <= 2 && t.one_round && device.is_hopper_or_newer()) {
    t.shared_bytes = std::max(
        t.shared_bytes, std::min(device.shared_per_block, device.shared_per_multiprocessor / 2));
  }

  // Instructions of a warp, counted in the machine code: of a tile of 16 pixels of the expansion,
  // of the rest of a chunk, of what fills shared memory (32 pixels or units each), and of the start
  // and the output. And tensor-core instructions that wait for one another.
  const int pairs = k.chunk / 16, out_tiles = k.rows * k.cols;
  const int in_cols = p.stride * (k.cols - 1) + 3;  // of a warp's windows
  const int loads = p.stride == 2 ? k.rows + 1 : k.rows == 1 ? 1 : (k.rows + 3) / 2;
  const int groups = k.tiles / 4 + (k.tiles % 4 >= 2 ? 1 : 0) + k.tiles % 2;  // of output channels
  const double expand =
      steps * (1 + 2 * pairs) + 16 * pairs + 10 +
      (k.resident ? 0.0 : double(steps * (pairs + 4) + 2 * pairs) / k.pixel_tiles);
  const double convolve =
      pairs * (2 * (in_cols * loads + 11 * out_tiles) + k.tiles * (0.5 + out_tiles) + 48) + 130;
  const double fill = t.images * eh * ew / 32.0 * 60 +
                      (k.image ? t.images * (2 * eh + 1) * (t.image_pitch / 16) / 32.0 * 19 : 0.0) +
                      (!k.image && units > 4 ? t.images * eh * ew * units / 32.0 * 25 : 0.0);
  const double around = 300 + out_tiles * 2 * groups * 35;
  const int rounds_of_pixels = (rows / 16 / k.pixel_tiles + warps - 1) / warps;  // busiest warp
  const int my_chunks = (t.chunks + t.splits - 1) / t.splits;
  const double all = my_chunks * (rows / 16.0 * expand + warps * convolve) + fill + warps * around;
  const double one =
      my_chunks * (rounds_of_pixels * k.pixel_tiles * expand + convolve) + fill / warps + around;
  const double dependent = my_chunks * (rounds_of_pixels * (steps + 1) + pairs * 15);
  // Clocks a block takes of a busy multiprocessor, which with others of its cluster adds up their
  // sums, and from its start to its end. The constants were fitted to times of the likely tiles of
  // the blocks of MobileNetV2 on an H100 at batch 1, 8, 32 and 256.
  const double throughput = 0.47 * all + (t.splits > 1 ? 63.0 * warps * out_tiles * k.tiles : 0.0);
  const double waits = k.resident || k.pipelined ? 1.0 : 1.47;  // for products, nothing beside them
  const double latency = waits * (0.66 * one + 45.2 * dependent) + 2240;
  // Blocks at a time on a multiprocessor: 64 K registers in four parts, shared memory.
  const int registers = (65536 / (k.min_blocks * k.warps * 32)) / 8 * 8;
  const int by_registers = 16384 / (registers * 32) * 4 / warps;
  const int by_shared = device.shared_per_multiprocessor / (t.shared_bytes + 1024);
  const int resident = std::max(1, std::min({by_shared, by_registers, 16}));
  // Clusters of 4 and more do not fill every group of multiprocessors.
  const int multiprocessors =
      t.splits >= 4 ? std::max(1, device.multiprocessors * 10 / 11) : device.multiprocessors;
  const double rounds = std::max(1.0, std::ceil(blocks / multiprocessors));
  const double together = std::min<double>(resident, rounds);
  constexpr double kBlend = 2.47;  // between the larger of both and their sum
  t.clocks =
      std::pow(std::pow(together * throughput, kBlend) + std::pow(latency, kBlend), 1 / kBlend) *
      rounds / together;
  return true;
}

}  // namespace block_detail

// Every tile that fits, of every instance for the layout that is packed, in the order tried.
inline std::vector<BlockTile> block_candidates(const BlockProblem& p, const Device& device) {
  std::vector<BlockTile> found;
  BlockLayout layout{};
  if (!choose_block_layout(p, layout)) return found;
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
            BlockTile t{};
            t.kernel = kernel;
            t.warps_x = warps_x;
            t.warps_y = warps_y;
            t.images = images;
            t.splits = splits;
            if (block_detail::complete(p, device, t)) found.push_back(t);
          }
        }
      }
    }
  }
  return found;
}

// The cheapest tile; false if none fits. Ties go to the first.
inline bool choose_block_tile(const BlockProblem& p, const Device& device, BlockTile& best) {
  const std::vector<BlockTile> found = block_candidates(p, device);
  if (found.empty()) return false;
  best = *std::min_element(found.begin(), found.end(), [](const BlockTile& a, const BlockTile& b) {
    return a.clocks < b.clocks;
  });
  return true;
}

}  // namespace torch_mbv2

// Which kernel and which tile conv_pool runs on: pure host functions with a cost model, no CUDA
// needed.
#pragma once

#include <algorithm>
#include <cmath>
#include <compare>
#include <cstdint>
#include <iterator>
#include <vector>

#include "plan/device.h"
#include "plan/pixel_order.h"
#include "plan/types.h"

namespace torch_mbv2::plan {

struct ConvPoolProblem {
  int64_t batch;
  // Below 2^31 each; wider, so that no sum of them overflows.
  int64_t pixels;  // of an image
  int64_t k, n;    // input and output channels
  int element_bytes;
  bool vectors;  // rows of the input and of the weights can be read by 16 bytes

  auto operator<=>(const ConvPoolProblem&) const = default;
};

enum class ConvPoolKernel {
  kDirect,    // 16-bit types: operands straight into registers
  kResident,  // 16-bit types: the weights stay in registers
  kFloat,     // float32
};

// What a kernel is compiled for.
struct ConvPoolInstance {
  ConvPoolKernel kernel;
  bool vectors;   // as in ConvPoolProblem
  int steps = 0;  // of 32 k, at most, for kResident; others take any k
  int high = 0;   // a warp makes 16 * high channels, for 16-bit types
  int wide = 0;   // a thread block makes 16 * wide channels, for float32
};
constexpr ConvPoolInstance kConvPoolInstances[] = {
    {.kernel = ConvPoolKernel::kDirect, .vectors = true, .high = 1},
    {.kernel = ConvPoolKernel::kDirect, .vectors = true, .high = 2},
    {.kernel = ConvPoolKernel::kDirect, .vectors = false, .high = 2},
    {.kernel = ConvPoolKernel::kResident, .vectors = true, .steps = 5, .high = 2},
    {.kernel = ConvPoolKernel::kResident, .vectors = true, .steps = 8, .high = 2},
    {.kernel = ConvPoolKernel::kResident, .vectors = true, .steps = 10, .high = 2},
    {.kernel = ConvPoolKernel::kResident, .vectors = true, .steps = 14, .high = 1},
    {.kernel = ConvPoolKernel::kResident, .vectors = true, .steps = 20, .high = 1},
    {.kernel = ConvPoolKernel::kFloat, .vectors = true, .wide = 8},
    {.kernel = ConvPoolKernel::kFloat, .vectors = true, .wide = 2},
    {.kernel = ConvPoolKernel::kFloat, .vectors = false, .wide = 2},
};

// Sizes that kernels and plans share.
constexpr int kConvPoolStepK = 32;       // of k in a step of a 16-bit kernel
constexpr int kConvPoolTilePixels = 16;  // of a tile of a 16-bit kernel
constexpr int kConvPoolMostWarps = 8;    // of a thread block of a 16-bit kernel
// Steps of operands that direct_product has in registers at once, if a warp makes 16 channels.
constexpr int kConvPoolAhead = 10;
constexpr int kConvPoolFloatPixels = 56;  // of a tile of the float32 kernel
constexpr int kConvPoolFloatStepK = 16;   // of k in one of its steps
constexpr int kConvPoolFloatWarps = 4;    // of its thread blocks
// Of an image of resident_product: its sums are float32, of at most 1024 terms in a lane.
constexpr int kConvPoolMostPixels = 4096;
constexpr int kConvPoolMostRows = 1 << 30;  // pixels of all images of one of its thread blocks
constexpr int kConvPoolMostWaves = 4;       // rounds of its thread blocks that are considered

// How an instance runs.
struct ConvPoolPlan {
  int instance;   // index of kConvPoolInstances
  int warps;      // of a thread block
  int images;     // of a thread block
  double clocks;  // expected

  const ConvPoolInstance& kernel() const { return kConvPoolInstances[instance]; }
  // That a thread block makes.
  int channels() const {
    const ConvPoolInstance& i = kernel();
    if (i.kernel == ConvPoolKernel::kFloat) return 16 * i.wide;
    return 16 * i.high * (i.kernel == ConvPoolKernel::kResident ? warps : 1);
  }
};

// The constants of the cost model, in clocks and bytes; each architecture has its own, see
// architecture.h. These were fitted to times on an H100 and an H200.
struct ConvPoolCosts {
  // A tensor-core product of a warp, m16n8k16, on one of the four schedulers of a multiprocessor.
  double product = 6;        // where other warps fill the gaps
  double product_alone = 9;  // in a warp that is alone on its scheduler
  // What L2 gives.
  double bytes_to_one = 48;      // bytes a clock to one multiprocessor, if the others are idle
  double bytes_to_each = 28;     // bytes a clock to each of all
  double latency = 700;          // of operands that a warp waits for
  double l1_piece = 4;           // clocks in L1 of a load of 16 bytes from each of 8 rows
  double direct_start = 600;     // of a thread block of direct_product, with the sum at its end
  double resident_start = 1300;  // of a launch of resident_product
  // A tile of resident_product besides its products: activation, sums, waiting for copies.
  double resident_tile = 60;         // where other warps fill the gaps
  double resident_tile_alone = 150;  // in a warp that is alone on its scheduler
  // float_pool.
  double float_products = 65;  // of one multiprocessor in a clock
  double float_step = 600;     // latency of one step
};

namespace conv_pool_detail {

// What the estimates for one problem have in common.
struct Model {
  const ConvPoolProblem& p;
  const ConvPoolCosts& c;
  int multiprocessors;

  // Thread blocks on the busiest multiprocessor.
  double share(double blocks) const { return std::ceil(blocks / multiprocessors); }

  // Clocks in which so many thread blocks read so many bytes each.
  double read(double blocks, double bytes) const {
    return bytes *
           std::max(share(blocks) / c.bytes_to_one, blocks / (c.bytes_to_each * multiprocessors));
  }

  // What the thread blocks of direct_product need together, or one after the other.
  double direct(int high, int warps) const {
    const int steps = int(ceil_div(p.k, kConvPoolStepK));
    const int64_t tiles = std::max<int64_t>(1, ceil_div(p.pixels, kConvPoolTilePixels));
    const double blocks = double(p.batch) * double(ceil_div(p.n, 16 * high));
    const double products = 4.0 * high * steps;  // of a tile
    const double pieces = double(steps) * (2 + 2 * high);
    const double together = std::max(c.product / 4 * products, c.l1_piece * pieces) * double(tiles);
    const double loads = c.latency * double(ceil_div(steps, kConvPoolAhead / high));
    const double alone =
        double(ceil_div(tiles, warps)) * (loads + c.product_alone * products) + c.direct_start;
    const double waves = std::ceil(blocks / (multiprocessors * (kConvPoolMostWarps / warps)));
    const double bytes = 2.0 * p.k * (double(p.pixels) + 16 * high);
    return std::max({share(blocks) * together, waves * alone, read(blocks, bytes)});
  }

  // resident_product: its weights first, then its tiles.
  double resident(const ConvPoolInstance& kernel, int warps, int64_t images) const {
    const double products = 4.0 * kernel.high * kernel.steps;  // of a tile
    const double blocks =
        double(ceil_div(p.batch, images)) * double(ceil_div(p.n, 16 * kernel.high * warps));
    const int64_t octets = PixelOrder(int(p.pixels)).total(int(images));
    const double tiles = double(ceil_div(octets, kConvPoolTilePixels / kOctet));
    const double together =
        share(blocks) * warps / 4 * tiles * (c.product * products + c.resident_tile);
    const double at_once = double(multiprocessors) * (kConvPoolMostWarps / warps);
    const double alone =
        std::ceil(blocks / at_once) * tiles * (c.product_alone * products + c.resident_tile_alone);
    const double weights = 32.0 * kernel.high * warps * p.k;
    return std::max(together, alone) + read(blocks, weights) + c.resident_start;
  }

  // float_pool: all products, of channels rounded up to the widest tile, shared evenly by all
  // multiprocessors, but at least those of one thread block. So the widest tile is no cheaper than
  // another, and dearer only where its thread blocks are fewer than the multiprocessors.
  double floats(int wide) const {
    const double tiles = double(ceil_div(p.pixels, kConvPoolFloatPixels));
    const double channel = tiles * kConvPoolFloatPixels * p.k;
    const double all = double(p.batch) * double(ceil_div(p.n, 128)) * 128 * channel;
    const double products = std::max(all / multiprocessors, 16 * wide * channel);
    const double steps = tiles * double(ceil_div(p.k, kConvPoolFloatStepK));
    return products / c.float_products + steps * c.float_step;
  }
};

}  // namespace conv_pool_detail

// All plans for a problem, with the clocks that each is expected to take; of equals the first is
// preferred. Never empty for batch and n of at least 1.
inline std::vector<ConvPoolPlan> conv_pool_candidates(const ConvPoolProblem& p,
                                                      const Device& device,
                                                      const ConvPoolCosts& costs) {
  const conv_pool_detail::Model model = {p, costs, device.multiprocessors};
  const int steps = int(ceil_div(p.k, kConvPoolStepK));
  std::vector<ConvPoolPlan> plans;
  int resident_steps = 0;  // of the first resident instance that takes k
  for (int i = 0; i < int(std::size(kConvPoolInstances)); ++i) {
    const ConvPoolInstance& kernel = kConvPoolInstances[i];
    const bool is_float = kernel.kernel == ConvPoolKernel::kFloat;
    if (is_float != (p.element_bytes == 4) || kernel.vectors != p.vectors) continue;
    switch (kernel.kernel) {
      case ConvPoolKernel::kFloat:
        plans.push_back({i, kConvPoolFloatWarps, 1, model.floats(kernel.wide)});
        break;
      case ConvPoolKernel::kDirect: {
        const int64_t tiles = std::max<int64_t>(1, ceil_div(p.pixels, kConvPoolTilePixels));
        const int warps = int(std::min<int64_t>(kConvPoolMostWarps, tiles));
        plans.push_back({i, warps, 1, model.direct(kernel.high, warps)});
        break;
      }
      case ConvPoolKernel::kResident:
        if (p.k < 1 || p.pixels < 1 || p.pixels > kConvPoolMostPixels || kernel.steps < steps ||
            (resident_steps != 0 && resident_steps != kernel.steps)) {
          break;
        }
        resident_steps = kernel.steps;
        // Images are shared evenly among as many thread blocks as run at once, or some times as
        // many.
        for (const int warps : {kConvPoolMostWarps, kConvPoolMostWarps / 2}) {
          const int64_t channel_groups = ceil_div(p.n, 16 * kernel.high * warps);
          const int64_t at_once = int64_t(device.multiprocessors) * (kConvPoolMostWarps / warps);
          for (int waves = 1; waves <= kConvPoolMostWaves; ++waves) {
            const int64_t groups = std::max<int64_t>(1, waves * at_once / channel_groups);
            const int64_t images =
                std::min<int64_t>(kConvPoolMostRows / p.pixels, ceil_div(p.batch, groups));
            plans.push_back({i, warps, int(images), model.resident(kernel, warps, images)});
          }
        }
        break;
    }
  }
  return plans;
}

// The cheapest. A launcher also takes any other candidate: see conv_pool/conv_pool.h.
inline ConvPoolPlan plan_conv_pool(const ConvPoolProblem& p, const Device& device,
                                   const ConvPoolCosts& costs) {
  const std::vector<ConvPoolPlan> plans = conv_pool_candidates(p, device, costs);
  return *std::min_element(
      plans.begin(), plans.end(),
      [](const ConvPoolPlan& a, const ConvPoolPlan& b) { return a.clocks < b.clocks; });
}

}  // namespace torch_mbv2::plan

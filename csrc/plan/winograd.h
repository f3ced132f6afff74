// How a convolution is cut into tiles for Winograd's transforms, and the memory that these take: a
// pure host function, no CUDA needed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan/types.h"

namespace torch_mbv2::plan {

struct WinogradProblem {
  int64_t batch;
  int out_h, out_w, in_channels, out_channels;
};

struct WinogradPlan {
  int tiles_h, tiles_w;
  int64_t tiles;                                     // of the whole batch
  int64_t chunk;                                     // tiles worked off at a time
  int64_t weight_bytes, input_bytes, product_bytes;  // U, V and M of a chunk, see winograd.cu
};

constexpr WinogradPlan plan_winograd(const WinogradProblem& p) {
  constexpr int64_t kChunkBytes = int64_t(256) << 20, kLeastTiles = 128;
  constexpr int64_t kTileBytes = 16 * 4;  // of a channel
  constexpr auto align = [](int64_t bytes) { return ceil_div<int64_t>(bytes, 256) * 256; };
  WinogradPlan plan{};
  plan.tiles_h = ceil_div(p.out_h, 2);
  plan.tiles_w = ceil_div(p.out_w, 2);
  plan.tiles = p.batch * plan.tiles_h * plan.tiles_w;
  const int64_t bytes = kTileBytes * (int64_t(p.in_channels) + p.out_channels);
  plan.chunk = std::min(plan.tiles, std::max<int64_t>(kChunkBytes / bytes, kLeastTiles));
  plan.weight_bytes = align(kTileBytes * p.out_channels * p.in_channels);
  plan.input_bytes = align(kTileBytes * plan.chunk * p.in_channels);
  plan.product_bytes = align(kTileBytes * plan.chunk * p.out_channels);
  return plan;
}

}  // namespace torch_mbv2::plan

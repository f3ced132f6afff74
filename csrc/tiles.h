// Which tile a matrix product runs on: a pure host function with a cost model, no CUDA needed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace torch_mbv2 {

// One compiled tile: the rows and columns of the output that a block makes, how many rows one
// thread makes of them (float32 only), and how many groups of threads share k.
struct TileShape {
  int m, n, thread_rows, splits;
};

// What a product costs on a tile, in clocks, roughly. A block moves (m + n) * k elements and
// multiplies m * n * k; all blocks on one multiprocessor share its bandwidth and its arithmetic. On
// top come, once, the last block's chain of dependent products, shortened by splits, and the sum of
// the splits. The constants were fitted to times of every tile on the layers of MobileNetV2 at
// batch 1 to 256 on an H200: the choice costs 1 to 2 % of the time of the best tile on average.
inline double tile_cost(const TileShape& tile, int64_t m, int n, int k, int64_t batch,
                        int element_size, int multiprocessors) {
  const bool half = element_size == 2;
  const double k_padded = (k + 15) / 16 * 16;
  const double bytes = ((tile.m + tile.n) * k_padded + 0.1 * tile.m * tile.n) * element_size;
  const double memory = bytes / 45;
  const double math = tile.m * tile.n * k_padded / (half ? 190.0 : 98.0);
  const double block = std::sqrt(memory * memory + math * math) + 144;
  const double chain = half ? 4.8 * (k_padded / 16) * (tile.n / 16 + 7.2)
                            : 2.9 * k_padded * tile.n * tile.thread_rows / 64;
  const double blocks =
      double((m + tile.m - 1) / tile.m) * ((n + tile.n - 1) / tile.n) * double(batch);
  const double waves = std::max(1.0, blocks / multiprocessors);
  const double rounds = 0.7 * waves + 0.3 * std::ceil(waves);
  return rounds * block + chain / tile.splits + (tile.splits > 1 ? 208 * tile.splits : 0);
}

// The index of the cheapest of `count` tiles; ties go to the first.
inline int choose_tile(const TileShape* tiles, int count, int64_t m, int n, int k, int64_t batch,
                       int element_size, int multiprocessors) {
  int best = 0;
  double best_clocks = 0;
  for (int i = 0; i < count; ++i) {
    const double clocks = tile_cost(tiles[i], m, n, k, batch, element_size, multiprocessors);
    if (i == 0 || clocks < best_clocks) {
      best = i;
      best_clocks = clocks;
    }
  }
  return best;
}

}  // namespace torch_mbv2

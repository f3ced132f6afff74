// Which tile a matrix product runs on: a pure host function with a cost model, no CUDA needed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace torch_mbv2 {

// One compiled tile: rows and columns of the output that a block makes, and how many warps share k.
struct TileShape {
  int m, n, splits;
};

// What a product costs on a tile, in clocks, roughly. A block moves (m + n) * k elements from L2 and
// multiplies m * n * k; all blocks of a wave on one multiprocessor share its bandwidth and its tensor
// cores. On top of the waves comes the latency of one block: launch, first loads, its chain of
// products (shortened by splits) and the store.
struct TileCost {
  double waves;
  double clocks;
};

inline TileCost tile_cost(const TileShape& tile, int64_t m, int n, int k, int64_t batch,
                          int element_size, int multiprocessors) {
  const bool half = element_size == 2;
  const double blocks = double((m + tile.m - 1) / tile.m) * ((n + tile.n - 1) / tile.n) * double(batch);
  const double k_padded = (k + 15) / 16 * 16;
  const double bytes = (tile.m + tile.n) * k_padded * element_size + tile.m * tile.n * element_size;
  // A multiprocessor reads about 40 bytes a clock from L2, makes 1024 16-bit or 128 float products.
  const double busy_memory = bytes / 40;
  const double busy_math = tile.m * tile.n * k_padded / (half ? 660.0 : 100.0);
  const double busy = busy_memory > busy_math ? busy_memory : busy_math;
  const double chain = half ? 30.0 * (k_padded / 16 / tile.splits) * (tile.n / 16) / 2
                            : 4.0 * k_padded * tile.n / 8;
  const double latency = 1500 + chain + 200 * (tile.splits > 1);
  const double per_multiprocessor = blocks / multiprocessors;
  const double rounds = per_multiprocessor < 1 ? 1 : per_multiprocessor;
  return {rounds, rounds * busy + latency};
}

// The index of the cheapest of `count` tiles; ties go to the first.
inline int choose_tile(const TileShape* tiles, int count, int64_t m, int n, int k, int64_t batch,
                       int element_size, int multiprocessors) {
  int best = 0;
  double best_clocks = 0;
  for (int i = 0; i < count; ++i) {
    const double clocks =
        tile_cost(tiles[i], m, n, k, batch, element_size, multiprocessors).clocks;
    if (i == 0 || clocks < best_clocks) {
      best = i;
      best_clocks = clocks;
    }
  }
  return best;
}

}  // namespace torch_mbv2

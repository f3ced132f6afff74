// Which tile a matrix product runs on: pure host functions with a cost model, no CUDA needed.
#pragma once

#include <algorithm>
#include <cmath>
#include <compare>
#include <cstdint>
#include <vector>

#include "plan/device.h"
#include "plan/types.h"

namespace torch_mbv2::plan {

// What a kernel of product.cuh is compiled for.
struct ProductTile {
  int m, n;         // rows and columns of the output that a thread block makes
  int k;            // that a stage of loads holds
  int thread_rows;  // rows that a thread makes
  int splits;       // groups of threads that share k
  int stages;       // of loads
};

// Tall tiles for many rows: all or much of n at once, so that the rows are read once. Small ones
// with split k for few rows, where the latency of one thread block is the time.
inline constexpr ProductTile kHalfTiles[] = {
    {.m = 128, .n = 16, .k = 32, .thread_rows = 2, .splits = 1, .stages = 3},
    {.m = 128, .n = 32, .k = 32, .thread_rows = 2, .splits = 1, .stages = 3},
    {.m = 128, .n = 64, .k = 32, .thread_rows = 2, .splits = 1, .stages = 3},
    {.m = 128, .n = 96, .k = 32, .thread_rows = 2, .splits = 1, .stages = 3},
    {.m = 128, .n = 48, .k = 32, .thread_rows = 2, .splits = 1, .stages = 3},
    {.m = 64, .n = 64, .k = 64, .thread_rows = 2, .splits = 2, .stages = 3},
    {.m = 32, .n = 32, .k = 128, .thread_rows = 2, .splits = 4, .stages = 3},
    {.m = 16, .n = 32, .k = 128, .thread_rows = 2, .splits = 8, .stages = 3},
    {.m = 16, .n = 16, .k = 128, .thread_rows = 2, .splits = 8, .stages = 6},
};
inline constexpr ProductTile kFloatTiles[] = {
    {.m = 128, .n = 64, .k = 16, .thread_rows = 8, .splits = 1, .stages = 3},
    {.m = 128, .n = 32, .k = 16, .thread_rows = 8, .splits = 1, .stages = 3},
    {.m = 128, .n = 16, .k = 16, .thread_rows = 8, .splits = 1, .stages = 3},
    {.m = 32, .n = 32, .k = 64, .thread_rows = 4, .splits = 4, .stages = 3},
    {.m = 16, .n = 32, .k = 128, .thread_rows = 4, .splits = 8, .stages = 3},
    {.m = 16, .n = 16, .k = 128, .thread_rows = 4, .splits = 8, .stages = 3},
};

// Indices of the tiles that are compiled for a kind of product. Windows are costly to gather: fewer
// tiles, and none that reads them often. Single elements through registers are for rare shapes.
template <int... kIndices>
struct TileIndices {};
using HalfMatrixTiles = TileIndices<0, 1, 2, 3, 4, 5, 6, 7, 8>;
using HalfWindowTiles = TileIndices<1, 3, 6>;
using FloatMatrixTiles = TileIndices<0, 1, 2, 3, 4, 5>;
using FloatWindowTiles = TileIndices<0, 1, 3>;
using FloatElementTiles = TileIndices<1>;

// Calls f with the TileIndices of a kind of product: `matrix`, its rows are a matrix's and not
// windows; `vectors`, they are loaded by 16 bytes.
template <bool kHalf, bool kMatrix, bool kVectors, typename F>
constexpr auto with_tiles(F&& f) {
  if constexpr (kHalf) {
    if constexpr (kMatrix && kVectors) {
      return f(HalfMatrixTiles{});
    } else {
      return f(HalfWindowTiles{});
    }
  } else if constexpr (!kVectors) {
    return f(FloatElementTiles{});
  } else if constexpr (kMatrix) {
    return f(FloatMatrixTiles{});
  } else {
    return f(FloatWindowTiles{});
  }
}

struct ProductProblem {
  int64_t m;
  int n, k;
  int64_t batch;  // of products, or groups of a convolution
  DType dtype;
  bool matrix, vectors;  // see with_tiles

  auto operator<=>(const ProductProblem&) const = default;
};

// The cost model's constants; each architecture has its own, see architecture.h. These were fitted
// to times of every tile on the layers of MobileNetV2 at batch 1 to 256 on an H200: the choice
// costs 1 to 2 % of the time of the best tile on average.
struct ProductCosts {
  double bytes_a_clock = 45;        // of device memory, for one multiprocessor
  double output_bytes = 0.1;        // of an element of the output, in elements
  double half_products = 190;       // multiply-adds a clock on tensor cores
  double float_products = 98;       // with FFMA
  double start = 144;               // clocks of a thread block, whatever it does
  double half_chain = 4.8;          // clocks of 16 of k of a chain of dependent products,
  double half_chain_columns = 7.2;  // for each 16 columns and this many more
  double float_chain = 2.9;         // the same of one of k, for 64 elements of a thread
  double split_sum = 208;           // clocks for the sum of each split
  double whole_waves = 0.3;         // how much of the last wave's rounding up counts
};

struct ProductPlan {
  int tile;       // index of kHalfTiles or kFloatTiles
  double clocks;  // expected
};

// What a product costs on a tile, in clocks, roughly. A thread block moves (m + n) * k elements and
// multiplies m * n * k; all thread blocks on one multiprocessor share its bandwidth and its
// arithmetic. On top come, once, the last one's chain of dependent products, shortened by splits,
// and the sum of the splits.
inline double product_clocks(const ProductTile& tile, const ProductProblem& p, const Device& device,
                             const ProductCosts& c) {
  const bool half = p.dtype != DType::kFloat32;
  const double k_padded = double((int64_t(p.k) + 15) / 16 * 16);
  const double bytes =
      ((tile.m + tile.n) * k_padded + c.output_bytes * tile.m * tile.n) * (half ? 2 : 4);
  const double memory = bytes / c.bytes_a_clock;
  const double math = tile.m * tile.n * k_padded / (half ? c.half_products : c.float_products);
  const double block = std::sqrt(memory * memory + math * math) + c.start;
  const double chain = half ? c.half_chain * (k_padded / 16) * (tile.n / 16 + c.half_chain_columns)
                            : c.float_chain * k_padded * tile.n * tile.thread_rows / 64;
  const double rows = double(ceil_div(p.m, tile.m));
  const double columns = double(ceil_div(int64_t(p.n), tile.n));
  const double blocks = rows * columns * double(p.batch);
  const double waves = std::max(1.0, blocks / device.multiprocessors);
  const double rounds = (1 - c.whole_waves) * waves + c.whole_waves * std::ceil(waves);
  return rounds * block + chain / tile.splits + (tile.splits > 1 ? c.split_sum * tile.splits : 0);
}

// Every compiled tile with its cost, in the order of the table.
inline std::vector<ProductPlan> product_candidates(const ProductProblem& p, const Device& device,
                                                   const ProductCosts& costs) {
  std::vector<ProductPlan> found;
  const bool half = p.dtype != DType::kFloat32;
  const auto collect = [&]<int... kIndices>(TileIndices<kIndices...>) {
    for (const int tile : {kIndices...}) {
      const ProductTile& t = half ? kHalfTiles[tile] : kFloatTiles[tile];
      found.push_back({tile, product_clocks(t, p, device, costs)});
    }
  };
  if (half && p.matrix && p.vectors) {
    with_tiles<true, true, true>(collect);
  } else if (half) {
    with_tiles<true, false, true>(collect);
  } else if (!p.vectors) {
    with_tiles<false, false, false>(collect);
  } else if (p.matrix) {
    with_tiles<false, true, true>(collect);
  } else {
    with_tiles<false, false, true>(collect);
  }
  return found;
}

// The cheapest tile; ties go to the first.
inline ProductPlan plan_product(const ProductProblem& p, const Device& device,
                                const ProductCosts& costs) {
  const std::vector<ProductPlan> found = product_candidates(p, device, costs);
  return *std::min_element(
      found.begin(), found.end(),
      [](const ProductPlan& a, const ProductPlan& b) { return a.clocks < b.clocks; });
}

}  // namespace torch_mbv2::plan

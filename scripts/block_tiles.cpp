// Prints which tile an inverted residual is cut into, and all that were considered. No GPU needed:
//
//   c++ -std=c++20 -Icsrc scripts/block_tiles.cpp -o block_tiles
//   ./block_tiles BATCH HEIGHT WIDTH IN EXPANDED OUT STRIDE
//
// HEIGHT, WIDTH: of the input; IN: its channels, 0 where there is no expansion. The padding is 1.
// Environment: ARCH (900), MULTIPROCESSORS (132), SHARED bytes of a block (232448): the GPU.
#include "block_tiles.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

using namespace torch_mbv2;

namespace {

int setting(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}

void print(const char* word, const BlockTile& t) {
  const BlockKernel& k = kBlockKernels[t.kernel];
  std::printf(
      "%-10s kernel=%d rows=%d cols=%d warps=%dx%d images=%d splits=%d tile=%dx%d tiles=%dx%d "
      "shared=%d clocks=%.0f\n",
      word, t.kernel, k.rows, k.cols, t.warps_y, t.warps_x, t.images, t.splits, t.tile_h, t.tile_w,
      t.tiles_y, t.tiles_x, t.shared_bytes, t.clocks);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) {
    std::fprintf(stderr, "block_tiles: BATCH HEIGHT WIDTH IN EXPANDED OUT STRIDE\n");
    return 2;
  }
  BlockProblem p{};
  p.batch = std::atoll(argv[1]);
  p.e_h = std::atoi(argv[2]);
  p.e_w = std::atoi(argv[3]);
  p.source_channels = std::atoi(argv[4]);
  p.expanded = std::atoi(argv[5]);
  p.out_channels = std::atoi(argv[6]);
  p.stride = std::atoi(argv[7]);
  p.out_h = (p.e_h - 1) / p.stride + 1;
  p.out_w = (p.e_w - 1) / p.stride + 1;
  const int shared = setting("SHARED", 232448);
  const Device device = {setting("ARCH", 900), setting("MULTIPROCESSORS", 132), shared,
                         shared + 1024};

  BlockLayout layout{};
  if (!choose_block_layout(p, layout)) {
    std::printf("no instance\n");
    return 1;
  }
  const int steps = p.source_channels == 0 ? 0 : expand_steps(p.image, p.source_channels);
  const int chunks = (p.expanded + layout.chunk - 1) / layout.chunk;
  const int bytes =
      output_slices(p.out_channels) *
      (chunks * packed_chunk_bytes(layout.chunk, layout.tiles, p.image, steps) + layout.tiles * 32);
  std::printf("layout     tiles=%d chunk=%d bytes=%d\n", layout.tiles, layout.chunk, bytes);
  BlockTile best{};
  if (!choose_block_tile(p, device, best)) {
    std::printf("no tile fits\n");
    return 1;
  }
  print("chosen", best);
  std::vector<BlockTile> all = block_candidates(p, device);
  std::stable_sort(all.begin(), all.end(),
                   [](const BlockTile& a, const BlockTile& b) { return a.clocks < b.clocks; });
  for (size_t i = 1; i < all.size(); ++i) print("candidate", all[i]);
  return 0;
}

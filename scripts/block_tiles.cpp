// Prints which tile an inverted residual is cut into, and all that were considered. No GPU needed:
//
//   c++ -std=c++20 -Icsrc scripts/block_tiles.cpp -o block_tiles
//   ./block_tiles BATCH HEIGHT WIDTH IN EXPANDED OUT STRIDE
//   ./block_tiles --instances > torch_mbv2/weights/block_instances.json
//
// HEIGHT, WIDTH: of the input; IN: its channels, 0 where there is no expansion. The padding is 1.
// Environment: ARCH (900), MULTIPROCESSORS (132), SHARED bytes of a block (232448): the GPU.
// --instances prints the instances of the kernel as JSON, in their order: packing reads them.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "plan/architecture.h"

using namespace torch_mbv2;
using namespace torch_mbv2::plan;

namespace {

int setting(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}

void print(const char* word, const BlockTile& t) {
  const BlockKernel& k = kBlockKernels[t.cut.kernel];
  std::printf(
      "%-10s kernel=%d rows=%d cols=%d warps=%dx%d images=%d splits=%d tile=%dx%d tiles=%dx%d "
      "shared=%d clocks=%.0f\n",
      word, t.cut.kernel, k.rows, k.cols, t.cut.warps_y, t.cut.warps_x, t.cut.images, t.cut.splits,
      t.tile_h, t.tile_w, t.tiles_y, t.tiles_x, t.shared_bytes, t.clocks);
}

void print_instances() {
  const auto word = [](bool value) { return value ? "true" : "false"; };
  std::printf("{\n  \"most_tiles\": %d,\n  \"instances\": [\n", kMaxBlockTiles);
  for (int i = 0; i < kBlockKernelCount; ++i) {
    const BlockKernel& k = kBlockKernels[i];
    std::printf(
        "    {\"stride\": %d, \"tiles\": %d, \"rows\": %d, \"cols\": %d, \"chunk\": %d, "
        "\"image\": %s, \"resident\": %s}%s\n",
        k.stride, k.tiles, k.rows, k.cols, k.chunk, word(k.image), word(k.resident),
        i + 1 < kBlockKernelCount ? "," : "");
  }
  std::printf("  ]\n}\n");
}

BlockProblem problem_of(char** argv) {
  BlockProblem p{};
  p.dtype = DType::kFloat16;
  p.activation = {Activation::kClamp, 0, 6};
  p.batch = std::atoll(argv[1]);
  p.e_h = std::atoi(argv[2]);
  p.e_w = std::atoi(argv[3]);
  p.source_channels = std::atoi(argv[4]);
  p.expanded = std::atoi(argv[5]);
  p.out_channels = std::atoi(argv[6]);
  p.stride_h = p.stride_w = std::atoi(argv[7]);
  p.window_h = p.window_w = 3;
  p.pad_top = p.pad_left = 1;
  p.out_h = (p.e_h - 1) / p.stride_h + 1;
  p.out_w = (p.e_w - 1) / p.stride_w + 1;
  return p;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--instances") == 0) {
    print_instances();
    return 0;
  }
  if (argc != 8) {
    std::fprintf(stderr,
                 "block_tiles: BATCH HEIGHT WIDTH IN EXPANDED OUT STRIDE, or --instances\n");
    return 2;
  }
  const BlockProblem p = problem_of(argv);
  const int shared = setting("SHARED", 232448);
  const Device device = {setting("ARCH", 900), setting("MULTIPROCESSORS", 132), shared,
                         shared + 1024};
  const BlockCosts& costs = architecture_of(device.arch).block;

  const BlockPlan plan = plan_block(p, device, costs);
  if (plan.packed_bytes < 0) {
    std::fprintf(stderr, "block_tiles: %s\n", plan.reason.c_str());
    std::printf("no instance\n");
    return 1;
  }
  std::printf("layout     tiles=%d chunk=%d bytes=%lld\n", plan.layout.tiles, plan.layout.chunk,
              static_cast<long long>(plan.packed_bytes));
  if (!plan.fused) {
    std::printf("no tile fits\n");
    return 1;
  }
  print("chosen", plan.tile);
  std::vector<BlockTile> all = block_candidates(p, device, plan.layout, costs);
  std::stable_sort(all.begin(), all.end(),
                   [](const BlockTile& a, const BlockTile& b) { return a.clocks < b.clocks; });
  for (size_t i = 1; i < all.size(); ++i) print("candidate", all[i]);
  return 0;
}

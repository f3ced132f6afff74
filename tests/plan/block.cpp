// Prints the plan of an inverted residual, of which the arguments NAME=VALUE change one thing each:
// "fused", its clocks and its cut, or why not. It is compiled and run by test_block.py.
#include <cstdio>

#include "plan/architecture.h"
#include "settings.h"

using namespace torch_mbv2;
using namespace torch_mbv2::plan;

int main(int argc, char** argv) {
  BlockProblem p{};
  p.dtype = DType::kFloat16;
  p.activation = {Activation::kClamp, 0, 6};
  p.batch = 8;
  p.e_h = p.e_w = p.out_h = p.out_w = 14;
  p.source_channels = 64;
  p.expanded = 384;
  p.out_channels = 64;
  p.window_h = p.window_w = 3;
  p.stride_h = p.stride_w = 1;
  p.pad_top = p.pad_left = 1;
  p.stem_window_h = p.stem_window_w = kStemWindow;
  p.stem_stride_h = p.stem_stride_w = kStemStride;
  Device device = {900, 132, 232448, 233472};
  BlockCosts costs = architecture_of(device.arch).block;
  BlockCut cut{};
  bool forced = false;
  const Settings settings = {
      {"dtype", [&](double v) { p.dtype = DType(int(v)); }},
      {"kind", [&](double v) { p.activation.kind = Activation::Kind(int(v)); }},
      {"lo", [&](double v) { p.activation.lo = float(v); }},
      {"window_h", [&](double v) { p.window_h = int(v); }},
      {"window_w", [&](double v) { p.window_w = int(v); }},
      {"stride_h", [&](double v) { p.stride_h = int(v); }},
      {"stride_w", [&](double v) { p.stride_w = int(v); }},
      {"pad_top", [&](double v) { p.pad_top = int(v); }},
      {"pad_left", [&](double v) { p.pad_left = int(v); }},
      {"source", [&](double v) { p.source_channels = int(v); }},
      {"expanded", [&](double v) { p.expanded = int(v); }},
      {"out", [&](double v) { p.out_channels = int(v); }},
      {"image", [&](double v) { p.image = v != 0; }},
      {"stem_window", [&](double v) { p.stem_window_h = p.stem_window_w = int(v); }},
      {"stem_stride", [&](double v) { p.stem_stride_w = int(v); }},
      {"stem_top", [&](double v) { p.stem_top = int(v); }},
      {"span", [&](double v) { p.image_span = int64_t(v); }},
      {"shared", [&](double v) { device.shared_per_block = int(v); }},
      {"start", [&](double v) { costs.alone_start = v; }},
      {"kernel", [&](double v) { forced = true, cut.kernel = int(v); }},
      {"warps_x", [&](double v) { cut.warps_x = int(v); }},
      {"warps_y", [&](double v) { cut.warps_y = int(v); }},
      {"images", [&](double v) { cut.images = int(v); }},
      {"splits", [&](double v) { cut.splits = int(v); }},
  };
  apply(settings, argc, argv);
  const BlockPlan plan = forced ? plan_block(p, device, cut, costs) : plan_block(p, device, costs);
  if (!plan.fused) {
    std::printf("%s\n", plan.reason.c_str());
    return 1;
  }
  const BlockCut& c = plan.tile.cut;
  std::printf("fused clocks=%.0f kernel=%d warps_x=%d warps_y=%d images=%d splits=%d\n",
              plan.tile.clocks, c.kernel, c.warps_x, c.warps_y, c.images, c.splits);
  return 0;
}

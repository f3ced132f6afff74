// Prints how a depthwise convolution runs, of which the arguments NAME=VALUE change one thing each:
// on strips (with the rows of a run), on vectors or on single channels.
#include "plan/depthwise.h"

#include <cstdio>

#include "settings.h"

using namespace torch_mbv2;
using namespace torch_mbv2::plan;

int main(int argc, char** argv) {
  DepthwiseProblem p = {.batch = 1,
                        .out_h = 56,
                        .out_w = 56,
                        .channels = 96,
                        .kernel_h = 3,
                        .kernel_w = 3,
                        .stride_h = 1,
                        .stride_w = 1,
                        .dilation_h = 1,
                        .dilation_w = 1,
                        .aligned = true,
                        .dtype = DType::kFloat16};
  Device device = {900, 132, 232448, 233472};
  const Settings settings = {
      {"batch", [&](int v) { p.batch = v; }},
      {"size", [&](int v) { p.out_h = p.out_w = v; }},
      {"channels", [&](int v) { p.channels = v; }},
      {"kernel", [&](int v) { p.kernel_h = p.kernel_w = v; }},
      {"kernel_w", [&](int v) { p.kernel_w = v; }},
      {"stride", [&](int v) { p.stride_h = p.stride_w = v; }},
      {"stride_w", [&](int v) { p.stride_w = v; }},
      {"dilation_h", [&](int v) { p.dilation_h = v; }},
      {"aligned", [&](int v) { p.aligned = v != 0; }},
      {"dtype", [&](int v) { p.dtype = DType(v); }},
      {"multiprocessors", [&](int v) { device.multiprocessors = v; }},
  };
  apply(settings, argc, argv);
  const DepthwisePlan plan = plan_depthwise(p, device);
  if (plan.strips) {
    std::printf("strips %d\n", plan.run_rows);
  } else {
    std::puts(plan.vectors ? "vectors" : "channels");
  }
}

// Prints the plan that conv_pool runs on, and all that were considered. No GPU needed.
//
//   conv_pool_plans BATCH PIXELS K N ELEMENT_BYTES VECTORS MULTIPROCESSORS
#include <cstdio>
#include <cstdlib>

#include "plan/architecture.h"

using namespace torch_mbv2;
using namespace torch_mbv2::plan;

namespace {

void print(const char* word, const ConvPoolPlan& plan) {
  constexpr const char* kNames[] = {"direct", "resident", "float"};
  const ConvPoolInstance& i = plan.kernel();
  std::printf(
      "%s instance=%d kernel=%s vectors=%d steps=%d channels=%d warps=%d images=%d "
      "clocks=%.17g\n",
      word, plan.instance, kNames[int(i.kernel)], i.vectors, i.steps, plan.channels(), plan.warps,
      plan.images, plan.clocks);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) return 2;
  const ConvPoolProblem problem = {std::atoll(argv[1]), std::atoi(argv[2]), std::atoi(argv[3]),
                                   std::atoi(argv[4]),  std::atoi(argv[5]), argv[6][0] == '1'};
  Device device{};
  device.multiprocessors = std::atoi(argv[7]);
  const ConvPoolCosts& costs = architecture_of(device.arch).conv_pool;
  for (const ConvPoolPlan& plan : conv_pool_candidates(problem, device, costs))
    print("candidate", plan);
  print("chosen", plan_conv_pool(problem, device, costs));
}

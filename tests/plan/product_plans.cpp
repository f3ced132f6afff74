// Prints the tiles that are compiled for a product, then all that were considered, then the choice.
//
//   product_plans M N K BATCH HALF MATRIX VECTORS MULTIPROCESSORS
#include <cstdio>
#include <cstdlib>

#include "plan/architecture.h"

using namespace torch_mbv2;
using namespace torch_mbv2::plan;

namespace {

// As launch_product asks for them.
template <bool kHalf, bool kMatrix, bool kVectors>
void print_compiled() {
  std::printf("compiled");
  with_tiles<kHalf, kMatrix, kVectors>(
      []<int... kIndices>(TileIndices<kIndices...>) { (std::printf(" %d", kIndices), ...); });
  std::printf("\n");
}

template <bool... kKnown>
void print_compiled_of(const bool* flags) {
  if constexpr (sizeof...(kKnown) == 3) {
    print_compiled<kKnown...>();
  } else if (flags[sizeof...(kKnown)]) {
    print_compiled_of<kKnown..., true>(flags);
  } else {
    print_compiled_of<kKnown..., false>(flags);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 9) return 2;
  const bool flags[] = {argv[5][0] == '1', argv[6][0] == '1', argv[7][0] == '1'};
  const ProductProblem problem = {.m = std::atoll(argv[1]),
                                  .n = std::atoi(argv[2]),
                                  .k = std::atoi(argv[3]),
                                  .batch = std::atoll(argv[4]),
                                  .dtype = flags[0] ? DType::kFloat16 : DType::kFloat32,
                                  .matrix = flags[1],
                                  .vectors = flags[2]};
  Device device{};
  device.multiprocessors = std::atoi(argv[8]);
  const ProductCosts& costs = architecture_of(device.arch).product;
  print_compiled_of<>(flags);
  for (const ProductPlan& plan : product_candidates(problem, device, costs)) {
    std::printf("candidate %d %.17g\n", plan.tile, plan.clocks);
  }
  const ProductPlan chosen = plan_product(problem, device, costs);
  std::printf("chosen %d %.17g\n", chosen.tile, chosen.clocks);
}

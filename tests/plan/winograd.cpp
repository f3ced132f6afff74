// Prints the plan of a Winograd convolution of the five sizes that are given.
#include "plan/winograd.h"

#include <cstdio>
#include <cstdlib>

using namespace torch_mbv2::plan;

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  const auto size = [&](int i) { return std::atoi(argv[i]); };
  const WinogradPlan p = plan_winograd({size(1), size(2), size(3), size(4), size(5)});
  std::printf("%d %d %lld %lld %lld %lld %lld\n", p.tiles_h, p.tiles_w, (long long)p.tiles,
              (long long)p.chunk, (long long)p.weight_bytes, (long long)p.input_bytes,
              (long long)p.product_bytes);
}

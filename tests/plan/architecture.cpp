// Prints, of each architecture given as Device::arch, whose constants it takes, whose these are,
// and where they come from, in words; without an argument the table. Exit status 1 if one that was
// not measured has other constants than the one that it takes them from.
#include "plan/architecture.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace torch_mbv2;
using namespace torch_mbv2::plan;

namespace {

template <typename Costs>
bool equal(const Costs& a, const Costs& b) {
  return std::memcmp(&a, &b, sizeof(Costs)) == 0;
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const int arch = std::atoi(argv[i]);
    const Architecture& a = architecture_of(arch);
    std::printf("%d %d %s\n", a.arch, a.measured_arch, about_costs(arch).c_str());
  }
  if (argc > 1) return 0;
  for (const Architecture& a : kArchitectures) {
    const Architecture& from = architecture_of(a.measured_arch);
    std::printf("%d %d\n", a.arch, a.measured_arch);
    if (!equal(a.block, from.block) || !equal(a.product, from.product) ||
        !equal(a.conv_pool, from.conv_pool) || from.arch != a.measured_arch) {
      return 1;
    }
  }
  return 0;
}

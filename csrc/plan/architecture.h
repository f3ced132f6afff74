// The constants of the cost models, one struct an architecture, and where they come from. Host
// only, no CUDA needed. An architecture that nobody has measured takes another one's constants.
//
// scripts/fit_costs.py times the kernels on the GPU that it runs on, fits the constants, and with
// --write replaces what is between the markers of that architecture.
#pragma once

#include <iterator>
#include <string>

#include "plan/block.h"
#include "plan/conv_pool.h"
#include "plan/product.h"

namespace torch_mbv2::plan {

struct Architecture {
  int arch;                 // as Device::arch
  int measured_arch;        // another one's where this one has not been measured
  const char* measured_on;  // the GPU that the constants were fitted to times of
  BlockCosts block;
  ProductCosts product;
  ConvPoolCosts conv_pool;
};

namespace architecture_detail {

// Starts from the constants that the models are declared with.
constexpr Architecture measured(int arch, const char* gpu) { return {arch, arch, gpu, {}, {}, {}}; }

constexpr Architecture inherited(int arch, Architecture from) {
  from.arch = arch;
  return from;
}

constexpr Architecture sm_90() {
  // fit_costs: begin sm_90
  Architecture a = measured(900, "an H100 and an H200");
  // fit_costs: end sm_90
  return a;
}

constexpr Architecture sm_80() {
  // fit_costs: begin sm_80
  Architecture a = inherited(800, sm_90());
  // fit_costs: end sm_80
  return a;
}

constexpr Architecture sm_86() {
  // fit_costs: begin sm_86
  Architecture a = inherited(860, sm_90());
  // fit_costs: end sm_86
  return a;
}

constexpr Architecture sm_89() {
  // fit_costs: begin sm_89
  Architecture a = inherited(890, sm_90());
  // fit_costs: end sm_89
  return a;
}

constexpr Architecture sm_100() {
  // fit_costs: begin sm_100
  Architecture a = inherited(1000, sm_90());
  // fit_costs: end sm_100
  return a;
}

constexpr Architecture sm_120() {
  // fit_costs: begin sm_120
  Architecture a = inherited(1200, sm_90());
  // fit_costs: end sm_120
  return a;
}

inline std::string sm(int arch) { return "sm_" + std::to_string(arch / 10); }

}  // namespace architecture_detail

// From the oldest to the newest.
inline constexpr Architecture kArchitectures[] = {
    architecture_detail::sm_80(), architecture_detail::sm_86(),  architecture_detail::sm_89(),
    architecture_detail::sm_90(), architecture_detail::sm_100(), architecture_detail::sm_120(),
};

// Of Device::arch: one that is not in the table takes the nearest older one's constants, and a
// device that cannot tell (0) takes sm_90's, as the best known.
inline const Architecture& architecture_of(int arch) {
  if (arch == 0) arch = 900;
  const Architecture* found = kArchitectures;
  for (const Architecture& a : kArchitectures) {
    if (a.arch <= arch) found = &a;
  }
  return *found;
}

// Where the constants for a device come from: one sentence.
inline std::string about_costs(int arch) {
  using architecture_detail::sm;
  const Architecture& a = architecture_of(arch);
  std::string text = "tiles are chosen by times measured on " + std::string(a.measured_on) + " (" +
                     sm(a.measured_arch) + ")";
  if (arch != 0 && a.measured_arch != arch) text += "; " + sm(arch) + " has not been measured";
  return text;
}

}  // namespace torch_mbv2::plan

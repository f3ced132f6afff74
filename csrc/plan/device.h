// What the host knows of a GPU when it chooses tiles and launches kernels. No CUDA needed.
#pragma once

#include <compare>

namespace torch_mbv2 {

struct Device {
  int arch;  // __CUDA_ARCH__ of the code that runs: less than the GPU's where that was older PTX;
             // 0 where it cannot be told
  int multiprocessors;
  int shared_per_block;           // bytes, opt-in
  int shared_per_multiprocessor;  // bytes

  // Clusters of thread blocks, and kernels that start before the one before them has finished.
  bool is_hopper_or_newer() const { return arch >= 900; }

  auto operator<=>(const Device&) const = default;
};

}  // namespace torch_mbv2

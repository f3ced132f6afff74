// What the host knows of a GPU when it chooses tiles and launches kernels. No CUDA needed.
#pragma once

#include <algorithm>
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

  // Bytes that a thread block asks for at least where all of a launch start at once, one for each
  // multiprocessor, so that no two share one. A kernel that starts while the one before it still
  // fills most multiprocessors would otherwise crowd into those that are free.
  int shared_if_alone() const {
    return is_hopper_or_newer() ? std::min(shared_per_block, shared_per_multiprocessor / 2) : 0;
  }

  auto operator<=>(const Device&) const = default;
};

}  // namespace torch_mbv2

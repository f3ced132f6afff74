// Plans, made once for a problem and a device. No CUDA needed.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

#include "plan/device.h"

namespace torch_mbv2::plan {

// Remembers what `make` gives, as trying all tiles takes longer than a launch.
template <typename Problem, typename Plan>
class Cache {
 public:
  template <typename Make>
  Plan get(const Problem& problem, const Device& device, Make&& make) {
    const std::pair<Device, Problem> key = {device, problem};
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(key);
    if (found != plans_.end()) return found->second;
    const Plan plan = make(problem, device);
    if (device.arch == 0) return plan;  // what a device cannot tell now, it may tell later
    // Batches of any size come and go; what they would fill memory with is soon planned again.
    if (plans_.size() >= kMost) plans_.clear();
    plans_.emplace(key, plan);
    return plan;
  }

 private:
  static constexpr size_t kMost = 4096;
  std::mutex mutex_;
  std::map<std::pair<Device, Problem>, Plan> plans_;
};

}  // namespace torch_mbv2::plan

// CUDA graphs of whole networks, kept so that a small batch costs one launch.
#pragma once

#include <memory>

#include "bind/network_plan.h"
#include "bind/tensors.h"

namespace torch_mbv2::bind {

// Replays the launches of `plan` on `stream`, if a graph of them is kept for that stream and these
// weights, or if this is the second time that they are asked for there; false if nothing was
// launched. Never while the stream is captured. Threads may call it for one stream or for several.
bool replay(const std::shared_ptr<const NetworkPlan>& plan, const Bases& bases, int device,
            cudaStream_t stream);

struct ReplayTotals {
  int64_t graphs, scratch_bytes;
};
ReplayTotals replay_totals();
// Forgets every graph and gives its scratch memory back.
void drop_replays();

}  // namespace torch_mbv2::bind

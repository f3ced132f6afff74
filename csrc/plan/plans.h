// The plan of a problem on a device, by the costs of its architecture: made once, then remembered.
// Whoever launches a kernel, or says which one would run, asks here. No CUDA needed.
#pragma once

#include "plan/architecture.h"
#include "plan/cache.h"

namespace torch_mbv2::plan {

inline BlockPlan plan_for(const BlockProblem& problem, const Device& device) {
  static Cache<BlockProblem, BlockPlan> plans;
  return plans.get(problem, device, [](const BlockProblem& p, const Device& d) {
    return plan_block(p, d, architecture_of(d.arch).block);
  });
}

inline ProductPlan plan_for(const ProductProblem& problem, const Device& device) {
  static Cache<ProductProblem, ProductPlan> plans;
  return plans.get(problem, device, [](const ProductProblem& p, const Device& d) {
    return plan_product(p, d, architecture_of(d.arch).product);
  });
}

inline ConvPoolPlan plan_for(const ConvPoolProblem& problem, const Device& device) {
  static Cache<ConvPoolProblem, ConvPoolPlan> plans;
  return plans.get(problem, device, [](const ConvPoolProblem& p, const Device& d) {
    return plan_conv_pool(p, d, architecture_of(d.arch).conv_pool);
  });
}

}  // namespace torch_mbv2::plan

// conv_pool on a given plan.
#pragma once

#include "kernels.h"
#include "plan/conv_pool.h"

namespace torch_mbv2 {

// What conv_pool plans for.
plan::ConvPoolProblem conv_pool_problem(const ConvPoolParams& p);

// As conv_pool of kernels.h, on any of conv_pool_candidates for the problem: to time them.
cudaError_t conv_pool(const ConvPoolParams& p, const plan::ConvPoolPlan& plan, LaunchQueue& queue);

}  // namespace torch_mbv2

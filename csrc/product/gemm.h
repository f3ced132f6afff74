// gemm on a given plan.
#pragma once

#include "kernels.h"
#include "plan/product.h"

namespace torch_mbv2 {

// What gemm plans for.
plan::ProductProblem gemm_problem(const GemmParams& p);

// As gemm of kernels.h, on any of product_candidates for the problem: to time them.
cudaError_t gemm(const GemmParams& p, const plan::ProductPlan& plan, LaunchQueue& queue);

}  // namespace torch_mbv2

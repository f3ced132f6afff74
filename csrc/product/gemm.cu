// gemm of kernels.h: pointwise convolutions and linear layers.
#include "product/gemm.h"
#include "product/product.cuh"

namespace torch_mbv2 {
namespace {

template <typename T, bool kVectors>
cudaError_t run(const GemmParams& p, const plan::ProductPlan& plan, LaunchQueue& queue) {
  ProductParams g{};
  g.weight = p.weight;
  g.bias = p.bias;
  g.output = p.output;
  g.m = p.m;
  g.n = p.n;
  g.k = p.k;
  g.pitch = p.n;
  g.weight_step = int64_t(p.n) * p.k;
  g.output_step = p.m * p.n;
  g.act = p.act;
  const typename MatrixLoader<T, kVectors>::Params a = {static_cast<const T*>(p.a), p.m * p.k};
  return launch_product<T, MatrixLoader<T, kVectors>, kVectors, true>(g, a, p.batch, plan, 1,
                                                                      queue);
}

}  // namespace

plan::ProductProblem gemm_problem(const GemmParams& p) {
  const bool vectors = p.k % (16 / bytes_of(p.dtype)) == 0 && is_aligned16(p.a) &&
                       is_aligned16(p.weight) && is_aligned16(p.output);
  return {.m = p.m,
          .n = p.n,
          .k = p.k,
          .batch = p.batch,
          .dtype = p.dtype,
          .matrix = true,
          .vectors = vectors};
}

cudaError_t gemm(const GemmParams& p, const plan::ProductPlan& plan, LaunchQueue& queue) {
  if (p.m == 0 || p.n == 0 || p.batch == 0) return cudaSuccess;
  return dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    return gemm_problem(p).vectors ? run<T, true>(p, plan, queue) : run<T, false>(p, plan, queue);
  });
}

cudaError_t gemm(const GemmParams& p, LaunchQueue& queue) {
  if (p.m == 0 || p.n == 0 || p.batch == 0) return cudaSuccess;
  return gemm(p, plan::plan_for(gemm_problem(p), queue.device()), queue);
}

}  // namespace torch_mbv2

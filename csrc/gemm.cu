// gemm of kernels.h: pointwise convolutions and linear layers.
#include "product.cuh"

namespace torch_mbv2 {
namespace {

template <typename T, bool kVectors>
cudaError_t run(const GemmParams& p, cudaStream_t stream) {
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
  return launch_best<T, MatrixLoader<T, kVectors>, kVectors, true>(g, a, p.batch, stream);
}

}  // namespace

cudaError_t gemm(const GemmParams& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0 || p.batch == 0) return cudaSuccess;
  return dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = p.k % kVecSize<T> == 0 && is_aligned16(p.a) && is_aligned16(p.weight) &&
                         is_aligned16(p.output);
    return vectors ? run<T, true>(p, stream) : run<T, false>(p, stream);
  });
}

}  // namespace torch_mbv2

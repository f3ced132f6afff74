// conv_implicit_gemm of kernels.h: any convolution as a product of its windows, which are gathered
// on the way to shared memory and never written to device memory.
#include "product/product.cuh"

namespace torch_mbv2 {
namespace {

template <typename T, bool kVectors>
cudaError_t run(const ConvParams& p, LaunchQueue& queue) {
  using Loader = WindowLoader<T, kVectors>;
  ProductParams g{};
  const int group_outputs = p.out_channels / p.groups;
  g.weight = p.weight;
  g.bias = p.bias;
  g.n = group_outputs;
  g.k = p.kernel_h * p.kernel_w * (p.in_channels / p.groups);
  g.pitch = p.out_channels;
  g.weight_step = int64_t(group_outputs) * g.k;
  g.bias_step = group_outputs;
  g.output_step = group_outputs;
  g.act = p.act;
  const int64_t pixels = int64_t(p.out_h) * p.out_w;
  // Chosen for the whole batch, so that all parts of it add up alike.
  const plan::ProductProblem problem = {.m = p.batch * pixels,
                                        .n = g.n,
                                        .k = g.k,
                                        .batch = p.groups,
                                        .dtype = p.dtype,
                                        .matrix = false,
                                        .vectors = kVectors};
  const plan::ProductPlan plan = plan::plan_for(problem, queue.device());
  return for_each_chunk(p.batch, pixels, [&](int64_t first, int64_t images) {
    ConvParams chunk = p;
    chunk.input = static_cast<const T*>(p.input) + first * p.in_stride_n;
    chunk.batch = images;
    g.m = images * pixels;
    g.output = static_cast<T*>(p.output) + first * pixels * p.out_channels;
    return launch_product<T, Loader, kVectors, false>(g, Loader::params(chunk), p.groups, plan,
                                                      double(images) / double(p.batch), queue);
  });
}

}  // namespace

cudaError_t conv_implicit_gemm(const ConvParams& p, LaunchQueue& queue) {
  if (p.batch == 0 || p.out_channels == 0 || p.out_h == 0 || p.out_w == 0) return cudaSuccess;
  return dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kV = kVecSize<T>;
    const bool vectors = p.in_channels / p.groups % kV == 0 &&
                         p.out_channels / p.groups % kV == 0 && p.in_stride_c == 1 &&
                         p.in_stride_w % kV == 0 && p.in_stride_h % kV == 0 &&
                         p.in_stride_n % kV == 0 && is_aligned16(p.input) &&
                         is_aligned16(p.weight) && is_aligned16(p.output);
    return vectors ? run<T, true>(p, queue) : run<T, false>(p, queue);
  });
}

}  // namespace torch_mbv2

// conv_pool of kernels.h: a 1x1 convolution, its activation and the mean over the pixels in one
// kernel; the map between them exists only in registers. Which kernel and tile: plan/conv_pool.h.
#include <iterator>
#include <utility>

#include "conv_pool/conv_pool.h"
#include "conv_pool/direct.cuh"
#include "conv_pool/float.cuh"
#include "conv_pool/resident.cuh"

namespace torch_mbv2 {
namespace {

template <typename T, int kSteps, int kHigh>
cudaError_t launch_resident(const ConvPoolParams& p, const ConvPoolPlan& plan,
                            cudaStream_t stream) {
  using Kernel = conv_pool_kernels::Resident<kSteps, kHigh>;
  const auto kernel = conv_pool_kernels::resident_product<T, kSteps, kHigh>;
  const conv_pool_kernels::GroupShape s = {ceil_div(p.n, plan.channels()), plan.images,
                                           1.0f / float(p.pixels), PixelOrder(p.pixels)};
  const int64_t blocks = ceil_div(p.batch, int64_t(plan.images)) * s.channel_groups;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(kernel, unsigned(blocks), 32 * plan.warps, Kernel::shared_bytes(plan.warps),
                       stream, p, s);
}

// A kernel whose thread blocks own one image each. All launches that a batch is split into run the
// same plan, so that equal images get equal means.
template <typename T, typename Kernel>
cudaError_t launch_images(Kernel kernel, const ConvPoolParams& p, const ConvPoolPlan& plan,
                          cudaStream_t stream) {
  const conv_pool_kernels::ImageShape s = {ceil_div(p.n, plan.channels()), 1.0f / float(p.pixels)};
  return for_each_chunk(p.batch, s.channel_groups, [&](int64_t first, int64_t images) {
    ConvPoolParams chunk = p;
    chunk.input = static_cast<const T*>(p.input) + first * p.pixels * p.k;
    chunk.output = static_cast<T*>(p.output) + first * p.n;
    return launch_kernel(kernel, unsigned(images * s.channel_groups), 32 * plan.warps, 0, stream,
                         chunk, s);
  });
}

template <typename T, int kInstance>
cudaError_t launch(const ConvPoolParams& p, const ConvPoolPlan& plan, cudaStream_t stream) {
  constexpr ConvPoolInstance kThis = kConvPoolInstances[kInstance];
  if constexpr ((kThis.kernel == ConvPoolKernel::kFloat) != (sizeof(T) == 4)) {
    return cudaErrorInvalidValue;
  } else if constexpr (kThis.kernel == ConvPoolKernel::kFloat) {
    return launch_images<T>(conv_pool_kernels::float_pool<kThis.wide, kThis.vectors>, p, plan,
                            stream);
  } else if constexpr (kThis.kernel == ConvPoolKernel::kDirect) {
    return launch_images<T>(conv_pool_kernels::direct_product<T, kThis.high, kThis.vectors>, p,
                            plan, stream);
  } else {
    return launch_resident<T, kThis.steps, kThis.high>(p, plan, stream);
  }
}

template <typename T, int... kInstances>
cudaError_t launch_instance(const ConvPoolParams& p, const ConvPoolPlan& plan, cudaStream_t stream,
                            std::integer_sequence<int, kInstances...>) {
  cudaError_t error = cudaErrorInvalidValue;
  ((plan.instance == kInstances ? void(error = launch<T, kInstances>(p, plan, stream)) : void()),
   ...);
  return error;
}

}  // namespace

ConvPoolProblem conv_pool_problem(const ConvPoolParams& p) {
  const int bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  const bool vectors = p.k % (16 / bytes) == 0 && is_aligned16(p.input) && is_aligned16(p.weight);
  return {p.batch, p.pixels, p.k, p.n, bytes, vectors};
}

cudaError_t conv_pool(const ConvPoolParams& p, const ConvPoolPlan& plan, cudaStream_t stream) {
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  return dispatch(p.dtype, [&](auto zero) {
    constexpr int kCount = int(std::size(kConvPoolInstances));
    return launch_instance<decltype(zero)>(p, plan, stream,
                                           std::make_integer_sequence<int, kCount>{});
  });
}

cudaError_t conv_pool(const ConvPoolParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  return conv_pool(p, plan_conv_pool(conv_pool_problem(p), current_device()), stream);
}

}  // namespace torch_mbv2

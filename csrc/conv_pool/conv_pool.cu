// conv_pool of kernels.h: a 1x1 convolution, its activation and the mean over the pixels in one
// kernel; the map between them exists only in registers. Which kernel and tile: plan/conv_pool.h.
#include <iterator>
#include <utility>

#include "conv_pool/conv_pool.h"
#include "conv_pool/direct.cuh"
#include "conv_pool/float.cuh"
#include "conv_pool/resident.cuh"
#include "plan/plans.h"

namespace torch_mbv2 {
namespace {

template <typename T, int kSteps, int kHigh>
cudaError_t launch_resident(const ConvPoolParams& p, const plan::ConvPoolPlan& plan,
                            LaunchQueue& queue) {
  using Kernel = conv_pool_kernels::Resident<kSteps, kHigh>;
  const auto kernel = conv_pool_kernels::resident_product<T, kSteps, kHigh>;
  const conv_pool_kernels::GroupShape s = {ceil_div(p.n, plan.channels()), plan.images,
                                           1.0f / float(p.pixels), PixelOrder(p.pixels)};
  const int64_t blocks = ceil_div(p.batch, int64_t(plan.images)) * s.channel_groups;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel({"conv_pool", plan.clocks}, kernel, unsigned(blocks), 32 * plan.warps,
                       Kernel::shared_bytes(plan.warps), queue, p, s);
}

// A kernel whose thread blocks own one image each. All launches that a batch is split into run the
// same plan, so that equal images get equal means.
template <typename T, typename Kernel>
cudaError_t launch_images(Kernel kernel, const ConvPoolParams& p, const plan::ConvPoolPlan& plan,
                          LaunchQueue& queue) {
  const conv_pool_kernels::ImageShape s = {ceil_div(p.n, plan.channels()), 1.0f / float(p.pixels)};
  return for_each_chunk(p.batch, s.channel_groups, [&](int64_t first, int64_t images) {
    ConvPoolParams chunk = p;
    chunk.input = static_cast<const T*>(p.input) + first * p.pixels * p.k;
    chunk.output = static_cast<T*>(p.output) + first * p.n;
    const double clocks = plan.clocks * double(images) / double(p.batch);
    return launch_kernel({"conv_pool", clocks}, kernel, unsigned(images * s.channel_groups),
                         32 * plan.warps, 0, queue, chunk, s);
  });
}

template <typename T, int kInstance>
cudaError_t launch(const ConvPoolParams& p, const plan::ConvPoolPlan& plan, LaunchQueue& queue) {
  constexpr plan::ConvPoolInstance kThis = plan::kConvPoolInstances[kInstance];
  if constexpr ((kThis.kernel == plan::ConvPoolKernel::kFloat) != (sizeof(T) == 4)) {
    return cudaErrorInvalidValue;
  } else if constexpr (kThis.kernel == plan::ConvPoolKernel::kFloat) {
    return launch_images<T>(conv_pool_kernels::float_pool<kThis.wide, kThis.vectors>, p, plan,
                            queue);
  } else if constexpr (kThis.kernel == plan::ConvPoolKernel::kDirect) {
    return launch_images<T>(conv_pool_kernels::direct_product<T, kThis.high, kThis.vectors>, p,
                            plan, queue);
  } else {
    return launch_resident<T, kThis.steps, kThis.high>(p, plan, queue);
  }
}

template <typename T, int... kInstances>
cudaError_t launch_instance(const ConvPoolParams& p, const plan::ConvPoolPlan& plan,
                            LaunchQueue& queue, std::integer_sequence<int, kInstances...>) {
  cudaError_t error = cudaErrorInvalidValue;
  ((plan.instance == kInstances ? void(error = launch<T, kInstances>(p, plan, queue)) : void()),
   ...);
  return error;
}

}  // namespace

plan::ConvPoolProblem conv_pool_problem(const ConvPoolParams& p) {
  const int bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  const bool vectors = p.k % (16 / bytes) == 0 && is_aligned16(p.input) && is_aligned16(p.weight);
  return {p.batch, p.pixels, p.k, p.n, bytes, vectors};
}

cudaError_t conv_pool(const ConvPoolParams& p, const plan::ConvPoolPlan& plan, LaunchQueue& queue) {
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  return dispatch(p.dtype, [&](auto zero) {
    constexpr int kCount = int(std::size(plan::kConvPoolInstances));
    return launch_instance<decltype(zero)>(p, plan, queue,
                                           std::make_integer_sequence<int, kCount>{});
  });
}

cudaError_t conv_pool(const ConvPoolParams& p, LaunchQueue& queue) {
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  return conv_pool(p, plan::plan_for(conv_pool_problem(p), queue.device()), queue);
}

}  // namespace torch_mbv2

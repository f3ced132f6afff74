// output[i] = clamp(a[i] + b[i]), the residual add. Bound by device memory: 3 accesses an element.
#include "device/launch.cuh"
#include "device/vector.cuh"
#include "kernels.h"

namespace torch_mbv2 {
namespace {

// A thread owns kUnroll vectors of kV elements, a thread block apart, so that its loads are
// independent and every access of a warp is contiguous.
constexpr int kBlock = 256;
constexpr int kUnroll = 4;

template <typename T, int kV>
__global__ void __launch_bounds__(kBlock) add_kernel(const __grid_constant__ AddParams p) {
  const int64_t vecs = p.numel / kV;
  const int64_t first = int64_t(blockIdx.x) * (kBlock * kUnroll) + threadIdx.x;
  const T* const a = static_cast<const T*>(p.a);
  const T* const b = static_cast<const T*>(p.b);
  float left[kUnroll][kV], right[kUnroll][kV];
  wait_for_input();
  start_next();
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kBlock;
    if (i < vecs) {
      load_floats(a + i * kV, left[u]);
      load_floats(b + i * kV, right[u]);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kBlock;
    if (i < vecs) {
#pragma unroll
      for (int v = 0; v < kV; ++v) left[u][v] = apply(p.act, left[u][v] + right[u][v]);
      store_floats(static_cast<T*>(p.output) + i * kV, left[u]);
    }
  }
}

template <typename T, int kV>
cudaError_t launch(const AddParams& p, LaunchQueue& queue) {
  const int64_t blocks = ceil_div(p.numel / kV, int64_t(kBlock * kUnroll));
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel({"add"}, add_kernel<T, kV>, unsigned(blocks), kBlock, 0, queue, p);
}

}  // namespace

cudaError_t add(const AddParams& p, LaunchQueue& queue) {
  if (p.numel == 0) return cudaSuccess;
  return dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = p.numel % kVecSize<T> == 0 && is_aligned16(p.a) && is_aligned16(p.b) &&
                         is_aligned16(p.output);
    return vectors ? launch<T, kVecSize<T>>(p, queue) : launch<T, 1>(p, queue);
  });
}

}  // namespace torch_mbv2

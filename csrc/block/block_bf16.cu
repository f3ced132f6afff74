// The instances of kernel.cuh for bfloat16.
#include "block/kernel.cuh"

namespace torch_mbv2::block {

cudaError_t launch_bf16(int kernel, const BlockArgs& a, const BlockLaunch& launch) {
  return launch_kernel_of<__nv_bfloat16>(kernel, a, launch);
}

}  // namespace torch_mbv2::block

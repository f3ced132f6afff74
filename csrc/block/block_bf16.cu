// The instances of kernel.cuh for bfloat16.
#include "block/kernel.cuh"

namespace torch_mbv2::block {

cudaError_t launch_bf16(const BlockArgs& a, const plan::BlockPlan& plan, int64_t thread_blocks,
                        LaunchQueue& queue) {
  return launch_kernel_of<__nv_bfloat16>(a, plan, thread_blocks, queue);
}

}  // namespace torch_mbv2::block

// The instances of kernel.cuh for float16.
#include "block/kernel.cuh"

namespace torch_mbv2::block {

cudaError_t launch_f16(const BlockArgs& a, const plan::BlockPlan& plan, int64_t thread_blocks,
                       LaunchQueue& queue) {
  return launch_kernel_of<__half>(a, plan, thread_blocks, queue);
}

}  // namespace torch_mbv2::block

// The instances of kernel.cuh for float16.
#include "block/kernel.cuh"

namespace torch_mbv2::block {

cudaError_t launch_f16(int kernel, const BlockArgs& a, const BlockLaunch& launch) {
  return launch_kernel_of<__half>(kernel, a, launch);
}

}  // namespace torch_mbv2::block

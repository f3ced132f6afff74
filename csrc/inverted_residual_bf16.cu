// The instances of inverted_residual.cuh for bfloat16.
#include "inverted_residual.cuh"

namespace torch_mbv2 {

cudaError_t launch_block_bf16(int kernel, const BlockArgs& a, const BlockLaunch& launch) {
  return launch_block<__nv_bfloat16>(kernel, a, launch);
}

}  // namespace torch_mbv2

// The instances of inverted_residual.cuh for float16.
#include "inverted_residual.cuh"

namespace torch_mbv2 {

cudaError_t launch_block_f16(int kernel, const BlockArgs& a, const BlockLaunch& launch) {
  return launch_block<__half>(kernel, a, launch);
}

}  // namespace torch_mbv2

// What the architecture that is compiled for has, and what its compiler needs: code chooses by
// these names, not by numbers.
#pragma once

namespace torch_mbv2 {

struct Arch {
#ifdef __CUDA_ARCH__
  static constexpr int kNumber = __CUDA_ARCH__;
#else
  static constexpr int kNumber = 0;  // the host's pass, which compiles no device code
#endif
  // Clusters of thread blocks that read each other's shared memory.
  static constexpr bool kHasClusters = kNumber >= 900;
  // Kernels that start before the one before them in the stream has finished.
  static constexpr bool kHasDependentLaunch = kNumber >= 900;
  // Copies of any size by one thread, with barriers that count their bytes. For sm_120, which has
  // them too, the block kernel would spill registers.
  static constexpr bool kHasBulkCopies = kNumber >= 900 && kNumber < 1200;
  // Whether threadIdx is better kept in a register than read again (thread_index of memory.cuh).
  static constexpr bool kKeepsThreadIndex = kNumber == 900;
};

// Launch bounds of kernels of which the compiler, for Blackwell, would spill registers so that one
// more thread block fits a multiprocessor.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define BOUNDS_WITHOUT_SPILLS(threads) __launch_bounds__(threads, 1)
#else
#define BOUNDS_WITHOUT_SPILLS(threads) __launch_bounds__(threads)
#endif

}  // namespace torch_mbv2

// A whole inverted residual (Sandler et al. 2018) in one kernel:
//
//   e[y, x, :]   = clamp(expand_weight . source[y, x, :] + expand_bias)     inside the map, else 0
//   d[y, x, c]   = clamp(depthwise_bias[c] + sum over i, j < 3 of depthwise_weight[c, i, j]
//                        * e[y * stride - pad_top + i, x * stride - pad_left + j, c])
//   out[y, x, :] = project_weight . d[y, x, :] + project_bias [+ input[y, x, :]]
//
// The expanded map e lives in shared memory, kChunk channels at a time, and d in registers only.
// The source is the input (1x1 expansion), or the 3x3 windows of stride 2 of an image (the stem of
// the network), which lies in shared memory as it does in device memory, or e is the input itself
// (no expansion).
//
// Layouts: input and output NHWC, dense; the image has any strides; weights as pack of packing.py
// lays them out (see PackedSizes of plan/block.h).
//
// Ownership. A thread block owns `images` images' tile of tile_h x tile_w output pixels, all
// channels of a slice of at most 320 output channels, and, of `splits` thread blocks of a cluster,
// its share of the chunks. A warp owns kCols octets (8 pixels of one row) times 2 * kRows rows of
// the tile: pairs of rows of an octet are the 16 rows of a tensor-core tile, so the projection of
// kRows * kCols tiles accumulates in its registers over all chunks.
//
// Phases of the kernel below, each a function of the file named:
//   1. where the tile lies, and what of the source it reads              source.cuh
//   2. where source pixels go in e, zeros outside the map, and on their
//      way: the source and the weights of the first chunk                source.cuh, storage.cuh
//   3. sums start from the bias of the projection                        project.cuh
//   then, for each chunk:
//   4. its weights have arrived, the next ones are on their way          storage.cuh
//   5. all warps share the expansion of the tile with its halo           expand.cuh
//   6. every warp convolves its own pixels depthwise and projects them,
//      16 channels at a time; where registers allow, the next 16 are
//      convolved between the products of a projection                    depthwise.cuh, project.cuh
//   and in the end:
//   7. the output, or first the sums over a cluster                      output.cuh
// Biases are products with ones: a sum starts from its bias without a move for each register.
//
// Shared memory, in this order (BlockStorage of plan/block.h): the source of the tile with its
// halo, for the expansion and the residual; a barrier for each stage of weights; weights of two
// chunks, or of one where there is no room; e; where each pixel of the source goes in e, and of an
// image where its window is. At the end the partial sums of a cluster's thread blocks overlay all
// from the weights on.
//
// Bound: at large batches by tensor-core instructions, the others and shared memory together; at
// small ones by chains of dependent instructions and, in a cluster, by the way of the sums from one
// multiprocessor to another. Device memory only sees input, output and the weights (from L2).
#pragma once

#include <utility>

#include "block/expand.cuh"
#include "block/output.cuh"
#include "device/launch.cuh"

namespace torch_mbv2::block {

template <typename Instance>
__global__ void __launch_bounds__(Instance::kMaxThreads, Instance::kMinBlocks)
    inverted_residual_kernel(const __grid_constant__ BlockArgs a) {
  using T = typename Instance::T;
  const SharedMemory memory(a.storage);

  // 1. Where the tile lies.
  const SourceTile<Instance> tile(a);

  // 2. The source and the first weights. Where all thread blocks start at once, while the kernel
  // before this one still runs, they do first what needs no input.
  make_weight_barriers(memory);
  const bool waits_late = a.one_round && !has_few_units<Instance>(a);
  if (!waits_late) {
    wait_for_input();
    load_weights(a, memory, 0);
  }
  place_pixels<Instance>(a, memory, tile);
  skip_pixels<Instance>(memory, tile);
  if (waits_late) {
    wait_for_input();
    load_weights(a, memory, 0);
  }
  load_source<Instance>(a, memory, tile);
  copy_async_commit();

  // 3. Sums.
  const PackedClamp<T> clamp(a.upper_bound);
  const Windows<Instance> windows(a, memory);
  Projection<Instance> projection(a);

#pragma unroll 1
  for (int c = 0; c < ChunkRange(a).count; ++c) {
    // 4. Weights.
    const uint32_t weights = receive_weights(a, memory, c);
    const Lane me;
    const BiasOperand<T> bias(me.q);

    // 5. Expand.
    expand<Instance>(a, memory, tile.tiles, clamp, me, bias.ones, weights, c);
    __syncthreads();

    // 6. Convolve and project.
    const Depthwise<Instance> depthwise(windows, clamp, bias.ones, weights, me);
    convolve_and_project<Instance>(depthwise, projection);
  }
  start_next();

  // 7. Output.
  const OutputWriter<Instance> writer(a, memory);
  if (a.splits == 1) {
    write_sums<Instance>(writer, projection);
  } else {
    sum_cluster<Instance>(a, memory, writer, projection);
  }
}

template <typename Instance>
cudaError_t launch_instance(const BlockArgs& a, const plan::BlockPlan& plan, int64_t thread_blocks,
                            LaunchQueue& queue) {
  const plan::BlockTile& t = plan.tile;
  Launch launch;
  launch.family = Instance::kImage ? "stem_block" : "inverted_residual";
  launch.kernel = reinterpret_cast<const void*>(inverted_residual_kernel<Instance>);
  launch.grid = dim3(unsigned(thread_blocks), unsigned(plan.slices));
  launch.block = dim3(unsigned(32 * t.cut.warps_x * t.cut.warps_y * t.cut.images));
  launch.shared_bytes = size_t(t.shared_bytes);
  launch.cluster = unsigned(t.cut.splits);
  launch.early = queue.device().is_hopper_or_newer();
  launch.clocks = t.clocks * double(thread_blocks * plan.slices) / t.thread_blocks;
  launch.add(a);
  return queue.add(launch);
}

template <typename T, int... kIndices>
cudaError_t launch_any(const BlockArgs& a, const plan::BlockPlan& plan, int64_t thread_blocks,
                       LaunchQueue& queue, std::integer_sequence<int, kIndices...>) {
  using Launcher = cudaError_t (*)(const BlockArgs&, const plan::BlockPlan&, int64_t, LaunchQueue&);
  static constexpr Launcher kLaunchers[] = {launch_instance<BlockInstance<T, kIndices>>...};
  return kLaunchers[plan.tile.cut.kernel](a, plan, thread_blocks, queue);
}

template <typename T>
cudaError_t launch_kernel_of(const BlockArgs& a, const plan::BlockPlan& plan, int64_t thread_blocks,
                             LaunchQueue& queue) {
  return launch_any<T>(a, plan, thread_blocks, queue,
                       std::make_integer_sequence<int, plan::kBlockKernelCount>{});
}

}  // namespace torch_mbv2::block

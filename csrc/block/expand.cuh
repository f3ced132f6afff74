// One chunk of the expanded map of the tile with its halo, in shared memory: 16 pixels of the
// source at a time, which all warps share among them.
#pragma once

#include "block/source.cuh"
#include "device/mma.cuh"

namespace torch_mbv2::block {

// Left operand of mma_bias: ones in the first two of 8 of k, in lanes of which q is 0. Both
// registers are the same, but are made of different sources: else the compiler keeps one of them
// and copies a pair for each use.
template <typename T>
struct BiasOperand {
  uint32_t ones[2];

  __device__ __forceinline__ explicit BiasOperand(int q) {
    ones[0] = opaque(q == 0 ? Element<T>::kTwoOnes : 0u);
    ones[1] = opaque(lane_index() % 4 == 0 ? Element<T>::kTwoOnes : 0u);
  }
};

// Rows of a tile of 16 pixels are ordered so that the two rows that one phase of a 16-byte store
// meets are in different banks: 4 pixels apart or, where rows of the expanded map are split,
// neighbours.
template <typename Instance>
__device__ __forceinline__ int pixel_of_row(int i) {
  return Instance::kSplit ? (i & 1) + 2 * (i & 2) + (i & 4) / 2
                          : 4 * (i & 1) + (i & 2) + (i & 4) / 4;
}

// What every form of the expansion takes: the tiles of the source and this lane's part of the
// chunk's weights.
template <typename Instance>
struct Expansion {
  using T = typename Instance::T;
  const BlockArgs& a;
  const SharedMemory& memory;
  const PackedClamp<T>& clamp;
  const Lane& me;
  const uint32_t (&ones)[2];  // of BiasOperand
  int warps;
  int tiles;                           // of 16 pixels
  uint32_t fragments, bias_fragments;  // addresses
  uint32_t operands;                   // address of this lane's row of the first left operand: a
                                       // pixel, and one of two units
  int row;                             // the pixel of this lane's row g of a tile

  // The weights of a k step and a pair of n tiles.
  __device__ __forceinline__ uint4 weights(int s, int pair) const {
    return load_shared16(fragments + (s * Instance::kPairs + pair) * 4 * kFragmentBytes);
  }
  __device__ __forceinline__ uint32_t bias(int j) const {
    return load_shared4(bias_fragments + j * kFragmentBytes);
  }
  __device__ __forceinline__ uint32_t operand(int t) const {
    return operands + t * 16 * memory.source_pixel;
  }
  // Offset of the entries of `places` and `windows` for this lane's row g of tile t; that of row
  // g + 8 is kNextEntry behind.
  static constexpr int kNextEntry = 8 * kAddressBytes;
  __device__ __forceinline__ uint32_t entry(int t) const { return (t * 16 + row) * kAddressBytes; }

  // Stores 4 or 2 n tiles from pair p0 on, clamped and packed: rows g and g + 8 go to two pixels of
  // the expanded map, or nowhere where its address is 0. The columns of tiles are such that a lane
  // has 8 (of 4 tiles) or 4 (of 2) consecutive channels.
  __device__ __forceinline__ void store(const float (*e)[4], int count, const uint32_t (&pixels)[2],
                                        int p0) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t pixel = pixels[half], to = pixel + p0 * Instance::kPairBytes;
      const uint32_t first = clamp(e[0][2 * half], e[0][2 * half + 1]);
      const uint32_t second = clamp(e[1][2 * half], e[1][2 * half + 1]);
      if (count == 4) {
        store_shared16_if(pixel, to + me.q * 16,
                          {first, second, clamp(e[2][2 * half], e[2][2 * half + 1]),
                           clamp(e[3][2 * half], e[3][2 * half + 1])});
      } else {
        store_shared8_if(pixel, to + me.q * 8, first, second);
      }
    }
  }
};

// With all weights in registers. kUnits are the units of 8 source channels.
template <typename Instance, int kUnits>
__device__ __forceinline__ void expand_resident(const Expansion<Instance>& x) {
  using T = typename Instance::T;
  constexpr int kPairs = Instance::kPairs, kSteps = ceil_div(kUnits, 2);
  const uint32_t places = x.memory.places;
  uint4 b[kSteps][kPairs];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) b[s][p] = x.weights(s, p);
  }
  uint32_t biases[2 * kPairs];
#pragma unroll
  for (int j = 0; j < 2 * kPairs; ++j) biases[j] = x.bias(j);
#pragma unroll 1
  for (int t = x.me.warp; t < x.tiles; t += x.warps) {
    uint32_t f[kSteps][4];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint32_t at = x.operand(t) + s * Instance::kPairBytes;
      if (2 * s + 1 < kUnits) {
        load_matrices(f[s], at);
      } else {  // the last unit of an odd number: half of the lanes load it
        load_two_matrices(f[s][0], f[s][1], at);
      }
    }
    const uint32_t entry = places + x.entry(t);
    const uint32_t pixels[2] = {load_shared4(entry), load_shared4(entry + x.kNextEntry)};
#pragma unroll
    for (int p0 = 0; p0 < kPairs; p0 += 2) {
      const int count = p0 + 2 <= kPairs ? 4 : 2;
      float e[4][4];
#pragma unroll
      for (int j = 0; j < count; ++j) mma_bias<T>(e[j], x.ones, biases[2 * p0 + j]);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int p = 0; p < count / 2; ++p) {
          const uint4& w = b[s][p0 + p];
          if (2 * s + 1 < kUnits) {
            mma<T>(e[2 * p], f[s], w.x, w.y);
            mma<T>(e[2 * p + 1], f[s], w.z, w.w);
          } else {
            mma_k8<T>(e[2 * p], f[s][0], f[s][1], w.x);
            mma_k8<T>(e[2 * p + 1], f[s][0], f[s][1], w.z);
          }
        }
      }
      x.store(e, count, pixels, p0);
    }
  }
}

template <typename Instance>
__device__ __forceinline__ void expand_few(const Expansion<Instance>& x) {
  const int units = x.a.storage.source_units;
  if (units == 1) {
    expand_resident<Instance, 1>(x);
  } else if (units == 2) {
    expand_resident<Instance, 2>(x);
  } else if (units == 3) {
    expand_resident<Instance, 3>(x);
  } else {
    expand_resident<Instance, 4>(x);
  }
}

// The same where the source is an image: k is 3 rows of 10 elements of it, the 9 of the window and
// the one before it, or after it if it starts in an even column, then the bias. A lane's operands
// are pairs of them, 4 bytes at a time. Those of the next tile are on their way while one is
// stored: they take two loads, one after the other.
template <typename Instance>
__device__ __forceinline__ void expand_image(const Expansion<Instance>& x) {
  using T = typename Instance::T;
  constexpr int kPairs = Instance::kPairs, kSteps = 2;
  constexpr int kRowPairs = 5, kLast = plan::kStemWindow * kRowPairs - 1;
  const uint32_t places = x.memory.places, windows = x.memory.windows;
  if (x.me.warp >= x.tiles) return;
  int at[4];  // of this lane's pairs of a window; the last one of lane 3 is a pair of ones
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int pair = min(4 * i + x.me.q, kLast);
    at[i] = pair / kRowPairs * x.a.storage.image_row + pair % kRowPairs * 2 * Instance::kBytes;
  }
  uint32_t f[kSteps][4];
  const auto load = [&](uint32_t window0, uint32_t window1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f[i / 2][i % 2 * 2] = load_shared4(window0 + at[i]);
      f[i / 2][i % 2 * 2 + 1] = load_shared4(window1 + at[i]);
    }
    if (x.me.q == 3) f[1][2] = f[1][3] = Element<T>::kTwoOnes;
  };
  const uint32_t first = windows + x.entry(x.me.warp);
  load(load_shared4(first), load_shared4(first + x.kNextEntry));
  uint4 b[kSteps][kPairs];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) b[s][p] = x.weights(s, p);
  }
#pragma unroll 1
  for (int t = x.me.warp; t < x.tiles; t += x.warps) {
    const uint32_t next = windows + x.entry(min(t + x.warps, x.tiles - 1));
    const uint32_t window0 = load_shared4(next), window1 = load_shared4(next + x.kNextEntry);
    const uint32_t entry = places + x.entry(t);
    const uint32_t pixels[2] = {load_shared4(entry), load_shared4(entry + x.kNextEntry)};
#pragma unroll
    for (int p0 = 0; p0 < kPairs; p0 += 2) {
      const int count = p0 + 2 <= kPairs ? 4 : 2;
      float e[4][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int p = 0; p < count / 2; ++p) {
          const uint4& w = b[s][p0 + p];
          mma<T>(e[2 * p], f[s], w.x, w.y);
          mma<T>(e[2 * p + 1], f[s], w.z, w.w);
        }
      }
      if (p0 + 2 >= kPairs) load(window0, window1);  // nobody reads this tile's any more
      x.store(e, count, pixels, p0);
    }
  }
}

// Operands of one step of 16 source channels: kPixelTiles tiles share the weights.
template <typename Instance>
struct ExpandStep {
  uint32_t source[Instance::kPixelTiles][4];
  uint4 weights[Instance::kPairs];

  // `operand`: this lane's row of the first tile.
  __device__ __forceinline__ void load(const Expansion<Instance>& x, uint32_t operand, int s) {
#pragma unroll
    for (int i = 0; i < Instance::kPixelTiles; ++i) {
      load_matrices(source[i], operand + i * 16 * x.memory.source_pixel + s * Instance::kPairBytes);
    }
#pragma unroll
    for (int p = 0; p < Instance::kPairs; ++p) weights[p] = x.weights(s, p);
  }
  __device__ __forceinline__ void multiply(
      float (&e)[Instance::kPixelTiles][2 * Instance::kPairs][4]) const {
    using T = typename Instance::T;
#pragma unroll
    for (int p = 0; p < Instance::kPairs; ++p) {
#pragma unroll
      for (int i = 0; i < Instance::kPixelTiles; ++i) {
        mma<T>(e[i][2 * p], source[i], weights[p].x, weights[p].y);
        mma<T>(e[i][2 * p + 1], source[i], weights[p].z, weights[p].w);
      }
    }
  }
};

// With weights that are read again for each tile, or each two.
template <typename Instance>
__device__ __forceinline__ void expand_many(const Expansion<Instance>& x) {
  using T = typename Instance::T;
  constexpr int kPairs = Instance::kPairs, kAtOnce = Instance::kPixelTiles;
  const int steps = x.a.storage.source_units / 2;
#pragma unroll 1
  for (int t = x.me.warp * kAtOnce; t < x.tiles; t += x.warps * kAtOnce) {
    float e[kAtOnce][2 * kPairs][4];
#pragma unroll
    for (int j = 0; j < 2 * kPairs; ++j) {
      const uint32_t bias = x.bias(j);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) mma_bias<T>(e[i][j], x.ones, bias);
    }
    const uint32_t operand = x.operand(t);
    if constexpr (Instance::kPipelined) {
      // The next step's operands are on their way meanwhile.
      ExpandStep<Instance> now;
      now.load(x, operand, 0);
#pragma unroll 2
      for (int s = 1; s < steps; ++s) {
        ExpandStep<Instance> next;
        next.load(x, operand, s);
        now.multiply(e);
        now = next;
      }
      now.multiply(e);
    } else {
#pragma unroll 2
      for (int s = 0; s < steps; ++s) {
        ExpandStep<Instance> now;
        now.load(x, operand, s);
        now.multiply(e);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t entry = x.memory.places + x.entry(t + i);
      const uint32_t pixels[2] = {load_shared4(entry), load_shared4(entry + x.kNextEntry)};
#pragma unroll
      for (int p0 = 0; p0 < kPairs; p0 += 2) {
        x.store(&e[i][2 * p0], p0 + 2 <= kPairs ? 4 : 2, pixels, p0);
      }
    }
  }
}

// No expansion: the c-th chunk of this thread block, copied from the input.
template <typename Instance>
__device__ __forceinline__ void copy_chunk(const BlockArgs& a, const SharedMemory& memory,
                                           const Lane& me, int c) {
  using T = typename Instance::T;
  constexpr int kUnits = Instance::kChunk / kUnitChannels;
  const BlockPlace here = find_place<Instance>(a);
  const int width = here.x1 - here.x0, height = here.y1 - here.y0;
  const int step = row_of_source<Instance>(width);
  const int channel0 = (ChunkRange(a).first + c) * Instance::kChunk;
  for (int line = me.warp; line < here.images * height; line += blockDim.x / 32) {
    const int image = line / height;
    const T* const from = static_cast<const T*>(a.input) +
                          ((here.image0 + image) * a.height + here.y0 + line - image * height) *
                              int64_t(a.width) * a.in_channels +
                          here.x0 * a.in_channels + channel0;
    for (int i = me.lane; i < width * kUnits; i += 32) {
      const int x = i / kUnits, unit = i % kUnits;
      const bool real = channel0 + unit * kUnitChannels < a.in_channels;
      copy_async16(
          load_shared4(memory.places + (line * step + x) * kAddressBytes) + unit * kUnitBytes,
          from + x * a.in_channels + (real ? unit * kUnitChannels : 0), real);
    }
  }
  copy_async_commit();
  copy_async_wait<0>();
}

// Makes the c-th chunk of this thread block. `tiles`: of 16 pixels of the source; `weights`:
// address of the chunk's; `ones`: of BiasOperand.
template <typename Instance>
__device__ __forceinline__ void expand(const BlockArgs& a, const SharedMemory& memory, int tiles,
                                       const PackedClamp<typename Instance::T>& clamp,
                                       const Lane& me, const uint32_t (&ones)[2], uint32_t weights,
                                       int c) {
  const int pixel = pixel_of_row<Instance>(me.lane % 8) + (me.lane & 8), unit = me.lane / 16;
  const Expansion<Instance> expansion = {
      .a = a,
      .memory = memory,
      .clamp = clamp,
      .me = me,
      .ones = ones,
      .warps = int(blockDim.x) / 32,
      .tiles = tiles,
      .fragments = weights + Instance::kSizes.fixed + me.lane * 16,
      .bias_fragments = weights + Instance::kSizes.expand_bias + me.lane * 4,
      .operands = memory.source + pixel * memory.source_pixel + unit * kUnitBytes,
      .row = pixel_of_row<Instance>(me.g)};
  if constexpr (Instance::kImage) {
    expand_image<Instance>(expansion);
  } else if (a.storage.source_units == 0) {
    copy_chunk<Instance>(a, memory, me, c);
  } else if constexpr (Instance::kResident) {
    expand_few<Instance>(expansion);
  } else {
    expand_many<Instance>(expansion);
  }
}

}  // namespace torch_mbv2::block

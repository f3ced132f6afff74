// Helpers that every kernel shares: element types, vector accesses, the output clamp, division by a
// fixed divisor, launches, also in chunks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "launch.h"

namespace torch_mbv2 {

template <typename Int>
constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

inline bool is_aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// min(max(x, lo), hi) that keeps NaN, as torch.clamp does (fmaxf would drop it).
__device__ __forceinline__ float apply(const Clamp& act, float x) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(act.lo));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(act.hi));
  return x;
}

// kSize elements moved by one access of up to 16 bytes.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vec {
  T data[kSize];
};
template <typename T>
constexpr int kVecSize = 16 / sizeof(T);  // elements in 16 bytes

// The machine word of kBytes that one load or store instruction moves.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
template <typename T, int kSize>
using Word = typename WordOf<sizeof(T) * kSize>::type;

// kSize elements by one load through the read-only path, or zeros where `valid` is false (nothing
// is read then). `p` must be aligned to the word.
template <typename T, int kSize>
__device__ __forceinline__ Word<T, kSize> load_word(const T* p, bool valid = true) {
  Word<T, kSize> word{};
  if (valid) word = __ldg(reinterpret_cast<const Word<T, kSize>*>(p));
  return word;
}

template <typename T, int kSize>
__device__ __forceinline__ void unpack(const Word<T, kSize>& word, float (&out)[kSize]) {
  T elements[kSize];
  memcpy(elements, &word, sizeof(word));
#pragma unroll
  for (int i = 0; i < kSize; ++i) out[i] = to_float(elements[i]);
}

// As floats, moved by one access.
template <typename T, int kSize>
__device__ __forceinline__ void load_floats(const T* p, float (&out)[kSize]) {
  const Word<T, kSize> word = *reinterpret_cast<const Word<T, kSize>*>(p);  // one access, not many
  unpack<T, kSize>(word, out);
}

// Rounds and stores kSize elements by one instruction; pairs of halves are rounded and packed by
// one.
template <typename T, int kSize>
__device__ __forceinline__ void store_floats(T* p, const float (&in)[kSize]) {
  Word<T, kSize> word;
  if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {
    uint32_t pairs[kSize / 2];
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(in[2 * i], in[2 * i + 1]);
        memcpy(&pairs[i], &pair, 4);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
        memcpy(&pairs[i], &pair, 4);
      }
    }
    memcpy(&word, pairs, sizeof(word));
  } else {
    T elements[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) elements[i] = from_float<T>(in[i]);
    memcpy(&word, elements, sizeof(word));
  }
  *reinterpret_cast<Word<T, kSize>*>(p) = word;
}

// Division of n < 2^31 by a divisor in [1, 2^31) fixed on the host: one high multiply, an add and a
// shift (Granlund and Montgomery 1994).
struct Divider {
  uint32_t divisor;
  uint32_t magic;
  uint32_t shift;

  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d), shift(0) {
    while ((uint64_t{1} << shift) < d) ++shift;
    magic = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }

  // n / divisor; `remainder` becomes n % divisor.
  __device__ __forceinline__ uint32_t divide(uint32_t n, uint32_t& remainder) const {
    const uint32_t quotient = (__umulhi(n, magic) + n) >> shift;
    remainder = n - quotient * divisor;
    return quotient;
  }
};

// Launch bounds of kernels of which the compiler, for Blackwell, would spill registers so that one
// more thread block fits a multiprocessor.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define BOUNDS_WITHOUT_SPILLS(threads) __launch_bounds__(threads, 1)
#else
#define BOUNDS_WITHOUT_SPILLS(threads) __launch_bounds__(threads)
#endif

// Kernels follow each other closely: with launch_kernel one may start before the kernel before it
// in the stream has finished (Hopper's programmatic dependent launch). So every kernel calls
// wait_for_input before it touches device memory: then the kernel before has finished, and what it
// wrote is there. After that it calls start_next: once all its thread blocks did, the next kernel
// may start, up to its own wait_for_input.
__device__ __forceinline__ void wait_for_input() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void start_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The same pointer or index. What is read there is read after a wait_for_input before it, even by
// load_word, whose reads the compiler takes for reads of constants.
template <typename T>
__device__ __forceinline__ T after_wait(T x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
#endif
  return x;
}

// Adds a launch of `kernel` to the queue. `family` is what reports call it.
template <typename... Params, typename... Args>
cudaError_t launch_kernel(const char* family, void (*kernel)(Params...), dim3 grid, dim3 block,
                          size_t shared_bytes, LaunchQueue& queue, const Args&... args) {
  static_assert(sizeof...(Params) <= Launch::kMostArguments);
  static_assert(((sizeof(Params) + 16) + ...) <= Launch::kMostBytes);
  static_assert((pointers_in<Params>().size() + ...) <= Launch::kMostPointers);
  const Device& device = queue.device();
  Launch launch;
  launch.family = family;
  launch.kernel = reinterpret_cast<const void*>(kernel);
  launch.grid = grid;
  launch.block = block;
  launch.early = device.is_hopper_or_newer();
  // No more thread blocks than multiprocessors: one for each. A kernel that starts while the one
  // before it still fills most of them would otherwise crowd into those that are free.
  if (launch.early && int64_t(grid.x) * grid.y * grid.z <= device.multiprocessors) {
    shared_bytes = std::max(shared_bytes, size_t(device.shared_per_multiprocessor / 2));
  }
  launch.shared_bytes = shared_bytes;
  (launch.add<Params>(args), ...);
  return queue.add(launch);
}

// Work items that one launch may have, so that item indices stay below 2^31 (see Divider).
constexpr int64_t kMaxItems = INT32_MAX;

// Splits a batch into launches of at most kMaxItems work items and calls
// launch(first_image, images) for each; stops at the first error.
template <typename F>
cudaError_t for_each_chunk(int64_t batch, int64_t items_per_image, F&& launch) {
  if (batch <= 0 || items_per_image <= 0) return cudaSuccess;
  if (items_per_image > kMaxItems) return cudaErrorInvalidValue;
  const int64_t most = kMaxItems / items_per_image;
  for (int64_t first = 0; first < batch; first += most) {
    const int64_t images = batch - first < most ? batch - first : most;
    if (const cudaError_t error = launch(first, images); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename T>
constexpr DType dtype_of = DType::kFloat32;
template <>
constexpr DType dtype_of<__half> = DType::kFloat16;
template <>
constexpr DType dtype_of<__nv_bfloat16> = DType::kBFloat16;

// Calls f(T{}) with the element type of `dtype`.
template <typename F>
cudaError_t dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(__half{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace torch_mbv2

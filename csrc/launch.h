// A kernel launch as data, and where launches go: at once to a stream, or into a list that runs
// later, with other pointers. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "plan/device.h"

namespace torch_mbv2 {

// Where in an argument of a kernel the pointers to device memory lie, in bytes. A struct that
// kernels take says so by a member function pointers(); one that forgets to does not compile.
template <typename T>
constexpr auto pointers_in() {
  if constexpr (std::is_pointer_v<T>) {
    return std::array<size_t, 1>{0};
  } else if constexpr (std::is_arithmetic_v<T>) {
    return std::array<size_t, 0>{};
  } else {
    return T::pointers();
  }
}

// What cudaLaunchKernelExC takes, the arguments by value.
struct Launch {
  static constexpr int kMostBytes = 768, kMostArguments = 6, kMostPointers = 12;

  const char* family;  // what reports call the kernel
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;   // dynamic
  unsigned cluster = 1;  // thread blocks of a cluster
  bool early = false;    // may start before the kernel before it in the stream has finished
  double clocks = 0;     // that it is expected to take on its device; 0: nothing is known

  int arguments = 0, pointers = 0;
  int bytes = 0;
  uint16_t argument_at[kMostArguments], argument_bytes[kMostArguments];
  uint16_t pointer_at[kMostPointers];
  alignas(16) unsigned char data[kMostBytes];

  template <typename T>
  void add(const T& argument) {
    static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= 16);
    static_assert(sizeof(T) <= kMostBytes);
    const int at = int((size_t(bytes) + alignof(T) - 1) / alignof(T) * alignof(T));
    for (const size_t pointer : pointers_in<T>()) {
      pointer_at[pointers++] = uint16_t(at + pointer);
    }
    argument_at[arguments] = uint16_t(at);
    argument_bytes[arguments++] = uint16_t(sizeof(T));
    std::memcpy(data + at, &argument, sizeof(T));
    bytes = at + int(sizeof(T));
  }
};

// Launches with `data`, launch.bytes of arguments, in the place of the launch's own.
cudaError_t launch_with(const Launch& launch, unsigned char* data, cudaStream_t stream);

// Lets the kernel be launched with as much dynamic shared memory as the current device has, if it
// needs more than it would get otherwise.
cudaError_t allow_shared_memory(const Launch& launch);

// Asked of the driver once for each device.
Device current_device();

// What the launchers of kernels.h add launches to.
class LaunchQueue {
 public:
  explicit LaunchQueue(const Device& device) : device_(device) {}
  virtual ~LaunchQueue() = default;
  virtual cudaError_t add(Launch& launch) = 0;
  // The device that the launches are for.
  const Device& device() const { return device_; }

 private:
  Device device_;
};

// Launches at once, on a stream of the current device.
class StreamQueue : public LaunchQueue {
 public:
  explicit StreamQueue(cudaStream_t stream) : LaunchQueue(current_device()), stream_(stream) {}
  cudaError_t add(Launch& launch) override;

 private:
  cudaStream_t stream_;
};

// Hands launches on to another queue as those of one family: for a kernel that is made of others.
class FamilyQueue : public LaunchQueue {
 public:
  FamilyQueue(const char* family, LaunchQueue& queue)
      : LaunchQueue(queue.device()), family_(family), queue_(queue) {}
  cudaError_t add(Launch& launch) override {
    launch.family = family_;
    return queue_.add(launch);
  }

 private:
  const char* family_;
  LaunchQueue& queue_;
};

}  // namespace torch_mbv2

// Tensors as values, and the context of an op that runs at once on them.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <utility>

#include "bind/context.h"

namespace torch_mbv2::bind {

using torch::stable::Tensor;

inline Value value_of(const Tensor& x, int handle = -1) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int device = x.is_cuda() ? int(x.get_device_index()) : x.is_cpu() ? kCpu : kAnotherDevice;
  return {x.scalar_type(),
          device,
          Ints(sizes.begin(), sizes.end()),
          Ints(strides.begin(), strides.end()),
          x.data_ptr(),
          handle};
}

inline Tensor empty_tensor(int device, ScalarType type, const Ints& sizes, Layout layout) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(
      sizes, type, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CUDA, device),
      std::nullopt,
      layout == Layout::kChannelsLast ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Runs at once, on the current stream of the device of the first tensor that it is handed.
class TensorContext : public Context {
 public:
  Value add(Tensor x) {
    const Value value = value_of(x, int(tensors_.size()));
    tensors_.push_back(std::move(x));
    if (tensors_.size() == 1) device_ = value.device;
    return value;
  }
  Tensor tensor(const Value& x) const { return *tensors_[size_t(x.handle)]; }

  Value empty(ScalarType type, const Ints& sizes, Layout layout) override {
    enter();
    return add(empty_tensor(device_, type, sizes, layout));
  }
  Value copy(const Value& x, ScalarType type, Layout layout) override {
    const Value made = empty(type, x.sizes, layout);
    Tensor to = tensor(made);
    torch::stable::copy_(to, tensor(x));
    return made;
  }
  void release(const Value& x) override { tensors_[size_t(x.handle)].reset(); }
  LaunchQueue& queue() override {
    enter();
    if (!queue_) queue_.emplace(current_stream(device_));
    return *queue_;
  }

 private:
  // Not before an op has checked its arguments, of which the first may be on another device.
  void enter() {
    if (!guard_) guard_.emplace(device_);
  }

  int device_ = kAnotherDevice;
  std::vector<std::optional<Tensor>> tensors_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  std::optional<StreamQueue> queue_;
};

}  // namespace torch_mbv2::bind

// Where an op runs: who makes its memory and takes its launches. The same op runs at once on
// tensors (tensors.h), is recorded as a part of a network, or tells what it would do
// (network_plan.cpp).
#pragma once

#include "bind/checks.h"
#include "kernels.h"

namespace torch_mbv2::bind {

class Context {
 public:
  virtual ~Context() = default;

  // Uninitialised memory on the device that the op runs on.
  virtual Value empty(ScalarType type, const Ints& sizes, Layout layout) = 0;
  // A copy of x, dense in a layout.
  virtual Value copy(const Value& x, ScalarType type, Layout layout) = 0;
  // What lies in x is not needed any more, by launches after those that were added.
  virtual void release(const Value& x) {}
  // Takes launches for the device that the op runs on.
  virtual LaunchQueue& queue() = 0;
  // Says why something other than the op's own kernel runs.
  virtual void note(const std::string& reason) {}

  // x itself if it is dense in the layout, else a copy.
  Value dense(const Value& x, Layout layout) {
    return x.numel() == 0 || is_dense(x, layout) ? x : copy(x, x.type, layout);
  }
  std::optional<Value> dense(const std::optional<Value>& x) {
    return x ? std::optional(dense(*x, Layout::kContiguous)) : x;
  }
  Value workspace(int64_t bytes) { return empty(ScalarType::Byte, {bytes}, Layout::kContiguous); }
};

inline const void* pointer(const std::optional<Value>& x) { return x ? x->data : nullptr; }

inline void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next check of somebody else would report it again
  fail(op, "CUDA error: ", cudaGetErrorString(error));
}

}  // namespace torch_mbv2::bind

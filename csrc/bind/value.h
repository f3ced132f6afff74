// A tensor as ops see it: sizes, strides, element type and an address, whether a torch::stable
// Tensor is behind it or a piece of a network's memory that has no address yet.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string_view>
#include <vector>

#include "plan/types.h"

namespace torch_mbv2::bind {

using torch::headeronly::ScalarType;
using Ints = std::vector<int64_t>;
// A bound of an activation; none is open.
using Bound = std::optional<double>;

enum class Layout { kContiguous, kChannelsLast };

// Devices that are no CUDA device.
constexpr int kCpu = -1, kAnotherDevice = -2;

struct Value {
  ScalarType type;
  int device;  // index of the CUDA device, or one of the above
  Ints sizes, strides;
  void* data;
  int handle;  // of the context that made it

  int64_t dim() const { return int64_t(sizes.size()); }
  int64_t size(int64_t i) const { return sizes[size_t(i)]; }
  int64_t stride(int64_t i) const { return strides[size_t(i)]; }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    return count;
  }
};

// The strides of a fresh tensor.
inline Ints strides_of(const Ints& sizes, Layout layout) {
  Ints strides(sizes.size());
  const auto fill = [&](std::initializer_list<int> order) {
    int64_t step = 1;
    for (const int dim : order) {
      strides[size_t(dim)] = step;
      step *= std::max<int64_t>(sizes[size_t(dim)], 1);
    }
  };
  if (layout == Layout::kChannelsLast) {
    fill({1, 3, 2, 0});
    return strides;
  }
  int64_t step = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = step;
    step *= std::max<int64_t>(sizes[dim], 1);
  }
  return strides;
}

// Whether the elements lie in the order of a layout without gaps. The strides of dimensions of size
// 1 do not matter.
inline bool is_dense(const Value& x, Layout layout) {
  const Ints expected = strides_of(x.sizes, layout);
  for (size_t i = 0; i < expected.size(); ++i) {
    if (x.sizes[i] != 1 && x.strides[i] != expected[i]) return false;
  }
  return true;
}

// By the name that programs have for it.
inline std::optional<ScalarType> type_called(std::string_view name) {
  if (name == "float32") return ScalarType::Float;
  if (name == "float16") return ScalarType::Half;
  if (name == "bfloat16") return ScalarType::BFloat16;
  return std::nullopt;
}

inline DType dtype_of(const Value& x) {
  switch (x.type) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

inline int element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      return 1;  // bytes of workspaces and packed weights
  }
}

}  // namespace torch_mbv2::bind

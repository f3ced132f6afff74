// Types that problems, plans and kernels share. Host only, no CUDA needed.
#pragma once

#include <compare>

namespace torch_mbv2 {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

constexpr int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Output activation: min(max(x, lo), hi) with NaN passed through; -inf and +inf mean unbounded.
struct Clamp {
  float lo;
  float hi;
};

// What is applied to every element of a layer's output. Only clamps are compiled.
struct Activation {
  enum Kind : int { kClamp, kHardSwish, kSiLU, kSigmoid };
  Kind kind = kClamp;
  float lo, hi;  // a clamp's bounds, as in Clamp; of no meaning otherwise

  auto operator<=>(const Activation&) const = default;
};

constexpr const char* name_of(Activation::Kind kind) {
  switch (kind) {
    case Activation::kClamp:
      return "a clamp";
    case Activation::kHardSwish:
      return "hard-swish";
    case Activation::kSiLU:
      return "SiLU";
    case Activation::kSigmoid:
      return "sigmoid";
  }
  return "";
}

}  // namespace torch_mbv2

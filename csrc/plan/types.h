// Types, and a little arithmetic, that problems, plans and kernels share. No CUDA needed.
#pragma once

#include <compare>
#include <cstdint>
#include <type_traits>

namespace torch_mbv2 {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

// a / b, rounded up; neither is negative. On the host right up to the largest `a`, as the sum is
// unsigned there; kernels divide smaller ones, for which the signed sum takes fewer registers.
template <typename A, typename B>
constexpr std::common_type_t<A, B> ceil_div(A a, B b) {
  using Result = std::common_type_t<A, B>;
#ifdef __CUDA_ARCH__
  return (a + b - 1) / b;
#else
  using Unsigned = std::make_unsigned_t<Result>;
  return Result((Unsigned(a) + Unsigned(b) - 1) / Unsigned(b));
#endif
}

inline bool is_aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

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

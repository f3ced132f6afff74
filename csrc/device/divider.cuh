// Division by a divisor that the host knows.
#pragma once

#include <cstdint>

namespace torch_mbv2 {

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

}  // namespace torch_mbv2

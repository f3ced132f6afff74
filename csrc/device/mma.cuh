// Tensor-core instructions for 16-bit elements (PTX ISA: mma, ldmatrix).
//
// With g = lane / 4 and q = lane % 4, a lane holds of the 16x8 matrix c in c[0..1] row g, columns
// 2q and 2q + 1, and in c[2..3] the same of row g + 8.
#pragma once

#include "device/element.cuh"

namespace torch_mbv2 {

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// Two of them; lanes 0 to 15 give the addresses.
__device__ __forceinline__ void load_two_matrices(uint32_t& r0, uint32_t& r1, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r0), "=r"(r1)
               : "r"(address));
}

// The instructions of an element type.
template <typename T>
struct Mma;

#define TORCH_MBV2_MMA(TYPE, PTX)                                                                  \
  template <>                                                                                      \
  struct Mma<TYPE> {                                                                               \
    __device__ __forceinline__ static void k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, \
                                               uint32_t b1) {                                      \
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." PTX "." PTX                            \
                   ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"          \
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                \
    }                                                                                              \
    __device__ __forceinline__ static void k8(float (&c)[4], uint32_t a0, uint32_t a1,             \
                                              uint32_t b) {                                        \
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." PTX "." PTX                             \
                   ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                      \
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                \
                   : "r"(a0), "r"(a1), "r"(b));                                                    \
    }                                                                                              \
    __device__ __forceinline__ static void k8_from_zero(float (&c)[4], uint32_t a0, uint32_t a1,   \
                                                        uint32_t b) {                              \
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." PTX "." PTX                             \
                   ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"                      \
                   : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])                                \
                   : "r"(a0), "r"(a1), "r"(b), "f"(0.0f));                                         \
    }                                                                                              \
  };
TORCH_MBV2_MMA(__half, "f16")
TORCH_MBV2_MMA(__nv_bfloat16, "bf16")
#undef TORCH_MBV2_MMA

// c (16x8, float) += a (16x16) * b (16x8).
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  Mma<T>::k16(c, a, b0, b1);
}

// c (16x8) += a (16x8) * b (8x8); the fragments are the lower halves of mma's.
template <typename T>
__device__ __forceinline__ void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  Mma<T>::k8(c, a0, a1, b);
}

// c = bias, as a product: 8 of k of which the first two are 1 in every row (`ones`), times the
// rounded biases and what rounding lost of them.
template <typename T>
__device__ __forceinline__ void mma_bias(float (&c)[4], const uint32_t (&ones)[2], uint32_t bias) {
  Mma<T>::k8_from_zero(c, ones[0], ones[1], bias);
}

}  // namespace torch_mbv2

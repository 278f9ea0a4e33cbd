// Matrix products of a warp (mma.sync, sm_80 and later), by the fragment layouts of the PTX ISA. In
// words of 32 bits both kinds look alike: with g = lane / 4 and t = lane % 4 a thread has of A
// words (g, t), (g+8, t), (g, t+4), (g+8, t+4), of B, whose columns lie in memory as rows, (g, t),
// (g, t+4), and of the sums (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). Included by .cu files only;
// tests/cuda_emulation/cuda/mma.h stands in for it on the host.
#pragma once

#include <stdint.h>

namespace fastcontrast {
namespace cuda {

// c += A B of 16 × 16 and 16 × 8 bfloat16 numbers, two to a word.
static __device__ __forceinline__ void multiply_bf16(float (&c)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += A B of 16 × 8 and 8 × 8 floats, of whose mantissas 10 bits are read.
static __device__ __forceinline__ void multiply_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 × 8 matrices of 16-bit numbers, transposed: lane 8 m + i gives the address of row i of
// matrix m, in shared memory and on 16 bytes; word m is (2t, g), (2t+1, g) of matrix m.
static __device__ __forceinline__ void load_transposed(uint32_t (&words)[4], const void* row) {
  const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

}  // namespace cuda
}  // namespace fastcontrast

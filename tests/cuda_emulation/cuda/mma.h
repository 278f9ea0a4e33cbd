// Stands in for csrc/cuda/mma.h: this folder comes first on the include path. The lanes of a warp
// exchange their fragments, and each computes its own four sums, in float and in the order of k.
#pragma once

#include <cuda_runtime.h>

namespace fastcontrast {
namespace cuda {

// A as [16][8] words and B as [8][8], column by column, from what the lanes hold.
struct Fragments {
  uint32_t a[16][8], b[8][8];

  Fragments(const uint32_t (&own_a)[4], const uint32_t (&own_b)[2]) {
    const auto pair = [](uint32_t low, uint32_t high) { return (uint64_t)high << 32 | low; };
    const uint64_t* found = cuda_emulation::exchange(~0u, pair(own_a[0], own_a[1]));
    for (unsigned lane = 0; lane < 32; ++lane) {
      a[lane / 4][lane % 4] = (uint32_t)found[lane];
      a[lane / 4 + 8][lane % 4] = (uint32_t)(found[lane] >> 32);
    }
    found = cuda_emulation::exchange(~0u, pair(own_a[2], own_a[3]));
    for (unsigned lane = 0; lane < 32; ++lane) {
      a[lane / 4][lane % 4 + 4] = (uint32_t)found[lane];
      a[lane / 4 + 8][lane % 4 + 4] = (uint32_t)(found[lane] >> 32);
    }
    found = cuda_emulation::exchange(~0u, pair(own_b[0], own_b[1]));
    for (unsigned lane = 0; lane < 32; ++lane) {
      b[lane / 4][lane % 4] = (uint32_t)found[lane];
      b[lane / 4][lane % 4 + 4] = (uint32_t)(found[lane] >> 32);
    }
  }
};

inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename Multiply>
void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        const Multiply& multiply) {
  const Fragments all(a, b);
  const unsigned g = cuda_emulation::lane() / 4, t = cuda_emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    for (int word = 0; word < 8; ++word) {
      c[i] = multiply(c[i], all.a[g + i / 2 * 8][word], all.b[2 * t + i % 2][word]);
    }
  }
}

inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_fragments(c, a, b, [](float sum, uint32_t u, uint32_t v) {
    sum += float_of_bits(u << 16) * float_of_bits(v << 16);
    return sum + float_of_bits(u & 0xFFFF0000u) * float_of_bits(v & 0xFFFF0000u);
  });
}

inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_fragments(c, a, b, [](float sum, uint32_t u, uint32_t v) {
    return sum + float_of_bits(u & 0xFFFFE000u) * float_of_bits(v & 0xFFFFE000u);
  });
}

inline void load_transposed(uint32_t (&words)[4], const void* row) {
  cuda_emulation::check_aligned(row, 16);
  const uint64_t* rows = cuda_emulation::exchange(~0u, (uint64_t)(uintptr_t)row);
  const unsigned g = cuda_emulation::lane() / 4, t = cuda_emulation::lane() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto* low = (const uint16_t*)(uintptr_t)rows[8 * matrix + 2 * t];
    const auto* high = (const uint16_t*)(uintptr_t)rows[8 * matrix + 2 * t + 1];
    words[matrix] = (uint32_t)high[g] << 16 | low[g];
  }
}

}  // namespace cuda
}  // namespace fastcontrast

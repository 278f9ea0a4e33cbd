// Tiles of rounded points for the matrix units: from global to shared memory, and the products of
// two tiles, by warp. Shared by the kernels of distance_softmax_tensor.cu. Included by .cu files
// only.
#pragma once

#include <stdint.h>

#include "common/scalar.h"
#include "cuda/async_copy.h"
#include "cuda/distance_softmax.h"
#include "cuda/launch.h"
#include "cuda/mma.h"

namespace fastcontrast {
namespace cuda {

constexpr int TENSOR_THREADS = 128;
constexpr int WARP_ROWS = 16;                                     // owners of a warp
constexpr int TENSOR_OWNERS = WARP_ROWS * TENSOR_THREADS / WARP;  // of a block

// How points meet the matrix units, one struct for each: bytes of a point that are in shared memory
// at a time (and words to the next point, chosen for the banks), points of the other side in a
// tile.
template <Operand>
struct Unit;
template <>
struct Unit<Operand::bf16> {
  using Element = BFloat16;
  static constexpr int TERMS_OF_POINT = 1, BYTES = 128, STRIDE = 36, OTHERS = 64;
};
template <>
struct Unit<Operand::tf32> {
  using Element = float;
  static constexpr int TERMS_OF_POINT = 1, BYTES = 128, STRIDE = 36, OTHERS = 64;
};
template <>
struct Unit<Operand::bf16x3> {
  using Element = BFloat16;
  static constexpr int TERMS_OF_POINT = 2, BYTES = 64, STRIDE = 20, OTHERS = 32;
};

template <Operand kind>
struct Shape : Unit<kind> {
  using U = Unit<kind>;
  static constexpr int CHUNK = U::BYTES / sizeof(typename U::Element);  // coordinates of a stage
  static constexpr int WORDS = U::BYTES / 4;
  static constexpr int TILES = U::OTHERS / 8;                     // of 16 × 8 scores
  static constexpr int DEPTH = 32 / sizeof(typename U::Element);  // coordinates of one product
  static constexpr int GRAD_TILES = CHUNK / 8;                    // of 16 × 8 gradients of a chunk
  static constexpr int PARTS = 128 / CHUNK;  // chunks whose gradient a block holds
};

template <Operand kind>
struct TensorStages {
  uint32_t own[2][Unit<kind>::TERMS_OF_POINT][TENSOR_OWNERS * Unit<kind>::STRIDE];
  uint32_t other[2][Unit<kind>::TERMS_OF_POINT][Unit<kind>::OTHERS * Unit<kind>::STRIDE];
};

// Starts to copy one chunk of COUNT points, whose rows are whole chunks; 0 beyond the last point.
template <Operand kind, int COUNT>
__device__ __forceinline__ void fetch_rounded(const void* values, int64_t count, int64_t width,
                                              int64_t first, int64_t chunk, uint32_t* to) {
  using S = Shape<kind>;
  constexpr int UNITS = S::BYTES / 16;
  constexpr int64_t SIZE = sizeof(typename S::Element);
  for (int u = threadIdx.x; u < COUNT * UNITS; u += TENSOR_THREADS) {
    const int point = u / UNITS, unit = u % UNITS;
    const bool inside = first + point < count;
    const char* from = (const char*)values;
    if (inside) from += (first + point) * width * SIZE + chunk * S::BYTES + unit * 16;
    async_copy<16>(to + point * S::STRIDE + unit * 4, from, inside ? 16 : 0);
  }
}

template <Operand kind>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  if constexpr (kind == Operand::tf32) {
    multiply_tf32(c, a, b);
  } else {
    multiply_bf16(c, a, b);
  }
}

// Adds the products of a chunk's first `depths` groups of DEPTH coordinates to the sums of a warp.
// Of two terms all four products where norms are subtracted (`all`), the small ones first: sums
// and norms then belong to the same rounded points.
template <Operand kind>
__device__ __forceinline__ void add_products(
    const uint32_t (&own)[Unit<kind>::TERMS_OF_POINT][TENSOR_OWNERS * Unit<kind>::STRIDE],
    const uint32_t (&other)[Unit<kind>::TERMS_OF_POINT][Unit<kind>::OTHERS * Unit<kind>::STRIDE],
    int depths, bool all, float (&sum)[Shape<kind>::TILES][4]) {
  using S = Shape<kind>;
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const int own_at = (threadIdx.x / WARP * WARP_ROWS + g) * S::STRIDE + t;
  for (int depth = 0; depth < depths; ++depth) {
    uint32_t a[S::TERMS_OF_POINT][4];
#pragma unroll
    for (int term = 0; term < S::TERMS_OF_POINT; ++term) {
      const uint32_t* const from = own[term] + own_at + 8 * depth;
      a[term][0] = from[0], a[term][1] = from[8 * S::STRIDE];
      a[term][2] = from[4], a[term][3] = from[8 * S::STRIDE + 4];
    }
#pragma unroll
    for (int n = 0; n < S::TILES; ++n) {
      uint32_t b[S::TERMS_OF_POINT][2];
#pragma unroll
      for (int term = 0; term < S::TERMS_OF_POINT; ++term) {
        const uint32_t* const from = other[term] + (8 * n + g) * S::STRIDE + t + 8 * depth;
        b[term][0] = from[0], b[term][1] = from[4];
      }
      if constexpr (S::TERMS_OF_POINT == 2) {
        if (all) multiply<kind>(sum[n], a[1], b[1]);
        multiply<kind>(sum[n], a[0], b[1]);
        multiply<kind>(sum[n], a[1], b[0]);
      }
      multiply<kind>(sum[n], a[0], b[0]);
    }
  }
}

FC_INLINE uint32_t pack_bf16(float low, float high) {
  BFloat16 first, second;
  narrow(low, &first);
  narrow(high, &second);
  return (uint32_t)second.bits << 16 | first.bits;
}

// A float with 10 bits of mantissa, ties away from zero; what is not finite stays.
FC_INLINE float round_to_tf32(float x) {
  const uint32_t bits = bits_of_float(x);
  if ((bits & 0x7F800000u) == 0x7F800000u) return x;
  return float_from_bits((bits + 0x1000u) & 0xFFFFE000u);
}

FC_INLINE float round_to_bf16(float x) {
  BFloat16 rounded;
  narrow(x, &rounded);
  return widen(rounded);
}

template <Operand kind>
FC_INLINE float rounded_weight(float weight) {
  return kind == Operand::tf32 ? round_to_tf32(weight) : round_to_bf16(weight);
}

// Adds weights · other to the gradients of a chunk: `weights` are a warp's scores, rounded, in the
// layout of sums, which with the others' coordinates taken in the same order is that of operands.
template <Operand kind>
__device__ __forceinline__ void add_weighted(const float (&weights)[Shape<kind>::TILES][4],
                                             const uint32_t* other,
                                             float (&grad)[Shape<kind>::GRAD_TILES][4]) {
  using S = Shape<kind>;
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  if constexpr (kind == Operand::tf32) {
#pragma unroll
    for (int n = 0; n < S::TILES; ++n) {  // word t is other 2t, word t + 4 is other 2t + 1
      const uint32_t a[4] = {bits_of_float(weights[n][0]), bits_of_float(weights[n][2]),
                             bits_of_float(weights[n][1]), bits_of_float(weights[n][3])};
      const uint32_t* const from = other + (8 * n + 2 * t) * S::STRIDE + g;
#pragma unroll
      for (int d = 0; d < S::GRAD_TILES; ++d) {
        const uint32_t b[2] = {from[8 * d], from[S::STRIDE + 8 * d]};
        multiply_tf32(grad[d], a, b);
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < S::TILES; n += 2) {
      const uint32_t a[4] = {pack_bf16(weights[n][0], weights[n][1]),
                             pack_bf16(weights[n][2], weights[n][3]),
                             pack_bf16(weights[n + 1][0], weights[n + 1][1]),
                             pack_bf16(weights[n + 1][2], weights[n + 1][3])};
      const uint32_t* const from = other + (8 * n + lane % 16) * S::STRIDE + lane / 16 * 4;
#pragma unroll
      for (int d = 0; d < S::GRAD_TILES; d += 2) {
        uint32_t words[4];
        load_transposed(words, from + 4 * d);
        const uint32_t left[2] = {words[0], words[1]}, right[2] = {words[2], words[3]};
        multiply_bf16(grad[d], a, left);
        multiply_bf16(grad[d + 1], a, right);
      }
    }
  }
}

}  // namespace cuda
}  // namespace fastcontrast

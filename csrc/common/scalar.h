// The element types that tensors come in, and conversion to and from the type arithmetic is done
// in. 16-bit floats are handled as bits, without branches, so that loops over them vectorise on any
// instruction set; a GPU has instructions for them. Called by kernels of patches and triplets.
//
// Numerics: to fp16 and bf16 round to nearest, ties to even; NaN stays NaN. fp64 goes to 16 bits by
// way of fp32, as torch's own conversion does.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/macros.h"

namespace fastcontrast {

enum class Scalar { uint8 = 0, float16 = 1, bfloat16 = 2, float32 = 3, float64 = 4 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

FC_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
FC_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FC_INLINE float widen(uint8_t x) { return (float)x; }
FC_INLINE float widen(float x) { return x; }
FC_INLINE double widen(double x) { return x; }
FC_INLINE float widen(BFloat16 x) { return float_from_bits((uint32_t)x.bits << 16); }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800  // one instruction
FC_INLINE float widen(Half x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}
#else
FC_INLINE float widen(Half x) {
  const uint32_t magnitude = (uint32_t)(x.bits & 0x7FFFu) << 13;
  const uint32_t exponent = magnitude & (0x7C00u << 13);
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = normal + (112u << 23);  // inf and NaN
  // A denormal half is 2^-14·m: give it the leading one that it lacks, then take that off again.
  const uint32_t small =
      bits_of_float(float_from_bits(normal + (1u << 23)) - float_from_bits(113u << 23));
  const uint32_t bits = exponent == (0x7C00u << 13) ? special : exponent == 0 ? small : normal;
  return float_from_bits(bits | (uint32_t)(x.bits & 0x8000u) << 16);
}
#endif

FC_INLINE void narrow(float x, float* out) { *out = x; }
FC_INLINE void narrow(float x, double* out) { *out = x; }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
FC_INLINE void narrow(float x, BFloat16* out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
}
FC_INLINE void narrow(float x, Half* out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
}
#else
FC_INLINE void narrow(float x, BFloat16* out) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out->bits = (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
FC_INLINE void narrow(float x, Half* out) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  // Adding 0.5 puts a half's denormal grid at the end of the float's mantissa: the sum rounds.
  const uint32_t small = bits_of_float(float_from_bits(magnitude) + 0.5f) - (126u << 23);
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t rounded = magnitude >= (143u << 23)  ? special
                           : magnitude < (113u << 23) ? small
                                                      : normal;
  out->bits = (uint16_t)(rounded | (bits & 0x80000000u) >> 16);
}
#endif
// To bytes: to nearest, ties to even, clamped to 0..255; NaN is 0.
FC_INLINE void narrow(double x, uint8_t* out) {
  const double clamped = x >= 0.0 ? (x <= 255.0 ? x : 255.0) : 0.0;
  const double shifted = clamped + 4503599627370496.0;  // 2^52: the sum rounds
  *out = (uint8_t)(shifted - 4503599627370496.0);
}
FC_INLINE void narrow(float x, uint8_t* out) {
  const float clamped = x >= 0.0f ? (x <= 255.0f ? x : 255.0f) : 0.0f;
  const float shifted = clamped + 8388608.0f;  // 2^23
  *out = (uint8_t)(shifted - 8388608.0f);
}
FC_INLINE void narrow(double x, double* out) { *out = x; }
FC_INLINE void narrow(double x, float* out) { *out = (float)x; }
FC_INLINE void narrow(double x, BFloat16* out) { narrow((float)x, out); }
FC_INLINE void narrow(double x, Half* out) { narrow((float)x, out); }

// Type of arithmetic between two element types: double where either is, float otherwise.
template <typename A, typename B>
struct Arithmetic {
  using type = float;
};
template <typename A>
struct Arithmetic<A, double> {
  using type = double;
};
template <typename B>
struct Arithmetic<double, B> {
  using type = double;
};
template <>
struct Arithmetic<double, double> {
  using type = double;
};

}  // namespace fastcontrast

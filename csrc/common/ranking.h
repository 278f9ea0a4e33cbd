// Which of two columns is nearer, and how far a score from a matrix product can be off: what a
// search for the k nearest needs on CPU and GPU alike.
//
// A key is what the search minimises: d² or -x·y, with the sign turned for the farthest.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "common/macros.h"

namespace fastcontrast {

// Floats as integers in the same order, -0 just below 0, without NaN; its own inverse.
FC_INLINE int32_t ordered_bits(int32_t bits) { return bits ^ ((bits >> 31) & INT32_MAX); }
FC_INLINE int64_t ordered_bits(int64_t bits) { return bits ^ ((bits >> 63) & INT64_MAX); }
FC_INLINE int32_t to_ordered(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return ordered_bits(bits);
}
FC_INLINE int64_t to_ordered(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return ordered_bits(bits);
}
FC_INLINE float from_ordered(int32_t ordered) {
  const int32_t bits = ordered_bits(ordered);
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
FC_INLINE double from_ordered(int64_t ordered) {
  const int64_t bits = ordered_bits(ordered);
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// A number that a value rounded to x cannot lie below (above): one step down (up).
template <typename T>
FC_INLINE T step_down(T x) {
  return x == T(-INFINITY) ? x : from_ordered(to_ordered(x) - 1);
}
template <typename T>
FC_INLINE T step_up(T x) {
  return x == T(INFINITY) ? x : from_ordered(to_ordered(x) + 1);
}

// A key by matrix products differs from the key by direct difference by no more than
//   key_error(dim)·size + key_floor(dim),
// size = ‖x‖²+‖y‖² of the centred points for distances, ‖x‖·‖y‖ for products. With u = eps/2 and
// γ = dim·u/(1-dim·u) the bound on a sum of dim products in any order, the dot product and both
// squared norms are off by γ·size each, rounding the centred points adds 4u·size, and the last
// steps 5u·size. float: the direct key is taken in double. double: it is off by γ·d² <= 2γ·size
// itself. The floor covers what underflows.
// A key by direct difference in T has size = d² as computed: it is off by (γ + 3u)·d². Operands
// that were divided by their norms have size 1, and are off by 2u each.
FC_INLINE float key_error(float, double dim) {
  const double share = dim * FLT_EPSILON;
  return (float)((dim + 8.0) * FLT_EPSILON / (1.0 - (share < 0.5 ? share : 0.5)));
}
FC_INLINE double key_error(double, double dim) {
  const double share = dim * DBL_EPSILON;
  return 2.0 * (dim + 8.0) * DBL_EPSILON / (1.0 - (share < 0.5 ? share : 0.5));
}
FC_INLINE float key_floor(float, double dim) { return (float)(4.0 * (dim + 1.0)) * FLT_MIN; }
FC_INLINE double key_floor(double, double dim) { return 4.0 * (dim + 1.0) * DBL_MIN; }

// From a squared distance or a product to the key, and back.
FC_INLINE double turned(double value, bool product, bool farthest) {
  return product == farthest ? value : -value;
}
FC_INLINE double cosine_from_product(double product, double norms) {
  return norms == 0.0 ? 0.0 : product / norms;
}

// A column with the key of its direct difference, as ordered_bits; NaN is the largest.
struct Neighbor {
  int64_t key;
  int64_t column;
};
FC_INLINE Neighbor neighbor(double key, int64_t column) {
  return Neighbor{key == key ? to_ordered(key + 0.0) : INT64_MAX, column};  // -0 + 0 = 0
}
FC_INLINE double key_of(Neighbor neighbor) { return from_ordered(neighbor.key); }

// The order of the result: smaller key first, NaN last, of equal keys the lower column.
FC_INLINE bool comes_before(Neighbor a, Neighbor b) {
  return a.key < b.key || (a.key == b.key && a.column < b.column);
}

}  // namespace fastcontrast

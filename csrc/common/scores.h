// From a dot product to a score and from a score's gradient to a pair weight, for every metric.
//
// Scores are "higher is closer". They are kept in units of log2, t = s·log2(e), so that the softmax
// needs exp2 alone:
//   l2            s = -scale·‖x-y‖      ∂s/∂x = scale/‖x-y‖ · (y-x)
//   sqeuclidean   s = -scale·‖x-y‖²     ∂s/∂x = 2·scale · (y-x)
//   dot           s =  scale·x·y        ∂s/∂x =  scale · y
// (cosine is dot of normalised operands.)
#pragma once

#include <float.h>
#include <math.h>

#include "common/macros.h"

namespace fastcontrast {

enum class Metric { l2 = 0, sqeuclidean = 1, dot = 2 };

// Which columns count by their id: all, those with the row's, or the others.
enum class Keep { all = 0, same = 1, different = 2 };

constexpr double LOG2_E = 1.4426950408889634;
constexpr double LN_2 = 0.6931471805599453;

FC_INLINE float largest_finite(float) { return FLT_MAX; }
FC_INLINE double largest_finite(double) { return DBL_MAX; }
FC_INLINE float smallest_normal(float) { return FLT_MIN; }
FC_INLINE double smallest_normal(double) { return DBL_MIN; }
FC_INLINE float square_root(float x) { return sqrtf(x); }
FC_INLINE double square_root(double x) { return sqrt(x); }

// How far the operands of products are rounded; as fastcontrast/backends/native/products.py
// numbers them.
enum class Rounding { ieee = 0, bf16x3 = 1, bf16 = 2 };

// A squared distance by the Gram identity, ‖x‖²+‖y‖²-2x·y, is off by a few eps·(‖x‖²+‖y‖²). Pairs
// closer than near_fraction()·(‖x‖²+‖y‖²) are recomputed from the difference x-y, so that what
// stays has a relative error of at most about 1/1024 in d² (float) or 2^-26 (double, where being
// exact matters more than speed), half of that in d.
// Two bfloat16 terms leave out the product of the low ones, at most 2^-16 |x_k y_k| for each k and
// of random sign: 32 times the error of float, and so is the limit. One term moves every
// point by up to 2^-8 of its coordinates, typically 2^-9 ‖x‖; at the same limit of d = ‖x‖/11 that
// is 1/32 of d, against the whole of d at the limit of float.
FC_INLINE float near_fraction(float, Rounding rounding) {
  return (rounding == Rounding::ieee ? 1024.0f : 32768.0f) * FLT_EPSILON;
}
FC_INLINE double near_fraction(double, Rounding) { return 67108864.0 * DBL_EPSILON; }

// d² from a dot product; negative rounding residue becomes 0, NaN stays NaN.
template <typename T>
FC_INLINE T squared_distance(T dot, T x_sqnorm, T y_sqnorm) {
  const T d2 = x_sqnorm + y_sqnorm - T(2) * dot;
  return d2 < T(0) ? T(0) : d2;
}

// t from d² (or from the dot product, for Metric::dot); scale2 = scale·log2(e).
template <Metric metric, typename T>
FC_INLINE T score_log2(T value, T scale2) {
  if (metric == Metric::l2) return -scale2 * square_root(value);
  if (metric == Metric::sqeuclidean) return -scale2 * value;
  return scale2 * value;
}

// d² back from t, to find near pairs after the scores were written over the dot products.
template <Metric metric, typename T>
FC_INLINE T squared_distance_from_score(T t, T scale2) {
  const T q = t / scale2;
  return metric == Metric::l2 ? q * q : -q;
}

// Weight c of a pair, given g = ∂L/∂s: for distances the pair adds c·(y-x) to ∂L/∂x and c·(x-y) to
// ∂L/∂y, for Metric::dot c·y and c·x. At coincident points the subgradient 0 is taken.
template <Metric metric, typename T>
FC_INLINE T pair_weight(T g, T t, T scale, T scale2) {
  if (metric == Metric::l2) return t == T(0) ? T(0) : -(scale * scale2) * g / t;  // scale·g/d
  if (metric == Metric::sqeuclidean) return T(2) * scale * g;
  return scale * g;
}

}  // namespace fastcontrast

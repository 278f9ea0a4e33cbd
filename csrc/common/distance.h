// From a sum of squared differences to a distance, and from a distance's gradient to the weight of
// the difference. Called by the kernels of `triplet_distances`.
//   l2            d = ‖x-y‖     ∂d/∂x = (x-y)/d
//   sqeuclidean   d = ‖x-y‖²    ∂d/∂x = 2(x-y)
#pragma once

#include "common/macros.h"
#include "common/scores.h"

namespace fastcontrast {

template <Metric metric, typename T>
FC_INLINE T distance_from_squares(T sum) {
  return metric == Metric::l2 ? square_root(sum) : sum;
}

// Weight w of a pair, given g = ∂L/∂d: the pair adds w·(x-y) to ∂L/∂x and w·(y-x) to ∂L/∂y. At
// coincident points the subgradient 0 is taken.
template <Metric metric, typename T>
FC_INLINE T difference_weight(T g, T d) {
  if (metric == Metric::sqeuclidean) return T(2) * g;
  return d == T(0) ? T(0) : g / d;
}

}  // namespace fastcontrast

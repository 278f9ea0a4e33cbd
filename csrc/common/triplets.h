// Arguments of the kernels of `triplet_distances` on every device, and the part of their maths that
// is done once per row. fastcontrast/backends/native/triplet_distances.py fills these in.
#pragma once

#include <stdint.h>

#include "common/macros.h"
#include "common/scalar.h"
#include "common/scores.h"

namespace fastcontrast {

// The three points of a triplet are numbered anchor 0, positive 1, negative 2; its pairs
// anchor-positive 0, anchor-negative 1, positive-negative 2.
struct Triplets {
  const void* points[3];  // [rows, dim], contiguous within a row
  int64_t stride[3];      // from row to row, in elements, any value
  Scalar type;            // of all points and their gradients
  int64_t rows;
  int64_t dim;
  Metric metric;  // l2 or sqeuclidean
  int threads;    // of a CPU call
};

// Everything per row, here and below, has the type of arithmetic: float, or double for double
// points.
struct TripletDistances {
  void* pairs[3];    // [rows] each; the last may be null
  void* difference;  // [rows], or null: anchor-positive minus anchor-negative, or minus the smaller
                     // of that and positive-negative where there is one
};

// Either the gradients of the pairs' distances, or of the difference: slope[i]·factor·upstream[i].
struct TripletGradients {
  const void* pairs[3];     // [rows] each, or null for 0
  const void* slope;        // [rows], or null: `pairs` count
  const void* upstream;     // [rows], or one number
  int64_t upstream_stride;  // 1, or 0 for one number
  double factor;
};

// d_ap - d_an, or minus the smaller of d_an and d_pn where there is one. NaN comes through.
template <typename T>
FC_INLINE T triplet_difference(const T* d, bool between) {
  const T nearest = between && (d[2] < d[1] || d[2] != d[2]) ? d[2] : d[1];
  return d[0] - nearest;
}

// Gradients of the distances of a row; a pair that has none keeps its 0 and is left out.
template <typename T>
FC_INLINE void gradients_of_row(const TripletGradients& from, const T* d, bool between, int64_t row,
                                T* gradient, bool* exists) {
  if (!from.slope) {
    for (int pair = 0; pair < 3; ++pair) {
      exists[pair] = from.pairs[pair];
      gradient[pair] = exists[pair] ? ((const T*)from.pairs[pair])[row] : T(0);
    }
    return;
  }
  const T upstream = ((const T*)from.upstream)[row * from.upstream_stride];
  const T g = ((const T*)from.slope)[row] * (upstream * (T)from.factor);
  // Where the two distances of the negative are equal, each takes half, as in torch.minimum.
  const T share = !between || d[1] < d[2] ? T(1) : d[1] == d[2] ? T(0.5) : T(0);
  gradient[0] = g;
  gradient[1] = -g * share;
  gradient[2] = -g * (T(1) - share);
  exists[0] = exists[1] = true;
  exists[2] = between;
}

}  // namespace fastcontrast

// Arguments of the CPU kernels of `triplet_distances`: distances between the points of each triplet
// and their gradients. fastcontrast/backends/native/triplet_distances.py fills these in.
#pragma once

#include <stdint.h>

#include "common/scalar.h"
#include "common/scores.h"
#include "cpu/isa.h"

namespace fastcontrast {
namespace cpu {

// The three points of a triplet are numbered anchor 0, positive 1, negative 2; its pairs
// anchor-positive 0, anchor-negative 1, positive-negative 2.
struct Triplets {
  const void* points[3];  // [rows, dim], contiguous within a row
  int64_t stride[3];      // from row to row, in elements, any value
  Scalar type;            // of all points and their gradients
  int64_t rows;
  int64_t dim;
  Metric metric;  // l2 or sqeuclidean
  int threads;
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

// Both return false for a type or a metric without a kernel.
FASTCONTRAST_DECLARE(bool triplet_distances_forward(const Triplets&, const TripletDistances&))
// `out`: gradients of the points [rows, dim] each, contiguous, null where not needed.
FASTCONTRAST_DECLARE(bool triplet_distances_backward(const Triplets&, const TripletDistances&,
                                                     const TripletGradients&, void* const* out))

}  // namespace cpu
}  // namespace fastcontrast

// The CPU kernels of `triplet_distances`: distances between the points of each triplet and their
// gradients. common/triplets.h has their arguments.
#pragma once

#include "common/triplets.h"
#include "cpu/isa.h"

namespace fastcontrast {
namespace cpu {

// Both return false for a type or a metric without a kernel.
FASTCONTRAST_DECLARE(bool triplet_distances_forward(const Triplets&, const TripletDistances&))
// `out`: gradients of the points [rows, dim] each, contiguous, null where not needed.
FASTCONTRAST_DECLARE(bool triplet_distances_backward(const Triplets&, const TripletDistances&,
                                                     const TripletGradients&, void* const* out))

}  // namespace cpu
}  // namespace fastcontrast

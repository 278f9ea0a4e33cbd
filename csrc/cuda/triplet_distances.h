// The CUDA kernels of `triplet_distances`; common/triplets.h has their arguments.
#pragma once

#include "common/triplets.h"
#include "cuda/stream.h"

namespace fastcontrast {
namespace cuda {

// Both return false for a type or a metric without a kernel.
bool triplet_distances_forward(const Triplets&, const TripletDistances&, Stream);
// `out`: gradients of the points [rows, dim] each, contiguous, null where not needed.
bool triplet_distances_backward(const Triplets&, const TripletDistances&, const TripletGradients&,
                                void* const* out, Stream);

}  // namespace cuda
}  // namespace fastcontrast

// From what Python passes to the structs that kernels take: shared by the bindings of the CPU's and
// of CUDA's kernels.
#pragma once

#include <array>
#include <cstdint>

#include "common/triplets.h"

namespace fastcontrast {

using Address = std::uintptr_t;  // 0 stands for "none"
using Addresses = std::array<Address, 3>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Not by keyword, as the others are: a call on few triplets takes less than its arguments then do.
inline Triplets triplets_from(const Addresses& points, const std::array<std::int64_t, 3>& strides,
                              int type, std::int64_t rows, std::int64_t dim, int metric,
                              int threads) {
  Triplets triplets;
  for (int i = 0; i < 3; ++i) {
    triplets.points[i] = at<const void>(points[i]);
    triplets.stride[i] = strides[i];
  }
  triplets.type = static_cast<Scalar>(type);
  triplets.rows = rows;
  triplets.dim = dim;
  triplets.metric = static_cast<Metric>(metric);
  triplets.threads = threads;
  return triplets;
}

inline TripletDistances triplet_distances_at(const Addresses& pairs, Address difference) {
  return {{at<void>(pairs[0]), at<void>(pairs[1]), at<void>(pairs[2])}, at<void>(difference)};
}

inline TripletGradients triplet_gradients_at(const Addresses& pairs, Address slope,
                                             Address upstream, std::int64_t upstream_stride,
                                             double factor) {
  TripletGradients from;
  for (int i = 0; i < 3; ++i) from.pairs[i] = at<const void>(pairs[i]);
  from.slope = at<const void>(slope);
  from.upstream = at<const void>(upstream);
  from.upstream_stride = upstream_stride;
  from.factor = factor;
  return from;
}

}  // namespace fastcontrast

// From what Python passes to the structs that kernels take: shared by the bindings of the CPU's and
// of CUDA's kernels.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "common/crop.h"
#include "common/triplets.h"

namespace fastcontrast {

using Address = std::uintptr_t;  // 0 stands for "none"
using Addresses = std::array<Address, 3>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline CropRule crop_rule_from(const pybind11::kwargs& a) {
  CropRule rule;
  using Pair = std::array<std::int32_t, 2>;
  const auto image = a["image_size"].cast<Pair>(), size = a["size"].cast<Pair>();
  const auto padding = a["padding"].cast<Pair>(), grid = a["grid"].cast<Pair>();
  rule.image_height = image[0], rule.image_width = image[1];
  rule.height = size[0], rule.width = size[1];
  rule.pad_y = padding[0], rule.pad_x = padding[1];
  rule.grid_rows = grid[0], rule.grid_columns = grid[1];
  const auto area = a["area"].cast<std::array<std::int64_t, 2>>();
  rule.area_low = area[0], rule.area_range = area[1];
  rule.row_factors = at<const std::int64_t>(a["row_factors"].cast<Address>());
  rule.column_factors = at<const std::int64_t>(a["column_factors"].cast<Address>());
  const auto limits = a["limits"].cast<std::array<std::int64_t, 3>>();
  for (int i = 0; i < 3; ++i) rule.limits[i] = limits[i];
  rule.min_distance = a["min_distance"].cast<std::int64_t>();
  rule.max_iou = a["max_iou"].cast<std::int64_t>();
  return rule;
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

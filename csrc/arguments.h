// From what Python passes to the structs that kernels take: shared by the bindings of the CPU's and
// of CUDA's kernels.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "common/patches.h"
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

inline CropDraws crop_draws_from(const pybind11::kwargs& a) {
  CropDraws draws;
  draws.seed = a["seed"].cast<std::uint64_t>();
  draws.step = a["step"].cast<std::uint64_t>();
  draws.key = at<const std::int64_t>(a["key"].cast<Address>());
  draws.sample_ids = at<const std::int64_t>(a["sample_ids"].cast<Address>());
  draws.batch = a["batch"].cast<std::int64_t>();
  draws.num_patches = a["num_patches"].cast<std::int64_t>();
  draws.first_patch = a["first_patch"].cast<std::uint32_t>();
  draws.rule = crop_rule_from(a);
  draws.hflip_threshold = a["hflip_threshold"].cast<std::uint64_t>();
  draws.vflip_threshold = a["vflip_threshold"].cast<std::uint64_t>();
  draws.coords = at<Box>(a["coords"].cast<Address>());
  draws.flips = at<std::uint8_t>(a["flips"].cast<Address>());
  draws.lost = at<std::int64_t>(a["lost"].cast<Address>());
  return draws;
}

// Numbers of the channels, which own what a set points to.
struct ChannelNumbers {
  std::vector<double> scale, offset, fill;
};

inline ChannelNumbers channel_numbers_from(const pybind11::kwargs& a) {
  using Numbers = std::vector<double>;
  return {a["scale"].cast<Numbers>(), a["offset"].cast<Numbers>(), a["fill"].cast<Numbers>()};
}

// Boxes, sizes and the channels' affine map; `threads` is the caller's.
inline PatchSet patch_set_from(const pybind11::kwargs& a, const ChannelNumbers& numbers) {
  PatchSet set;
  set.coords = at<const Box>(a["coords"].cast<Address>());
  set.flips = at<const std::uint8_t>(a["flips"].cast<Address>());
  set.batch = a["batch"].cast<std::int64_t>();
  set.num_patches = a["num_patches"].cast<std::int64_t>();
  set.channels = a["channels"].cast<std::int64_t>();
  set.image_height = a["image_height"].cast<std::int64_t>();
  set.image_width = a["image_width"].cast<std::int64_t>();
  set.height = a["height"].cast<std::int64_t>();
  set.width = a["width"].cast<std::int64_t>();
  set.scale = numbers.scale.empty() ? nullptr : numbers.scale.data();
  set.scale_count = static_cast<std::int64_t>(numbers.scale.size());
  set.offset = numbers.offset.empty() ? nullptr : numbers.offset.data();
  set.offset_count = static_cast<std::int64_t>(numbers.offset.size());
  set.fill = numbers.fill.empty() ? nullptr : numbers.fill.data();
  set.fill_count = static_cast<std::int64_t>(numbers.fill.size());
  set.interpolation = static_cast<Interpolation>(a["interpolation"].cast<int>());
  set.antialias = a["antialias"].cast<bool>();
  set.padding = static_cast<Padding>(a["padding_mode"].cast<int>());
  set.threads = 1;
  return set;
}

inline Images images_from(const pybind11::kwargs& a) {
  Images images;
  images.data = at<const void>(a["images"].cast<Address>());
  images.type = static_cast<Scalar>(a["image_type"].cast<int>());
  const auto strides = a["image_strides"].cast<std::array<std::int64_t, 4>>();
  for (int i = 0; i < 4; ++i) images.stride[i] = strides[i];
  images.index = at<const std::int64_t>(a["index"].cast<Address>());
  return images;
}

inline PatchOutput patch_output_from(const pybind11::kwargs& a) {
  PatchOutput out;
  out.data = at<void>(a["out"].cast<Address>());
  out.type = static_cast<Scalar>(a["out_type"].cast<int>());
  const auto strides = a["out_strides"].cast<std::array<std::int64_t, 3>>();
  for (int i = 0; i < 3; ++i) out.stride[i] = strides[i];
  return out;
}

inline PatchGradient patch_gradient_from(const pybind11::kwargs& a) {
  PatchGradient grad;
  grad.data = at<const void>(a["grad"].cast<Address>());
  grad.type = static_cast<Scalar>(a["grad_type"].cast<int>());
  const auto strides = a["grad_strides"].cast<std::array<std::int64_t, 5>>();
  for (int i = 0; i < 5; ++i) grad.stride[i] = strides[i];
  return grad;
}

inline ImageGradient image_gradient_from(const pybind11::kwargs& a) {
  ImageGradient images;
  images.data = at<void>(a["grad_images"].cast<Address>());
  images.type = static_cast<Scalar>(a["image_type"].cast<int>());
  images.count = a["images"].cast<std::int64_t>();
  images.order = at<const std::int64_t>(a["order"].cast<Address>());
  images.starts = at<const std::int64_t>(a["starts"].cast<Address>());
  return images;
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

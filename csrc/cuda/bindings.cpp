#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cuda/extract_patches.h"
#include "cuda/triplet_distances.h"

namespace py = pybind11;

namespace fastcontrast {
namespace cuda {
namespace {

using Where = std::pair<int, Address>;

Stream stream_at(const Where& where) { return {where.first, at<void>(where.second)}; }

void triplet_distances_forward_entry(const Addresses& points,
                                     const std::array<std::int64_t, 3>& strides, int type,
                                     std::int64_t rows, std::int64_t dim, int metric,
                                     const Where& where, const Addresses& distances,
                                     Address difference) {
  const Triplets triplets = triplets_from(points, strides, type, rows, dim, metric, 0);
  const TripletDistances out = triplet_distances_at(distances, difference);
  py::gil_scoped_release release;
  if (!triplet_distances_forward(triplets, out, stream_at(where))) {
    throw std::invalid_argument("no CUDA kernel for this dtype and metric of triplets");
  }
}

void triplet_distances_backward_entry(const Addresses& points,
                                      const std::array<std::int64_t, 3>& strides, int type,
                                      std::int64_t rows, std::int64_t dim, int metric,
                                      const Where& where, const Addresses& distances,
                                      const Addresses& gradients, Address slope, Address upstream,
                                      std::int64_t upstream_stride, double factor,
                                      const Addresses& out) {
  const Triplets triplets = triplets_from(points, strides, type, rows, dim, metric, 0);
  const TripletDistances values = triplet_distances_at(distances, 0);
  const TripletGradients from =
      triplet_gradients_at(gradients, slope, upstream, upstream_stride, factor);
  void* const results[3] = {at<void>(out[0]), at<void>(out[1]), at<void>(out[2])};
  py::gil_scoped_release release;
  if (!triplet_distances_backward(triplets, values, from, results, stream_at(where))) {
    throw std::invalid_argument("no CUDA kernel for this dtype and metric of triplets");
  }
}

// Boxes, sizes and the channels' affine map, from the keyword arguments that forward and backward
// of `extract_patches` share. `scale` and `offset` own what the set points to.
PatchSet patch_set_from(const py::kwargs& a, const std::vector<double>& scale,
                        const std::vector<double>& offset) {
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
  set.scale = scale.empty() ? nullptr : scale.data();
  set.scale_count = static_cast<std::int64_t>(scale.size());
  set.offset = offset.empty() ? nullptr : offset.data();
  set.offset_count = static_cast<std::int64_t>(offset.size());
  return set;
}

void extract_patches_forward_entry(const py::kwargs& a) {
  const auto scale = a["scale"].cast<std::vector<double>>();
  const auto offset = a["offset"].cast<std::vector<double>>();
  const PatchSet set = patch_set_from(a, scale, offset);
  Images images;
  images.data = at<const void>(a["images"].cast<Address>());
  images.type = static_cast<Scalar>(a["image_type"].cast<int>());
  const auto strides = a["image_strides"].cast<std::array<std::int64_t, 4>>();
  for (int i = 0; i < 4; ++i) images.stride[i] = strides[i];
  images.index = at<const std::int64_t>(a["index"].cast<Address>());
  PatchOutput out;
  out.data = at<void>(a["out"].cast<Address>());
  out.type = static_cast<Scalar>(a["out_type"].cast<int>());
  const auto out_strides = a["out_strides"].cast<std::array<std::int64_t, 3>>();
  for (int i = 0; i < 3; ++i) out.stride[i] = out_strides[i];
  const Stream stream = stream_at(a["workers"].cast<Where>());
  py::gil_scoped_release release;
  if (!extract_patches_forward(set, images, out, stream)) {
    throw std::invalid_argument("no CUDA kernel for these dtypes of images and output");
  }
}

void extract_patches_backward_entry(const py::kwargs& a) {
  const auto scale = a["scale"].cast<std::vector<double>>();
  const PatchSet set = patch_set_from(a, scale, {});
  PatchGradient grad;
  grad.data = at<const void>(a["grad"].cast<Address>());
  grad.type = static_cast<Scalar>(a["grad_type"].cast<int>());
  const auto strides = a["grad_strides"].cast<std::array<std::int64_t, 5>>();
  for (int i = 0; i < 5; ++i) grad.stride[i] = strides[i];
  ImageGradient images;
  images.data = at<void>(a["grad_images"].cast<Address>());
  images.type = static_cast<Scalar>(a["image_type"].cast<int>());
  images.count = a["images"].cast<std::int64_t>();
  images.order = at<const std::int64_t>(a["order"].cast<Address>());
  images.starts = at<const std::int64_t>(a["starts"].cast<Address>());
  const Stream stream = stream_at(a["workers"].cast<Where>());
  py::gil_scoped_release release;
  if (!extract_patches_backward(set, grad, images, stream)) {
    throw std::invalid_argument("no CUDA kernel for these dtypes of gradient and images");
  }
}

// -1: without a least distance every patch finds a place.
std::int64_t sample_coords_entry(const py::kwargs& a) {
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
  const Stream stream = stream_at(a["workers"].cast<Where>());
  py::gil_scoped_release release;
  sample_coords(draws, stream);
  return -1;
}

}  // namespace

void bind(py::module_& m) {
  m.def("extract_patches_forward", &extract_patches_forward_entry);
  m.def("extract_patches_backward", &extract_patches_backward_entry);
  m.def("sample_coords", &sample_coords_entry);
  m.def("triplet_distances_forward", &triplet_distances_forward_entry);
  m.def("triplet_distances_backward", &triplet_distances_backward_entry);
}

}  // namespace cuda
}  // namespace fastcontrast

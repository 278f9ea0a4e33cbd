#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <utility>

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

void extract_patches_forward_entry(const py::kwargs& a) {
  const ChannelNumbers numbers = channel_numbers_from(a);
  const PatchSet set = patch_set_from(a, numbers);
  const Images images = images_from(a);
  const PatchOutput out = patch_output_from(a);
  const Stream stream = stream_at(a["workers"].cast<Where>());
  py::gil_scoped_release release;
  if (!extract_patches_forward(set, images, out, stream)) {
    throw std::invalid_argument("no CUDA kernel for these dtypes of images and output");
  }
}

void extract_patches_backward_entry(const py::kwargs& a) {
  const ChannelNumbers numbers = channel_numbers_from(a);
  const PatchSet set = patch_set_from(a, numbers);
  const PatchGradient grad = patch_gradient_from(a);
  const ImageGradient images = image_gradient_from(a);
  void* const units = at<void>(a["units"].cast<Address>());
  const Stream stream = stream_at(a["workers"].cast<Where>());
  py::gil_scoped_release release;
  if (!extract_patches_backward(set, grad, images, units, stream)) {
    throw std::invalid_argument("no CUDA kernel for these dtypes of gradient and images");
  }
}

void random_patches_forward_entry(const py::kwargs& a) {
  const CropDraws draws = crop_draws_from(a);
  const ChannelNumbers numbers = channel_numbers_from(a);
  const PatchSet set = patch_set_from(a, numbers);
  const Images images = images_from(a);
  const PatchOutput out = patch_output_from(a);
  const Stream stream = stream_at(a["workers"].cast<Where>());
  py::gil_scoped_release release;
  if (!random_patches_forward(draws, set, images, out, stream)) {
    throw std::invalid_argument("no CUDA kernel for these dtypes of images and output");
  }
}

void sample_coords_entry(const py::kwargs& a) {
  const CropDraws draws = crop_draws_from(a);
  const Stream stream = stream_at(a["workers"].cast<Where>());
  py::gil_scoped_release release;
  sample_coords(draws, stream);
}

}  // namespace

void bind(py::module_& m) {
  bind_distance_softmax(m);
  m.def("extract_patches_forward", &extract_patches_forward_entry);
  m.def("extract_patches_backward", &extract_patches_backward_entry);
  m.def("random_patches_forward", &random_patches_forward_entry);
  m.def("sample_coords", &sample_coords_entry);
  m.def("triplet_distances_forward", &triplet_distances_forward_entry);
  m.def("triplet_distances_backward", &triplet_distances_backward_entry);
  bind_nearest(m);
}

}  // namespace cuda
}  // namespace fastcontrast

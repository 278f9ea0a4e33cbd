// pybind11 module fastcontrast._C: one function per kernel entry, and what the module knows of
// itself. Tensors arrive as addresses; fastcontrast/backends/native/ has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "bf16_bindings.h"
#include "cpu/distance_softmax.h"
#include "cpu/extract_patches.h"
#include "cpu/isa.h"
#include "cpu/nearest.h"
#include "cpu/triplet_distances.h"
#if defined(FASTCONTRAST_HAVE_CUDA)
#include "cuda/bindings.h"
#include "cuda/device.h"
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace py = pybind11;
namespace cpu = fastcontrast::cpu;

namespace {

using fastcontrast::Address;
using fastcontrast::Addresses;
using fastcontrast::at;
using fastcontrast::channel_numbers_from;
using fastcontrast::ChannelNumbers;
using fastcontrast::crop_draws_from;
using fastcontrast::image_gradient_from;
using fastcontrast::images_from;
using fastcontrast::patch_gradient_from;
using fastcontrast::patch_output_from;
using fastcontrast::patch_set_from;
using fastcontrast::triplet_distances_at;
using fastcontrast::triplet_gradients_at;
using fastcontrast::triplets_from;

// The tile of a call, from the keyword arguments that forward and backward share.
template <typename T>
cpu::Tile<T> tile_from(const py::kwargs& a) {
  cpu::Tile<T> tile;
  tile.values = at<T>(a["values"].cast<Address>());
  tile.rows = a["rows"].cast<std::int64_t>();
  tile.columns = a["columns"].cast<std::int64_t>();
  tile.first_column = a["first_column"].cast<std::int64_t>();
  tile.metric = static_cast<fastcontrast::Metric>(a["metric"].cast<int>());
  tile.scale = a["scale"].cast<T>();
  tile.rounding = static_cast<fastcontrast::Rounding>(a["rounding"].cast<int>());
  tile.x_sqnorm = at<const T>(a["x_sqnorm"].cast<Address>());
  tile.y_sqnorm = at<const T>(a["y_sqnorm"].cast<Address>());
  tile.x = at<const T>(a["x"].cast<Address>());
  tile.y = at<const T>(a["y"].cast<Address>());
  tile.dim = a["dim"].cast<std::int64_t>();
  tile.exclude = at<const std::int64_t>(a["exclude"].cast<Address>());
  tile.exclude_count = a["exclude_count"].cast<std::int64_t>();
  tile.row_ids = at<const std::int32_t>(a["row_ids"].cast<Address>());
  tile.column_ids = at<const std::int32_t>(a["column_ids"].cast<Address>());
  tile.keep = static_cast<fastcontrast::Keep>(a["keep"].cast<int>());
  tile.threads = a["threads"].cast<int>();
  return tile;
}

template <typename T>
void distance_softmax_forward(const py::kwargs& a) {
  const cpu::Tile<T> tile = tile_from<T>(a);
  cpu::RowStatistics<T> out;
  out.state = at<double>(a["state"].cast<Address>());
  out.first = a["first"].cast<bool>();
  out.last = a["last"].cast<bool>();
  out.lse = at<T>(a["lse"].cast<Address>());
  out.lse_residual = at<T>(a["lse_residual"].cast<Address>());
  out.entropy = at<T>(a["entropy"].cast<Address>());
  out.score_sum = at<T>(a["score_sum"].cast<Address>());
  out.count = at<std::int64_t>(a["count"].cast<Address>());
  out.threshold = at<const T>(a["threshold"].cast<Address>());
  out.rank = at<std::int64_t>(a["rank"].cast<Address>());
  out.column_max = at<T>(a["column_max"].cast<Address>());
  out.column_sum = at<double>(a["column_sum"].cast<Address>());
  py::gil_scoped_release release;
  if (!FASTCONTRAST_DISPATCH(distance_softmax_forward, tile, out)) throw std::bad_alloc();
}

template <typename T>
cpu::TileGradient<T> tile_gradient_from(const py::kwargs& a) {
  cpu::TileGradient<T> grad;
  grad.row_sum = at<double>(a["row_sum"].cast<Address>());
  grad.column_sum = at<double>(a["column_sum"].cast<Address>());
  grad.score_product = at<double>(a["score_product"].cast<Address>());
  grad.grad_x = at<T>(a["grad_x"].cast<Address>());
  grad.grad_y = at<T>(a["grad_y"].cast<Address>());
  return grad;
}

template <typename T>
void distance_softmax_backward(const py::kwargs& a) {
  const cpu::Tile<T> tile = tile_from<T>(a);
  const cpu::TileGradient<T> grad = tile_gradient_from<T>(a);
  cpu::RowGradients<T> rows;
  rows.lse = at<const T>(a["lse"].cast<Address>());
  rows.lse_residual = at<const T>(a["lse_residual"].cast<Address>());
  rows.entropy = at<const T>(a["entropy"].cast<Address>());
  rows.grad_lse = at<const T>(a["grad_lse"].cast<Address>());
  rows.grad_entropy = at<const T>(a["grad_entropy"].cast<Address>());
  rows.grad_sum = at<const T>(a["grad_sum"].cast<Address>());
  cpu::ColumnGradients<T> columns;
  columns.lse2_high = at<const T>(a["column_lse2_high"].cast<Address>());
  columns.lse2_low = at<const T>(a["column_lse2_low"].cast<Address>());
  columns.grad_lse = at<const T>(a["column_grad_lse"].cast<Address>());
  py::gil_scoped_release release;
  if (!FASTCONTRAST_DISPATCH(distance_softmax_backward, tile, rows, columns, grad)) {
    throw std::bad_alloc();
  }
}

template <typename T>
void center_rows(Address x, Address mean, std::int64_t rows, std::int64_t dim, int threads,
                 Address out, Address sqnorm) {
  py::gil_scoped_release release;
  FASTCONTRAST_DISPATCH(center_rows, at<const T>(x), at<const T>(mean), rows, dim, threads,
                        at<T>(out), at<T>(sqnorm));
}

template <typename T>
void subtract_scaled_rows(Address points, Address sums, std::int64_t rows, std::int64_t dim,
                          int threads, Address grad) {
  py::gil_scoped_release release;
  FASTCONTRAST_DISPATCH(subtract_scaled_rows, at<const T>(points), at<const double>(sums), rows,
                        dim, threads, at<T>(grad));
}

template <typename T>
void softmax_loss(const py::kwargs& a) {
  const cpu::Tile<T> tile = tile_from<T>(a);
  const cpu::TileGradient<T> grad = tile_gradient_from<T>(a);
  cpu::RowLoss<T> rows;
  rows.cross_entropy_weight = at<const T>(a["cross_entropy_weight"].cast<Address>());
  rows.entropy_weight = at<const T>(a["entropy_weight"].cast<Address>());
  rows.loss = at<T>(a["loss"].cast<Address>());
  py::gil_scoped_release release;
  if (!FASTCONTRAST_DISPATCH(softmax_loss, tile, rows, grad)) throw std::bad_alloc();
}

template <typename T>
void nearest(const py::kwargs& a) {
  const cpu::Tile<T> tile = tile_from<T>(a);
  cpu::NearestRows<T> rows;
  rows.k = a["k"].cast<std::int64_t>();
  rows.farthest = a["farthest"].cast<bool>();
  rows.first = a["first"].cast<bool>();
  rows.last = a["last"].cast<bool>();
  rows.x_size = at<const T>(a["x_size"].cast<Address>());
  rows.y_size = at<const T>(a["y_size"].cast<Address>());
  rows.points = at<const T>(a["points"].cast<Address>());
  rows.x_norm = at<const double>(a["x_norm"].cast<Address>());
  rows.y_norm = at<const double>(a["y_norm"].cast<Address>());
  rows.capacity = a["capacity"].cast<std::int64_t>();
  rows.lower = at<T>(a["lower"].cast<Address>());
  rows.upper = at<T>(a["upper"].cast<Address>());
  rows.column = at<std::int64_t>(a["column"].cast<Address>());
  rows.count = at<std::int64_t>(a["count"].cast<Address>());
  rows.limit = at<T>(a["limit"].cast<Address>());
  rows.scratch = at<fastcontrast::Neighbor>(a["scratch"].cast<Address>());
  rows.values = at<T>(a["found"].cast<Address>());
  rows.indices = at<std::int64_t>(a["indices"].cast<Address>());
  py::gil_scoped_release release;
  FASTCONTRAST_DISPATCH(nearest, tile, rows);
}

// A small call: arguments by position, because naming them would cost as much as the work.
template <typename T>
void small_softmax_loss(Address x, Address y, std::int64_t rows, std::int64_t columns,
                        std::int64_t dim, int metric, double scale, Address exclude,
                        Address cross_entropy_weight, Address entropy_weight, Address loss,
                        Address grad_x, Address grad_y, Address grad_scale) {
  cpu::SmallLoss<T> call{};
  call.tile.rows = rows;
  call.tile.columns = columns;
  call.tile.metric = static_cast<fastcontrast::Metric>(metric);
  call.tile.scale = static_cast<T>(scale);
  call.tile.x = at<const T>(x);
  call.tile.y = at<const T>(y);
  call.tile.dim = dim;
  call.tile.exclude = at<const std::int64_t>(exclude);
  call.tile.exclude_count = exclude == 0 ? 0 : 1;
  call.rows.cross_entropy_weight = at<const T>(cross_entropy_weight);
  call.rows.entropy_weight = at<const T>(entropy_weight);
  call.rows.loss = at<T>(loss);
  call.grad_x = at<T>(grad_x);
  call.grad_y = at<T>(grad_y);
  call.grad_scale = at<T>(grad_scale);
  py::gil_scoped_release release;
  if (!FASTCONTRAST_DISPATCH(small_softmax_loss, call)) throw std::bad_alloc();
}

fastcontrast::PatchSet cpu_patch_set_from(const py::kwargs& a, const ChannelNumbers& numbers) {
  fastcontrast::PatchSet set = patch_set_from(a, numbers);
  set.threads = a["workers"].cast<int>();
  return set;
}

void extract_patches_forward(const py::kwargs& a) {
  const ChannelNumbers numbers = channel_numbers_from(a);
  const fastcontrast::PatchSet set = cpu_patch_set_from(a, numbers);
  const fastcontrast::Images images = images_from(a);
  const fastcontrast::PatchOutput out = patch_output_from(a);
  bool done;
  {
    py::gil_scoped_release release;
    done = FASTCONTRAST_DISPATCH(extract_patches_forward, set, images, out);
  }
  if (!done) throw std::bad_alloc();
}

void extract_patches_backward(const py::kwargs& a) {
  const ChannelNumbers numbers = channel_numbers_from(a);
  const fastcontrast::PatchSet set = cpu_patch_set_from(a, numbers);
  const fastcontrast::PatchGradient grad = patch_gradient_from(a);
  const fastcontrast::ImageGradient images = image_gradient_from(a);
  bool done;
  {
    py::gil_scoped_release release;
    done = FASTCONTRAST_DISPATCH(extract_patches_backward, set, grad, images);
  }
  if (!done) throw std::bad_alloc();
}

std::int64_t sample_coords(const py::kwargs& a) {
  const fastcontrast::CropDraws draws = crop_draws_from(a);
  py::gil_scoped_release release;
  return FASTCONTRAST_DISPATCH(sample_coords, draws);
}

std::int64_t first_invalid_box(const py::kwargs& a) {
  const fastcontrast::PatchSet set = cpu_patch_set_from(a, {});
  return FASTCONTRAST_DISPATCH(first_invalid_box, set);
}

void triplet_distances_forward(const Addresses& points, const std::array<std::int64_t, 3>& strides,
                               int type, std::int64_t rows, std::int64_t dim, int metric,
                               int threads, const Addresses& distances, Address difference) {
  const fastcontrast::Triplets triplets =
      triplets_from(points, strides, type, rows, dim, metric, threads);
  const fastcontrast::TripletDistances out = triplet_distances_at(distances, difference);
  bool done;
  {
    py::gil_scoped_release release;
    done = FASTCONTRAST_DISPATCH(triplet_distances_forward, triplets, out);
  }
  if (!done) throw std::invalid_argument("no kernel for this dtype and metric of triplets");
}

void triplet_distances_backward(const Addresses& points, const std::array<std::int64_t, 3>& strides,
                                int type, std::int64_t rows, std::int64_t dim, int metric,
                                int threads, const Addresses& distances, const Addresses& gradients,
                                Address slope, Address upstream, std::int64_t upstream_stride,
                                double factor, const Addresses& out) {
  const fastcontrast::Triplets triplets =
      triplets_from(points, strides, type, rows, dim, metric, threads);
  const fastcontrast::TripletDistances values = triplet_distances_at(distances, 0);
  const fastcontrast::TripletGradients from =
      triplet_gradients_at(gradients, slope, upstream, upstream_stride, factor);
  void* const results[3] = {at<void>(out[0]), at<void>(out[1]), at<void>(out[2])};
  bool done;
  {
    py::gil_scoped_release release;
    done = FASTCONTRAST_DISPATCH(triplet_distances_backward, triplets, values, from, results);
  }
  if (!done) throw std::invalid_argument("no kernel for this dtype and metric of triplets");
}

std::array<std::uint32_t, 4> philox4x32(const std::array<std::uint32_t, 4>& counter,
                                        std::uint64_t seed) {
  fastcontrast::PhiloxBlock block;
  for (int i = 0; i < 4; ++i) block.word[i] = counter[i];
  block = fastcontrast::philox4x32(block, seed);
  return {block.word[0], block.word[1], block.word[2], block.word[3]};
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
  info["detected_isa"] = cpu::isa_name(cpu::detected_isa());
#if defined(FASTCONTRAST_HAVE_CUDA)
  info["cuda_runtime"] = fastcontrast::cuda::runtime_version();
  info["cuda_architectures"] = FASTCONTRAST_CUDA_ARCHITECTURES;
#else
  info["cuda_runtime"] = 0;
  info["cuda_architectures"] = "";
#endif
  return info;
}

cpu::Isa isa_from_name(const std::string& name) {
  for (const cpu::Isa isa : {cpu::Isa::portable, cpu::Isa::avx2, cpu::Isa::avx512}) {
    if (name == cpu::isa_name(isa)) return isa;
  }
  throw std::invalid_argument("instruction set '" + name + "' is none of portable, avx2, avx512");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastcontrast. Private: fastcontrast.backends.native calls them.";
  m.def("build_info", &build_info, "Compiler, OpenMP, instruction set and CUDA of this module.");
  m.def("active_isa", [] { return std::string(cpu::isa_name(cpu::active_isa())); });
  m.def("set_active_isa",
        [](const std::string& name) { cpu::set_active_isa(isa_from_name(name)); });
#if defined(FASTCONTRAST_HAVE_CUDA)
  m.def("cuda_device_count", &fastcontrast::cuda::device_count);
  m.def("cuda_device_problem", &fastcontrast::cuda::device_problem);
  py::module_ kernels = m.def_submodule("cuda", "The entries of this module for CUDA tensors.");
  fastcontrast::cuda::bind(kernels);
#endif
  m.def("distance_softmax_forward_float32", &distance_softmax_forward<float>);
  m.def("distance_softmax_forward_float64", &distance_softmax_forward<double>);
  m.def("distance_softmax_backward_float32", &distance_softmax_backward<float>);
  m.def("distance_softmax_backward_float64", &distance_softmax_backward<double>);
  m.def("center_rows_float32", &center_rows<float>);
  m.def("center_rows_float64", &center_rows<double>);
  m.def("subtract_scaled_rows_float32", &subtract_scaled_rows<float>);
  m.def("subtract_scaled_rows_float64", &subtract_scaled_rows<double>);
  m.def("small_softmax_loss_float32", &small_softmax_loss<float>);
  m.def("small_softmax_loss_float64", &small_softmax_loss<double>);
  m.def("softmax_loss_float32", &softmax_loss<float>);
  m.def("softmax_loss_float64", &softmax_loss<double>);
  m.def("nearest_float32", &nearest<float>);
  m.def("nearest_float64", &nearest<double>);
  m.def("extract_patches_forward", &extract_patches_forward);
  m.def("extract_patches_backward", &extract_patches_backward);
  m.def("sample_coords", &sample_coords);
  m.def("first_invalid_box", &first_invalid_box);
  m.def("triplet_distances_forward", &triplet_distances_forward);
  m.def("triplet_distances_backward", &triplet_distances_backward);
  fastcontrast::bind_bf16_products(m);
  m.def("philox4x32", &philox4x32, "One block of the generator, for tests of known answers.");
}

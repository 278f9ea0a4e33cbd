// pybind11 module fastcontrast._C: one function per kernel entry, and what the module knows of
// itself. Tensors arrive as addresses; fastcontrast/backends/native/ has checked them.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/distance_softmax.h"
#include "cpu/isa.h"
#if defined(FASTCONTRAST_HAVE_CUDA)
#include "cuda/device.h"
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace py = pybind11;
namespace cpu = fastcontrast::cpu;

namespace {

using Address = std::uintptr_t;  // 0 stands for "none"

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

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
  tile.x_sqnorm = at<const T>(a["x_sqnorm"].cast<Address>());
  tile.y_sqnorm = at<const T>(a["y_sqnorm"].cast<Address>());
  tile.x = at<const T>(a["x"].cast<Address>());
  tile.y = at<const T>(a["y"].cast<Address>());
  tile.dim = a["dim"].cast<std::int64_t>();
  tile.exclude = at<const std::int64_t>(a["exclude"].cast<Address>());
  tile.exclude_count = a["exclude_count"].cast<std::int64_t>();
  tile.row_ids = at<const std::int32_t>(a["row_ids"].cast<Address>());
  tile.column_ids = at<const std::int32_t>(a["column_ids"].cast<Address>());
  tile.keep = static_cast<cpu::Keep>(a["keep"].cast<int>());
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
  out.mean_score = at<T>(a["mean_score"].cast<Address>());
  out.score_sum = at<T>(a["score_sum"].cast<Address>());
  out.count = at<std::int64_t>(a["count"].cast<Address>());
  out.threshold = at<const T>(a["threshold"].cast<Address>());
  out.rank = at<std::int64_t>(a["rank"].cast<Address>());
  py::gil_scoped_release release;
  FASTCONTRAST_DISPATCH(distance_softmax_forward, tile, out);
}

template <typename T>
void distance_softmax_backward(const py::kwargs& a) {
  const cpu::Tile<T> tile = tile_from<T>(a);
  cpu::TileGradient<T> grad;
  grad.lse = at<const T>(a["lse"].cast<Address>());
  grad.mean_score = at<const T>(a["mean_score"].cast<Address>());
  grad.grad_lse = at<const T>(a["grad_lse"].cast<Address>());
  grad.grad_mean = at<const T>(a["grad_mean"].cast<Address>());
  grad.grad_sum = at<const T>(a["grad_sum"].cast<Address>());
  grad.row_sum = at<double>(a["row_sum"].cast<Address>());
  grad.column_sum = at<double>(a["column_sum"].cast<Address>());
  grad.score_product = at<double>(a["score_product"].cast<Address>());
  grad.grad_x = at<T>(a["grad_x"].cast<Address>());
  grad.grad_y = at<T>(a["grad_y"].cast<Address>());
  py::gil_scoped_release release;
  FASTCONTRAST_DISPATCH(distance_softmax_backward, tile, grad);
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
  m.def("set_active_isa", [](const std::string& name) { cpu::set_active_isa(isa_from_name(name)); });
#if defined(FASTCONTRAST_HAVE_CUDA)
  m.def("cuda_device_count", &fastcontrast::cuda::device_count);
  m.def("cuda_device_problem", &fastcontrast::cuda::device_problem);
#endif
  m.def("distance_softmax_forward_float32", &distance_softmax_forward<float>);
  m.def("distance_softmax_forward_float64", &distance_softmax_forward<double>);
  m.def("distance_softmax_backward_float32", &distance_softmax_backward<float>);
  m.def("distance_softmax_backward_float64", &distance_softmax_backward<double>);
}

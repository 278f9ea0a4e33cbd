// The entries of _C.cuda for `nearest`. Called by backends/native/nearest.py.
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <utility>

#include "arguments.h"
#include "cuda/bindings.h"
#include "cuda/nearest.h"

namespace py = pybind11;

namespace fastcontrast {
namespace cuda {
namespace {

Stream stream_from(const py::kwargs& a) {
  const auto where = a["workers"].cast<std::pair<int, Address>>();
  return {where.first, at<void>(where.second)};
}

// Of `name`, `name`_stride and `name`_count.
Points points_from(const py::kwargs& a, const std::string& name) {
  return {at<const void>(a[name.c_str()].cast<Address>()),
          a[(name + "_stride").c_str()].cast<std::int64_t>(),
          a[(name + "_count").c_str()].cast<std::int64_t>()};
}

void row_norms_entry(const py::kwargs& a) {
  const Points points = points_from(a, "x");
  const auto type = static_cast<Scalar>(a["type"].cast<int>());
  const auto dim = a["dim"].cast<std::int64_t>();
  double* const norms = at<double>(a["norms"].cast<Address>());
  const Stream stream = stream_from(a);
  py::gil_scoped_release release;
  if (!row_norms(points, type, dim, norms, stream)) {
    throw std::invalid_argument("no CUDA kernel for this dtype of points");
  }
}

void nearest_entry(const py::kwargs& a) {
  NearestSearch search;
  search.x = points_from(a, "x");
  search.y = points_from(a, "y");
  search.type = static_cast<Scalar>(a["type"].cast<int>());
  search.dim = a["dim"].cast<std::int64_t>();
  search.metric = static_cast<Metric>(a["metric"].cast<int>());
  search.farthest = a["farthest"].cast<bool>();
  search.cosine = a["cosine"].cast<bool>();
  search.x_norm = at<const double>(a["x_norm"].cast<Address>());
  search.y_norm = at<const double>(a["y_norm"].cast<Address>());
  search.exclude = at<const std::int64_t>(a["exclude"].cast<Address>());
  search.exclude_count = a["exclude_count"].cast<int>();
  search.row_ids = at<const std::int64_t>(a["row_ids"].cast<Address>());
  search.column_ids = at<const std::int64_t>(a["column_ids"].cast<Address>());
  search.keep = static_cast<Keep>(a["keep"].cast<int>());
  search.k = a["k"].cast<int>();
  search.after = at<const Neighbor>(a["after"].cast<Address>());
  NearestLists lists;
  lists.splits = a["splits"].cast<std::int64_t>();
  lists.capacity = a["capacity"].cast<int>();
  lists.bounds = at<void>(a["bounds"].cast<Address>());
  lists.column = at<std::int64_t>(a["column"].cast<Address>());
  lists.ranked = at<Neighbor>(a["ranked"].cast<Address>());
  NearestResults out;
  out.values = at<void>(a["values"].cast<Address>());
  out.indices = at<std::int64_t>(a["indices"].cast<Address>());
  out.stride = a["out_stride"].cast<std::int64_t>();
  out.last = at<Neighbor>(a["last"].cast<Address>());
  const Stream stream = stream_from(a);
  py::gil_scoped_release release;
  if (!nearest(search, lists, out, stream)) {
    throw std::invalid_argument("no CUDA kernel for this dtype or k of nearest");
  }
}

}  // namespace

void bind_nearest(py::module_& m) {
  m.def("row_norms", &row_norms_entry);
  m.def("nearest", &nearest_entry);
}

}  // namespace cuda
}  // namespace fastcontrast

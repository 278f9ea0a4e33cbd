// Arguments of the bfloat16 products from Python, as bindings.cpp has them of the other kernels.
#include "bf16_bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/bf16_products.h"
#include "cpu/bf16_unit.h"

namespace py = pybind11;

namespace fastcontrast {

namespace {

using Address = std::uintptr_t;  // 0 stands for "none"

template <typename T>
T* at(const py::handle& address) {
  return reinterpret_cast<T*>(address.cast<Address>());
}

// (address of high, address of low or 0, values from a panel to the next)
cpu::Bf16Factor factor_from(const py::handle& value) {
  const auto part = value.cast<py::tuple>();
  return {at<BFloat16>(part[0]), at<BFloat16>(part[1]), part[2].cast<std::int64_t>()};
}

void pack_factor(const py::kwargs& a) {
  cpu::Bf16Source source;
  source.data = at<const float>(a["data"]);
  source.outer = a["outer"].cast<std::int64_t>();
  source.depth = a["depth"].cast<std::int64_t>();
  source.outer_stride = a["outer_stride"].cast<std::int64_t>();
  source.depth_stride = a["depth_stride"].cast<std::int64_t>();
  const cpu::Side side = a["left"].cast<bool>() ? cpu::Side::left : cpu::Side::right;
  const cpu::Bf16Factor out = factor_from(a["out"]);
  const int threads = a["threads"].cast<int>();
  py::gil_scoped_release release;
  FASTCONTRAST_BF16_DISPATCH(pack_factor, source, side, threads, out);
}

void score_product(const py::kwargs& a) {
  cpu::ScoreProduct product;
  product.left = factor_from(a["left"]);
  product.right = factor_from(a["right"]);
  product.rows = a["rows"].cast<std::int64_t>();
  product.columns = a["columns"].cast<std::int64_t>();
  product.dim = a["dim"].cast<std::int64_t>();
  product.threads = a["threads"].cast<int>();
  product.scores = at<float>(a["scores"]);
  py::gil_scoped_release release;
  FASTCONTRAST_BF16_DISPATCH(score_product, product);
}

void gradient_products(const py::kwargs& a) {
  cpu::GradientProducts products;
  products.weights = at<const float>(a["weights"]);
  products.rows = a["rows"].cast<std::int64_t>();
  products.columns = a["columns"].cast<std::int64_t>();
  products.dim = a["dim"].cast<std::int64_t>();
  products.y_right = factor_from(a["y_right"]);
  products.x_left = factor_from(a["x_left"]);
  products.workspace[0] = factor_from(a["weights_left"]);
  products.workspace[1] = factor_from(a["weights_right"]);
  products.grad_x = at<float>(a["grad_x"]);
  products.grad_y_transposed = at<float>(a["grad_y_transposed"]);
  products.grad_y_stride = a["grad_y_stride"].cast<std::int64_t>();
  products.row_sum = at<double>(a["row_sum"]);
  products.column_sum = at<double>(a["column_sum"]);
  products.threads = a["threads"].cast<int>();
  py::gil_scoped_release release;
  FASTCONTRAST_BF16_DISPATCH(gradient_products, products);
}

void round_to_terms(const py::kwargs& a) {
  float* points = at<float>(a["points"]);
  const auto rows = a["rows"].cast<std::int64_t>(), dim = a["dim"].cast<std::int64_t>();
  const int terms = a["terms"].cast<int>(), threads = a["threads"].cast<int>();
  float* sqnorm = at<float>(a["sqnorm"]);
  py::gil_scoped_release release;
  FASTCONTRAST_BF16_DISPATCH(round_to_terms, points, rows, dim, terms, threads, sqnorm);
}

constexpr cpu::Bf16Unit UNITS[] = {cpu::Bf16Unit::none, cpu::Bf16Unit::avx512_bf16,
                                   cpu::Bf16Unit::amx, cpu::Bf16Unit::amx_emulated};

std::vector<std::string> available_units() {
  std::vector<std::string> names;
  for (const cpu::Bf16Unit unit : UNITS) {
    if (cpu::bf16_unit_available(unit)) names.push_back(cpu::bf16_unit_name(unit));
  }
  return names;
}

void set_active_unit(const std::string& name) {
  for (const cpu::Bf16Unit unit : UNITS) {
    if (name == cpu::bf16_unit_name(unit)) return cpu::set_active_bf16_unit(unit);
  }
  throw std::invalid_argument("bfloat16 unit '" + name +
                              "' is none of none, avx512_bf16, amx, amx_emulated");
}

}  // namespace

void bind_bf16_products(py::module_& m) {
  py::list built;
#if defined(FASTCONTRAST_HAVE_AVX512_BF16)
  built.append("avx512_bf16");
#endif
#if defined(FASTCONTRAST_HAVE_AMX)
  built.append("amx");
#endif
#if defined(FASTCONTRAST_HAVE_AMX_EMULATION)
  built.append("amx_emulated");
#endif
  m.attr("BF16_UNITS_BUILT") = py::tuple(built);
  m.attr("BF16_PANEL") = cpu::PANEL;
  m.attr("BF16_DEPTH_BLOCK") = cpu::DEPTH_BLOCK;
  m.attr("BF16_WEIGHT_COLUMNS") = cpu::WEIGHT_COLUMNS;
  m.def("bf16_units", &available_units, "Units that this build and machine can run.");
  m.def("active_bf16_unit",
        [] { return std::string(cpu::bf16_unit_name(cpu::active_bf16_unit())); });
  m.def("set_active_bf16_unit", &set_active_unit);
  m.def("bf16_pack_factor", &pack_factor);
  m.def("bf16_score_product", &score_product);
  m.def("bf16_gradient_products", &gradient_products);
  m.def("bf16_round_to_terms", &round_to_terms);
}

}  // namespace fastcontrast

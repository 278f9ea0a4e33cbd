// The entries of `distance_softmax` for CUDA tensors. Called by cuda/bindings.cpp alone.
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "arguments.h"
#include "cuda/bindings.h"
#include "cuda/distance_softmax.h"

namespace py = pybind11;

namespace fastcontrast {
namespace cuda {
namespace {

using Side = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;

PointSet points_from(const Side& side) {
  const auto& [address, count, stride, step] = side;
  return {at<const void>(address), count, stride, step};
}

// What every entry is given of the pairs.
using PairArguments = std::tuple<Side, Side, int, std::int64_t, int, int, Address, double, Address,
                                 std::int64_t, Address, Address>;

Pairs pairs_from(const PairArguments& arguments) {
  const auto& [rows, columns, type, dim, metric, keep, scale, scale_number, exclude, exclude_count,
               row_ids, column_ids] = arguments;
  return {points_from(rows),
          points_from(columns),
          static_cast<Scalar>(type),
          dim,
          static_cast<Metric>(metric),
          static_cast<Keep>(keep),
          at<const void>(scale),
          scale_number,
          at<const std::int64_t>(exclude),
          exclude_count,
          at<const std::int64_t>(row_ids),
          at<const std::int64_t>(column_ids)};
}

// Operand, rounded rows, rounded columns: (values, low, norms, width) each.
using Rounded = std::tuple<Address, Address, Address, std::int64_t>;
using RoundedSides = std::tuple<int, Rounded, Rounded>;

RoundedPoints rounded_from(const Rounded& rounded) {
  const auto& [values, low, sqnorm, width] = rounded;
  return {at<void>(values), at<void>(low), at<float>(sqnorm), width};
}

RoundedPairs rounded_pairs_from(const Pairs& pairs, const RoundedSides& sides) {
  const auto& [operand, rows, columns] = sides;
  return {pairs, static_cast<Operand>(operand), rounded_from(rows), rounded_from(columns)};
}

void check(bool launched) {
  if (!launched) throw std::invalid_argument("no CUDA kernel for this dtype of points");
}

using Where = std::pair<int, Address>;
using Parts = std::array<std::int64_t, 2>;

void statistics_entry(const PairArguments& of, const Where& where, const Parts& splits,
                      const std::optional<RoundedSides>& rounded,
                      const std::array<Address, 6>& results, Address threshold, Address state,
                      Address counts, const std::array<Address, 3>& of_columns,
                      std::int64_t groups) {
  const Pairs pairs = pairs_from(of);
  const RowStatistics out = {at<void>(results[0]),         at<void>(results[1]),
                             at<void>(results[2]),         at<void>(results[3]),
                             at<std::int64_t>(results[4]), at<const void>(threshold),
                             at<std::int64_t>(results[5]), at<double>(state),
                             at<std::int64_t>(counts)};
  const ColumnStatistics columns = {at<void>(of_columns[0]), at<void>(of_columns[1]),
                                    at<double>(of_columns[2]), groups};
  const Stream stream{where.first, at<void>(where.second)};
  const Splits parts{splits[0], splits[1]};
  py::gil_scoped_release release;
  check(rounded
            ? tensor_statistics(rounded_pairs_from(pairs, *rounded), out, columns, parts, stream)
            : distance_softmax_statistics(pairs, out, columns, parts, stream));
}

void gradients_entry(const PairArguments& of, const Where& where, const Parts& splits,
                     const std::optional<RoundedSides>& rounded,
                     const std::array<Address, 10>& terms, bool owns_rows, std::int64_t groups,
                     Address grad, Address product) {
  const Pairs pairs = pairs_from(of);
  const void* p[10];
  for (int i = 0; i < 10; ++i) p[i] = at<const void>(terms[i]);
  const ScoreGradients from = {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9]};
  const SideGradient out = {owns_rows, groups, at<void>(grad), at<double>(product)};
  const Stream stream{where.first, at<void>(where.second)};
  const Splits parts{splits[0], splits[1]};
  py::gil_scoped_release release;
  check(rounded ? tensor_gradients(rounded_pairs_from(pairs, *rounded), from, out, parts, stream)
                : distance_softmax_gradients(pairs, from, out, parts, stream));
}

void losses_entry(const PairArguments& of, const Where& where, const std::array<Address, 8>& terms,
                  const std::array<Address, 4>& results) {
  const Pairs pairs = pairs_from(of);
  const void* p[8];
  for (int i = 0; i < 8; ++i) p[i] = at<const void>(terms[i]);
  const RowLosses losses = {p[0],
                            p[1],
                            p[2],
                            p[3],
                            p[4],
                            p[5],
                            p[6],
                            p[7],
                            at<void>(results[0]),
                            at<void>(results[1]),
                            at<void>(results[2]),
                            at<void>(results[3])};
  const Stream stream{where.first, at<void>(where.second)};
  py::gil_scoped_release release;
  check(distance_softmax_losses(pairs, losses, stream));
}

void round_points_entry(const Side& given, int type, std::int64_t dim, Address mean, int operand,
                        const Rounded& to, const Where& where) {
  const PointSet points = points_from(given);
  const RoundedPoints rounded = rounded_from(to);
  const Stream stream{where.first, at<void>(where.second)};
  py::gil_scoped_release release;
  check(round_points(points, static_cast<Scalar>(type), dim, at<const void>(mean),
                     static_cast<Operand>(operand), rounded, stream));
}

}  // namespace

void bind_distance_softmax(py::module_& m) {
  m.def("distance_softmax_statistics", &statistics_entry);
  m.def("distance_softmax_gradients", &gradients_entry);
  m.def("distance_softmax_losses", &losses_entry);
  m.def("round_points", &round_points_entry);
}

}  // namespace cuda
}  // namespace fastcontrast

// Scores of one row of a tile, in place of its dot products, and their softmax. Included by kernel
// files only: all of it lives in the namespace of one instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/online_softmax.h"
#include "common/scores.h"
#include "cpu/distance_softmax.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

// Scores of columns [begin, end) of one row, in place. Returns whether a near pair was seen.
template <Metric metric, bool masked, typename T>
FC_INLINE bool score_span(const Tile<T>& tile, int64_t row, int64_t begin, int64_t end) {
  T* t = tile.values + row * tile.columns;
  const T scale2 = tile.scale * T(LOG2_E);
  const T xs = metric == Metric::dot ? T(0) : tile.x_sqnorm[row];
  const T* ys = tile.y_sqnorm;
  const int32_t* ids = tile.column_ids;
  const int32_t row_id = masked ? tile.row_ids[row] : 0;
  const int same = tile.keep == Keep::same;
  const T fraction = near_fraction(T(0), tile.rounding);
  int near = 0;
#pragma omp simd reduction(| : near)
  for (int64_t j = begin; j < end; ++j) {
    T value = t[j];
    int close = 0;
    if (metric != Metric::dot) {
      const T norms = xs + ys[j];
      value = squared_distance(value, xs, ys[j]);
      close = value >= fraction * norms ? 0 : 1;  // NaN, as from inf - inf, is close
    }
    T score = score_log2<metric>(value, scale2);
    if (masked) {
      const int counts = (ids[j] == row_id) == same;
      score = counts ? score : T(-INFINITY);
      close = counts ? close : 0;
    }
    t[j] = score;
    near |= close;
  }
  return near != 0;
}

template <Metric metric, typename T>
FC_INLINE bool is_near(const Tile<T>& tile, int64_t row, int64_t column, T t) {
  if (metric == Metric::dot || t == T(-INFINITY)) return false;
  const T d2 = squared_distance_from_score<metric>(t, tile.scale * T(LOG2_E));
  const T limit = near_fraction(T(0), tile.rounding) * (tile.x_sqnorm[row] + tile.y_sqnorm[column]);
  return !(d2 >= limit) || t == T(0);
}

// t of one pair from its two points, without the GEMM.
template <Metric metric, typename T>
FC_INLINE T direct_score(const Tile<T>& tile, int64_t row, int64_t column) {
  const T* x = tile.x + row * tile.dim;
  const T* y = tile.y + column * tile.dim;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < tile.dim; ++k) {
    const T difference = x[k] - y[k];
    sum += metric == Metric::dot ? x[k] * y[k] : difference * difference;
  }
  return score_log2<metric>(sum, tile.scale * T(LOG2_E));
}

template <Metric metric, typename T>
void refine_span(const Tile<T>& tile, int64_t row, int64_t begin, int64_t end, uint8_t* near) {
  T* t = tile.values + row * tile.columns;
  for (int64_t j = begin; j < end; ++j) {
    const bool close = is_near<metric>(tile, row, j, t[j]);
    if (near) near[j] = close;
    if (close) t[j] = direct_score<metric>(tile, row, j);
  }
}

// The excluded columns of a row that fall in the tile, in ascending order, without repeats.
struct Gaps {
  int64_t column[2];
  int count;
};
template <typename T>
FC_INLINE Gaps gaps_of_row(const Tile<T>& tile, int64_t row) {
  Gaps gaps{{0, 0}, 0};
  for (int64_t e = 0; e < tile.exclude_count; ++e) {
    const int64_t global = tile.exclude[row * tile.exclude_count + e];
    if (global < tile.first_column || global >= tile.first_column + tile.columns) continue;
    const int64_t column = global - tile.first_column;
    if (gaps.count == 1 && gaps.column[0] == column) continue;
    gaps.column[gaps.count++] = column;
  }
  if (gaps.count == 2 && gaps.column[1] < gaps.column[0]) {
    const int64_t first = gaps.column[1];
    gaps.column[1] = gaps.column[0];
    gaps.column[0] = first;
  }
  return gaps;
}

// All scores of a row, excluded columns at -inf. `near` (or null): flags of near pairs, valid where
// the return value is true.
template <Metric metric, bool masked, typename T>
FC_INLINE bool score_row(const Tile<T>& tile, int64_t row, uint8_t* near) {
  const Gaps gaps = gaps_of_row(tile, row);
  bool any = false;
  int64_t begin = 0;
  for (int g = 0; g <= gaps.count; ++g) {
    const int64_t end = g < gaps.count ? gaps.column[g] : tile.columns;
    if (score_span<metric, masked>(tile, row, begin, end)) {
      if (near && !any) memset(near, 0, (size_t)tile.columns);
      any = true;
      refine_span<metric>(tile, row, begin, end, near);
    }
    if (g < gaps.count) tile.values[row * tile.columns + end] = T(-INFINITY);
    begin = end + 1;
  }
  return any;
}

template <bool masked, typename T>
int64_t counted_columns(const Tile<T>& tile, int64_t row) {
  const Gaps gaps = gaps_of_row(tile, row);
  int64_t count = tile.columns - gaps.count;
  if (!masked) return count;
  const bool same = tile.keep == Keep::same;
  for (int64_t j = 0; j < tile.columns; ++j) {
    const bool gap =
        (gaps.count > 0 && gaps.column[0] == j) || (gaps.count > 1 && gaps.column[1] == j);
    count -= !gap && (tile.column_ids[j] == tile.row_ids[row]) != same;
  }
  return count;
}

// Sums of a row run in T over this many columns and in double from there: eager PyTorch sums
// pairwise, and plain float32 over a whole tile would be less exact than that.
constexpr int64_t SUM_CHUNK = 256;

FC_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
FC_INLINE SoftmaxState row_state(const Tile<T>& tile, int64_t row) {
  const T* t = tile.values + row * tile.columns;
  T max = T(-INFINITY);
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < tile.columns; ++j) max = t[j] > max ? t[j] : max;
  if (max == T(INFINITY)) {  // lse is inf, unless there is a NaN as well
    double mass = 1.0;
    for (int64_t j = 0; j < tile.columns; ++j) mass = t[j] == t[j] ? mass : NAN;
    return SoftmaxState{INFINITY, mass, 0.0};
  }
  const T base = max == T(-INFINITY) ? T(0) : max;
  const T floor = smallest_exponent(T(0));
  double sum = 0, weighted = 0;
  for (int64_t begin = 0; begin < tile.columns; begin += SUM_CHUNK) {
    const int64_t end = smaller(begin + SUM_CHUNK, tile.columns);
    T part = 0, part_weighted = 0;
#pragma omp simd reduction(+ : part, part_weighted)
    for (int64_t j = begin; j < end; ++j) {
      const T u = t[j] - base;
      const T e = exp2_flushed(u);
      part += e;
      part_weighted += e * (u < floor ? floor : u);
    }
    sum += (double)part;
    weighted += (double)part_weighted;
  }
  return SoftmaxState{(double)max, sum, weighted};
}

// Calls f<metric, masked>(arguments...) with the two run-time choices as constants.
#define FASTCONTRAST_FOR_METRIC(function, tile, ...)                          \
  do {                                                                        \
    const bool ids = (tile).keep != Keep::all;                                \
    switch ((tile).metric) {                                                  \
      case Metric::l2:                                                        \
        return ids ? function<Metric::l2, true>(tile, __VA_ARGS__)            \
                   : function<Metric::l2, false>(tile, __VA_ARGS__);          \
      case Metric::sqeuclidean:                                               \
        return ids ? function<Metric::sqeuclidean, true>(tile, __VA_ARGS__)   \
                   : function<Metric::sqeuclidean, false>(tile, __VA_ARGS__); \
      case Metric::dot:                                                       \
        return ids ? function<Metric::dot, true>(tile, __VA_ARGS__)           \
                   : function<Metric::dot, false>(tile, __VA_ARGS__);         \
    }                                                                         \
    __builtin_unreachable();                                                  \
  } while (false)

}  // namespace
}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast

// Rows without anything to be careful of: every pair that counts is finite, and none is so near
// that the Gram identity would lose it. Nearly all rows are; they go from dot products to
// statistics or pair weights without scores in between. Included by kernel files only, like
// score_rows.h.
#pragma once

#include "common/online_softmax.h"
#include "cpu/score_rows.h"
#include "cpu/weigh_rows.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

// A row in which every pair that counts is finite and none is near.
template <typename T>
struct PlainRow {
  Gaps gaps;
  T closest;  // largest t / scale2: the distance or its square, negative, or the dot product
  SoftmaxState state;
  double weight_sum;  // with Leave::weights: Σ_j of the weights, without their common factor
  double score_sum;   // with extras: Σ_j t_j
  int64_t above;      // with extras: #{j : t_j > threshold}
};

// Which columns of a chunk count: those that are not excluded and whose id fits.
template <bool masked>
struct Counting {
  int first_gap, second_gap;  // positions in the chunk, or outside it
  const int32_t* ids;
  int32_t row_id;
  int same;

  FC_MEMBER int operator()(int l) const {
    const int kept = (l != first_gap) & (l != second_gap);
    return masked ? kept & ((ids[l] == row_id) == same) : kept;
  }
};

// Runs visit(first column, width, which of them count) over chunks of at most SUM_CHUNK columns.
template <bool masked, typename T, typename Visit>
FC_INLINE void for_chunks(const Tile<T>& tile, int64_t row, const Gaps& gaps, const Visit& visit) {
  for (int64_t begin = 0; begin < tile.columns; begin += SUM_CHUNK) {
    const int width = (int)smaller(SUM_CHUNK, tile.columns - begin);
    Counting<masked> counting{-1, -1, nullptr, 0, tile.keep == Keep::same};
    const int64_t first = gaps.column[0] - begin, second = gaps.column[1] - begin;
    if (gaps.count > 0 && first >= 0 && first < width) counting.first_gap = (int)first;
    if (gaps.count > 1 && second >= 0 && second < width) counting.second_gap = (int)second;
    if (masked) {
      counting.ids = tile.column_ids + begin;
      counting.row_id = tile.row_ids[row];
    }
    visit(begin, width, counting);
  }
}

// Finds the closest pair. False where the row is not plain: then its scores have to be formed one
// by one. `widest_y`: the largest squared norm of a column.
template <Metric metric, bool masked, typename T>
FC_INLINE bool find_closest(const Tile<T>& tile, int64_t row, T widest_y, PlainRow<T>* out) {
  constexpr bool is_dot = metric == Metric::dot;
  const T* row_values = tile.values + row * tile.columns;
  const T scale2 = tile.scale * T(LOG2_E);
  const T xs = is_dot ? T(0) : tile.x_sqnorm[row];
  const T fraction = near_fraction(T(0), tile.rounding);
  out->gaps = gaps_of_row(tile, row);
  T least = T(INFINITY), most = T(-INFINITY);
  int plain = 1;
  for_chunks<masked>(tile, row, out->gaps, [&](int64_t begin, int width, auto counting) {
    const T* values = row_values + begin;
    const T* ys = is_dot ? nullptr : tile.y_sqnorm + begin;
#pragma omp simd reduction(& : plain) reduction(min : least) reduction(max : most)
    for (int l = 0; l < width; ++l) {
      const int counts = counting(l);
      T value = values[l];
      int good = 1;
      if (!is_dot) {
        const T norms = xs + ys[l];
        value = norms - T(2) * value;
        good = value > fraction * norms;
      } else {
        const T high = counts ? value : T(-INFINITY);
        most = high > most ? high : most;
        good = value - value == T(0);
      }
      const T low = counts ? value : T(INFINITY);
      least = low < least ? low : least;
      plain &= good | !counts;
    }
  });
  if (!plain || least == T(INFINITY)) return false;  // or no column counts
  const T widest = is_dot ? most - least : T(2) * (xs + widest_y);
  const T span = scale2 * (metric == Metric::l2 ? square_root(widest) : widest);
  out->closest = is_dot ? most : metric == Metric::l2 ? -square_root(least) : -least;
  return span < largest_finite(T(0));
}

// The largest squared norm of a column; NaN if there is one.
template <Metric metric, typename T>
FC_INLINE T widest_column(const Tile<T>& tile) {
  T widest = T(0);
  if (metric != Metric::dot) {
    for (int64_t j = 0; j < tile.columns; ++j) {
      widest = tile.y_sqnorm[j] <= widest ? widest : tile.y_sqnorm[j];
    }
  }
  return widest;
}

// What sum_row leaves in place of the dot products: those, t (-inf where a column does not count),
// or the weights of a cross-entropy up to the factor g_lse / Σ_j 2^(t_j - max).
enum class Leave { products, scores, weights };

// Sums a plain row, with one exponential per score. `extras`: its plain sum and its rank as well.
template <Metric metric, bool masked, Leave leave, bool extras, typename T>
FC_INLINE void sum_row(const Tile<T>& tile, int64_t row, T threshold, PlainRow<T>* out) {
  constexpr bool is_dot = metric == Metric::dot;
  T* row_values = tile.values + row * tile.columns;
  const T scale2 = tile.scale * T(LOG2_E);
  const T xs = is_dot ? T(0) : tile.x_sqnorm[row];
  const T closest = out->closest;
  double sum = 0, weighted = 0, weight_sum = 0, score_sum = 0;
  int64_t above = 0;
  for_chunks<masked>(tile, row, out->gaps, [&](int64_t begin, int width, auto counting) {
    T* values = row_values + begin;
    const T* ys = is_dot ? nullptr : tile.y_sqnorm + begin;
    T part = 0, part_weighted = 0, part_weight = 0, part_score = 0;
    int part_above = 0;
#pragma omp simd reduction(+ : part, part_weighted, part_weight, part_score, part_above)
    for (int l = 0; l < width; ++l) {
      const int counts = counting(l);
      T value = is_dot ? values[l] : xs + ys[l] - T(2) * values[l];
      value = counts ? value : T(1);  // a masked pair may be NaN
      const T distance = metric == Metric::l2 ? square_root(value) : value;
      const T closeness = is_dot ? value : -distance;
      // The difference is taken before it is scaled, because t itself may be large.
      const T difference = closeness - closest;
      const T u = scale2 * (difference > T(0) ? T(0) : difference);
      const T e = counts ? exp2_flushed(u) : T(0);
      part += e;
      part_weighted += e * u;
      if (leave == Leave::weights) {
        const T w = metric == Metric::l2 ? e / distance : e;
        part_weight += w;
        values[l] = w;
      }
      if (leave == Leave::scores || extras) {
        const T t = counts ? scale2 * closeness : T(-INFINITY);
        if (leave == Leave::scores) values[l] = t;
        if (extras) {
          part_score += counts ? t : T(0);
          part_above += t > threshold;
        }
      }
    }
    sum += (double)part;
    weighted += (double)part_weighted;
    weight_sum += (double)part_weight;
    score_sum += (double)part_score;
    above += part_above;
  });
  out->state = SoftmaxState{(double)scale2 * (double)closest, sum, weighted};
  out->weight_sum = weight_sum;
  out->score_sum = score_sum;
  out->above = above;
}

// Overwrites the dot products of a plain row with its pair weights, in one go: the gradient by a
// score is p times a linear function of log p, and with by_columns also by the softmax of columns.
template <Metric metric, bool masked, bool by_columns, typename T>
FC_INLINE void weigh_plain_row(const Tile<T>& tile, const TileGradient<T>& grad, int64_t row,
                               const PlainRow<T>& plain, const RowGradient<T>& from,
                               const ColumnGradients<T>& columns) {
  constexpr bool is_dot = metric == Metric::dot;
  T* row_values = tile.values + row * tile.columns;
  const T scale2 = tile.scale * T(LOG2_E);
  const T xs = is_dot ? T(0) : tile.x_sqnorm[row];
  const T closest = plain.closest;
  const T offset = (T)((double)scale2 * (double)closest - from.lse * LOG2_E);
  const T constant = from.grad_lse - from.grad_entropy * from.entropy;
  const T slope = -from.grad_entropy * T(LN_2);
  const T grad_sum = from.grad_sum;
  const T factor = (metric == Metric::sqeuclidean ? T(2) : T(1)) * tile.scale;
  double row_sum = 0, product = 0;
  for_chunks<masked>(tile, row, plain.gaps, [&](int64_t begin, int width, auto counting) {
    T* values = row_values + begin;
    const T* ys = is_dot ? nullptr : tile.y_sqnorm + begin;
    const T* high = by_columns ? columns.lse2_high + begin : nullptr;
    const T* low = by_columns ? columns.lse2_low + begin : nullptr;
    const T* grad_lse = by_columns ? columns.grad_lse + begin : nullptr;
    T part = 0, part_product = 0;
#pragma omp simd reduction(+ : part, part_product)
    for (int l = 0; l < width; ++l) {
      const int counts = counting(l);
      T value = is_dot ? values[l] : xs + ys[l] - T(2) * values[l];
      value = counts ? value : T(1);  // a masked pair may be NaN
      const T distance = metric == Metric::l2 ? square_root(value) : value;
      const T closeness = is_dot ? value : -distance;
      const T difference = closeness - closest;
      const T u = scale2 * (difference > T(0) ? T(0) : difference) + offset;  // log2 p
      T g = exp2_flushed(u) * (constant + slope * u) + grad_sum;
      if (by_columns) {
        const T v = (scale2 * closeness - high[l]) - low[l];
        g += grad_lse[l] * exp2_flushed(v > T(0) ? T(0) : v);
      }
      g = counts ? g : T(0);
      const T w = flush_denormal(metric == Metric::l2 ? factor * g / distance : factor * g);
      part_product += g * closeness;
      part += w;
      values[l] = w;
    }
    row_sum += (double)part;
    product += (double)part_product;
  });
  grad.row_sum[row] += row_sum;
  grad.score_product[row] += product * (double)tile.scale;
}

}  // namespace
}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast

// Maths: row losses a softplus(lse - positive) + b entropy and their pair weights at once, for a
// tile
//   that holds all columns of its rows. With p = 2^(t - lse2), the gradient by a score is
//   p (g_lse - b (log p + entropy)), g_lse = a σ(lse - positive). Where b = 0 it is the exponential
//   2^(t - max) up to a factor of the row that is known when the row has been summed: one
//   exponential per score, else two. Rows with a near pair or something infinite go the long way of
//   distance_softmax.cpp: scores, state, weights.
// Tiling: as in distance_softmax.cpp; the GEMM's block of whole rows is sized for the last cache.
// Memory: one row at a time goes through the first two caches three times: closest pair, weights,
//   common factor with column sums.
// Numerics: as in distance_softmax.cpp; scores are differences from the closest pair before they
// are
//   scaled, so that large scores lose nothing.
#include "cpu/distance_softmax.h"

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
  double weight_sum;  // Σ_j of the weights left in the tile, without their common factor
};

// Runs visit(begin, end) over the columns between the gaps, at most SUM_CHUNK of them at a time.
template <typename Visit>
FC_INLINE void for_spans(const Gaps& gaps, int64_t columns, const Visit& visit) {
  int64_t begin = 0;
  for (int g = 0; g <= gaps.count; ++g) {
    const int64_t end = g < gaps.count ? gaps.column[g] : columns;
    for (; begin < end; begin += SUM_CHUNK) visit(begin, smaller(begin + SUM_CHUNK, end));
    begin = end + 1;
  }
}

// Finds the closest pair. False where the row is not plain: then its scores have to be formed one
// by one. `widest_y`: the largest squared norm of a column.
template <Metric metric, bool masked, typename T>
FC_INLINE bool find_closest(const Tile<T>& tile, int64_t row, T widest_y, PlainRow<T>* out) {
  constexpr bool is_dot = metric == Metric::dot;
  const T* values = tile.values + row * tile.columns;
  const T scale2 = tile.scale * T(LOG2_E);
  const T xs = is_dot ? T(0) : tile.x_sqnorm[row];
  const T* ys = tile.y_sqnorm;
  const int32_t* ids = tile.column_ids;
  const int32_t row_id = masked ? tile.row_ids[row] : 0;
  const int same = tile.keep == Keep::same;
  const T fraction = near_fraction(T(0));
  out->gaps = gaps_of_row(tile, row);
  T least = T(INFINITY), most = T(-INFINITY);
  int plain = 1;
  for_spans(out->gaps, tile.columns, [&](int64_t begin, int64_t end) {
#pragma omp simd reduction(& : plain) reduction(min : least) reduction(max : most)
    for (int64_t j = begin; j < end; ++j) {
      const int counts = masked ? (ids[j] == row_id) == same : 1;
      T value = values[j];
      int good = 1;
      if (!is_dot) {
        const T norms = xs + ys[j];
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

// Sums a plain row, with one exponential per score. In place of the dot products it leaves the
// weights up to the factor g_lse / Σ_j 2^(t_j - max), or, where the row has an entropy as well and
// there is no such factor, u = t - max.
template <Metric metric, bool masked, bool has_entropy, typename T>
FC_INLINE void sum_row(const Tile<T>& tile, int64_t row, PlainRow<T>* out) {
  constexpr bool is_dot = metric == Metric::dot;
  T* values = tile.values + row * tile.columns;
  const T scale2 = tile.scale * T(LOG2_E);
  const T xs = is_dot ? T(0) : tile.x_sqnorm[row];
  const T* ys = tile.y_sqnorm;
  const int32_t* ids = tile.column_ids;
  const int32_t row_id = masked ? tile.row_ids[row] : 0;
  const int same = tile.keep == Keep::same;
  const T closest = out->closest, nothing = smallest_exponent(T(0)) - T(1);
  double sum = 0, weighted = 0, weight_sum = 0;
  for_spans(out->gaps, tile.columns, [&](int64_t begin, int64_t end) {
    T part = 0, part_weighted = 0, part_weight = 0;
#pragma omp simd reduction(+ : part, part_weighted, part_weight)
    for (int64_t j = begin; j < end; ++j) {
      const T value = is_dot ? values[j] : xs + ys[j] - T(2) * values[j];
      const T distance = metric == Metric::l2 ? square_root(value) : value;
      // The difference is taken before it is scaled, because t itself may be large.
      const T difference = (is_dot ? value : -distance) - closest;
      T u = scale2 * (difference > T(0) ? T(0) : difference);
      if (masked) u = (ids[j] == row_id) == same ? u : nothing;
      const T e = exp2_flushed(u);
      const T w = metric == Metric::l2 ? e / distance : e;
      part += e;
      part_weighted += e * u;
      part_weight += has_entropy ? T(0) : w;
      values[j] = has_entropy ? u : w;
    }
    sum += (double)part;
    weighted += (double)part_weighted;
    weight_sum += (double)part_weight;
  });
  for (int g = 0; g < out->gaps.count; ++g) {
    values[out->gaps.column[g]] = has_entropy ? nothing : T(0);
  }
  out->state = SoftmaxState{(double)scale2 * (double)closest, sum, weighted};
  out->weight_sum = weight_sum;
}

// Multiplies the weights of a plain row by their common factor and adds them to the sums (or null).
template <Metric metric, typename T>
FC_INLINE void scale_row(const Tile<T>& tile, const TileGradient<T>& grad, int64_t row,
                         const PlainRow<T>& plain, T grad_lse, T* sums) {
  T* weights = tile.values + row * tile.columns;
  const double g = (double)grad_lse / plain.state.sum;
  const double full = (metric == Metric::sqeuclidean ? 2 : 1) * g * (double)tile.scale;
  const T factor = (T)full;
  if (sums) {
#pragma omp simd
    for (int64_t j = 0; j < tile.columns; ++j) {
      weights[j] = flush_denormal(factor * weights[j]);
      sums[j] += weights[j];
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < tile.columns; ++j) weights[j] = flush_denormal(factor * weights[j]);
  }
  grad.row_sum[row] += full * plain.weight_sum;
  grad.score_product[row] += g * LN_2 * (plain.state.max * plain.state.sum + plain.state.weighted);
}

// Weights of a plain row with an entropy, from its u: p (g_lse - b (log p + entropy)) is 2^u times
// a linear function of u.
template <Metric metric, typename T>
FC_INLINE void weigh_entropy_row(const Tile<T>& tile, const TileGradient<T>& grad, int64_t row,
                                 const PlainRow<T>& plain, T grad_lse, T grad_entropy, T* sums) {
  T* values = tile.values + row * tile.columns;
  const SoftmaxState state = plain.state;
  const T step = T(1) / (tile.scale * T(LOG2_E));
  const T factor = (metric == Metric::sqeuclidean ? T(2) : T(1)) * tile.scale;
  const double b = (double)grad_entropy;
  const double log_p_of_max = -log2(state.sum) * LN_2;
  const T constant = (T)(((double)grad_lse - b * (log_p_of_max + entropy(state))) / state.sum);
  const T slope = (T)(-b * LN_2 / state.sum);
  double row_sum = 0, product = 0;
  for_spans(Gaps{{0, 0}, 0}, tile.columns, [&](int64_t begin, int64_t end) {
    T part = 0, part_product = 0;
#pragma omp simd reduction(+ : part, part_product)
    for (int64_t j = begin; j < end; ++j) {
      const T u = values[j];
      const T g = exp2_flushed(u) * (constant + slope * u);
      const T distance = metric == Metric::l2 ? -(plain.closest + step * u) : T(1);
      const T w = flush_denormal(metric == Metric::l2 ? factor * g / distance : factor * g);
      part += w;
      part_product += g * u;
      values[j] = w;
    }
    row_sum += (double)part;
    product += (double)part_product;
  });
  grad.row_sum[row] += row_sum;
  // Σ_j g is g_lse: the derivative of an entropy does not depend on a constant added to the scores.
  grad.score_product[row] += LN_2 * (product + state.max * (double)grad_lse);
  if (sums) add_to_column_sums(tile, row, sums);
}

// Loss of a row, and the derivative of its cross-entropy by lse; the positive goes to the list.
template <Metric metric, typename T>
FC_INLINE bool row_loss(const Tile<T>& tile, const RowLoss<T>& rows, const TileGradient<T>& grad,
                        int64_t row, SoftmaxState state, T* grad_lse, NearPairs<T>* pairs) {
  const double a = rows.cross_entropy_weight ? (double)rows.cross_entropy_weight[row] : 0.0;
  const double b = rows.entropy_weight ? (double)rows.entropy_weight[row] : 0.0;
  double loss = b == 0.0 ? 0.0 : b * entropy(state);
  bool stored = true;
  *grad_lse = T(0);
  if (a != 0.0) {
    const int64_t column = tile.exclude[row * tile.exclude_count];
    const T t = direct_score<metric>(tile, row, column);
    const double positive = (double)t * LN_2;
    // softplus(lse - positive) and its derivative, by the exponential that does not overflow.
    const double x = log_sum_exp(state) - positive;
    const double e = exp(x > 0 ? -x : x);
    const double sigmoid = (x > 0 ? 1.0 : e) / (1.0 + e);
    loss += a * ((x > 0 ? x : 0.0) + log1p(e));
    *grad_lse = (T)(a * sigmoid);
    const T weight = pair_weight<metric>(-*grad_lse, t, tile.scale, tile.scale * T(LOG2_E));
    if (weight != T(0)) stored = append(pairs, NearPair<T>{row, column, weight});
    grad.score_product[row] -= (double)*grad_lse * positive;
  }
  rows.loss[row] = (T)loss;
  return stored;
}

template <Metric metric, bool masked, typename T>
bool loss(const Tile<T>& tile, const RowLoss<T>& rows, const TileGradient<T>& grad) {
  bool failed = false;  // written by any thread, never back to false
  T widest_y = T(0);
  if (metric != Metric::dot) {
    for (int64_t j = 0; j < tile.columns; ++j) {  // NaN stays
      widest_y = tile.y_sqnorm[j] <= widest_y ? widest_y : tile.y_sqnorm[j];
    }
  }
  const bool allocated =
      weigh_rows<metric>(tile, grad, [&](int64_t row, uint8_t* near, NearPairs<T>* pairs, T* sums) {
        T grad_lse;
        bool stored;
        PlainRow<T> plain;
        const T b = rows.entropy_weight ? rows.entropy_weight[row] : T(0);
        if (find_closest<metric, masked>(tile, row, widest_y, &plain)) {
          if (b == T(0)) {
            sum_row<metric, masked, false>(tile, row, &plain);
            stored = row_loss<metric>(tile, rows, grad, row, plain.state, &grad_lse, pairs);
            scale_row<metric>(tile, grad, row, plain, grad_lse, sums);
          } else {
            sum_row<metric, masked, true>(tile, row, &plain);
            stored = row_loss<metric>(tile, rows, grad, row, plain.state, &grad_lse, pairs);
            weigh_entropy_row<metric>(tile, grad, row, plain, grad_lse, b, sums);
          }
        } else {
          const bool any_near = score_row<metric, masked>(tile, row, near);
          const SoftmaxState state = row_state(tile, row);
          stored = row_loss<metric>(tile, rows, grad, row, state, &grad_lse, pairs);
          RowGradient<T> from;
          from.lse = log_sum_exp(state);
          from.entropy = (T)entropy(state);
          from.grad_lse = grad_lse;
          from.grad_entropy = b;
          from.grad_sum = T(0);
          weigh_row<metric>(tile, grad, row, from, any_near ? near : nullptr, pairs);
          if (sums) add_to_column_sums(tile, row, sums);
        }
        if (!stored) {
#pragma omp atomic write
          failed = true;
        }
      });
  return allocated && !failed;
}

}  // namespace

bool softmax_loss(const Tile<float>& tile, const RowLoss<float>& rows,
                  const TileGradient<float>& grad) {
  FASTCONTRAST_FOR_METRIC(loss, tile, rows, grad);
}
bool softmax_loss(const Tile<double>& tile, const RowLoss<double>& rows,
                  const TileGradient<double>& grad) {
  FASTCONTRAST_FOR_METRIC(loss, tile, rows, grad);
}

}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast

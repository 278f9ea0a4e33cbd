// Maths: row losses a softplus(lse - positive) + b entropy and their pair weights at once, for a
//   tile that holds all columns of its rows. With p = 2^(t - lse2), the gradient by a score is
//   p (g_lse - b (log p + entropy)), g_lse = a σ(lse - positive). Where b = 0 it is the exponential
//   2^(t - max) up to a factor of the row that is known when the row has been summed: one
//   exponential per score, else two. Rows with a near pair or something infinite go the long way of
//   distance_softmax.cpp: scores, state, weights.
// Tiling: as in distance_softmax.cpp; the GEMM's block of whole rows is sized for the last cache.
// Memory: one row at a time goes through the first two caches three times: closest pair, weights,
//   common factor with column sums.
// Numerics: as in distance_softmax.cpp; scores are differences from the closest pair before they
//   are scaled, so that large scores lose nothing.
#include "cpu/distance_softmax.h"

#include <stdlib.h>
#include <string.h>

#include "common/online_softmax.h"
#include "cpu/centring.h"
#include "cpu/plain_rows.h"
#include "cpu/score_rows.h"
#include "cpu/small_products.h"
#include "cpu/weigh_rows.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

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
  const T widest_y = widest_column<metric>(tile);
  const bool allocated =
      weigh_rows<metric>(tile, grad, [&](int64_t row, uint8_t* near, NearPairs<T>* pairs, T* sums) {
        const T b = rows.entropy_weight ? rows.entropy_weight[row] : T(0);
        bool stored;
        T grad_lse;
        PlainRow<T> plain;
        const bool is_plain = find_closest<metric, masked>(tile, row, widest_y, &plain);
        if (is_plain && b == T(0)) {
          sum_row<metric, masked, Leave::weights, false>(tile, row, T(0), &plain);
          stored = row_loss<metric>(tile, rows, grad, row, plain.state, &grad_lse, pairs);
          scale_row<metric>(tile, grad, row, plain, grad_lse, sums);
        } else {
          bool any_near = false;
          if (is_plain) {
            sum_row<metric, masked, Leave::products, false>(tile, row, T(0), &plain);
          } else {
            any_near = score_row<metric, masked>(tile, row, near);
            plain.state = row_state(tile, row);
          }
          stored = row_loss<metric>(tile, rows, grad, row, plain.state, &grad_lse, pairs);
          const RowGradient<T> from{log_sum_exp(plain.state), (T)entropy(plain.state), grad_lse, b,
                                    T(0)};
          if (is_plain) {
            weigh_plain_row<metric, masked, false>(tile, grad, row, plain, from, {});
          } else {
            weigh_row<metric, false>(tile, grad, row, from, {}, any_near ? near : nullptr, pairs);
          }
          if (sums) add_to_column_sums(tile, row, sums);
        }
        if (!stored) {
#pragma omp atomic write
          failed = true;
        }
      });
  return allocated && !failed;
}

template <typename T>
bool any_loss(const Tile<T>& tile, const RowLoss<T>& rows, const TileGradient<T>& grad) {
  FASTCONTRAST_FOR_METRIC(loss, tile, rows, grad);
}

template <typename T>
bool small_loss(const SmallLoss<T>& call) {
  Tile<T> tile = call.tile;
  const int64_t m = tile.rows, n = tile.columns, dim = tile.dim;
  const bool centred = tile.metric != Metric::dot;
  // In one piece: scores, a panel, mean, centred points and their norms.
  const int64_t depth = dim > n ? (dim > m ? dim : m) : (n > m ? n : m);
  const int64_t points = (m + n) * dim;
  const int64_t size = m * n + panel_size<T>(depth) + (centred ? dim + points + m + n : 0);
  T* memory = (T*)malloc((size_t)size * sizeof(T));
  double* sums = (double*)calloc((size_t)(2 * m + n), sizeof(double));
  bool done = memory && sums;
  if (done) {
    T* panel = memory + m * n;
    const T *x = tile.x, *y = tile.y;
    tile.values = memory;
    tile.threads = 1;
    if (centred) {
      T *mean = panel + panel_size<T>(depth), *moved = mean + dim, *norms = moved + points;
      for (int64_t k = 0; k < dim; ++k) mean[k] = T(0);
      for (int64_t j = 0; j < n; ++j) {
#pragma omp simd
        for (int64_t k = 0; k < dim; ++k) mean[k] += y[j * dim + k];
      }
      for (int64_t k = 0; k < dim; ++k) mean[k] /= (T)n;
      center(x, mean, m, dim, 1, moved, norms);
      center(y, mean, n, dim, 1, moved + m * dim, norms + m);
      x = moved;
      y = moved + m * dim;
      tile.x_sqnorm = norms;
      tile.y_sqnorm = norms + m;
    }
    memset(memory, 0, (size_t)(m * n) * sizeof(T));
    add_product<T>({x, dim, 1}, {y, 1, dim}, tile.values, m, dim, n, panel);
    TileGradient<T> grad{};
    grad.row_sum = sums;
    grad.score_product = sums + m;
    grad.column_sum = centred && call.grad_y ? sums + 2 * m : nullptr;
    grad.grad_x = call.grad_x;
    grad.grad_y = call.grad_y;
    done = any_loss(tile, call.rows, grad);
    if (call.grad_x) {
      add_product<T>({tile.values, n, 1}, {y, dim, 1}, call.grad_x, m, n, dim, panel);
      if (centred) subtract_scaled(x, sums, m, dim, 1, call.grad_x);
    }
    if (call.grad_y) {
      add_product<T>({tile.values, 1, n}, {x, dim, 1}, call.grad_y, n, m, dim, panel);
      if (centred) subtract_scaled(y, sums + 2 * m, n, dim, 1, call.grad_y);
    }
    if (call.grad_scale) {
      double total = 0;
      for (int64_t i = 0; i < m; ++i) total += sums[m + i];
      *call.grad_scale = (T)(total / (double)tile.scale);
    }
  }
  free(memory);
  free(sums);
  return done;
}

}  // namespace

bool small_softmax_loss(const SmallLoss<float>& call) { return small_loss(call); }
bool small_softmax_loss(const SmallLoss<double>& call) { return small_loss(call); }
bool softmax_loss(const Tile<float>& tile, const RowLoss<float>& rows,
                  const TileGradient<float>& grad) {
  return any_loss(tile, rows, grad);
}
bool softmax_loss(const Tile<double>& tile, const RowLoss<double>& rows,
                  const TileGradient<double>& grad) {
  return any_loss(tile, rows, grad);
}

}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast

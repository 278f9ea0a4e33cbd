// Maths: per row i of a tile, t_ij = s_ij·log2(e) from dot products (common/scores.h), then
//   forward:  max, Σ 2^(t-max), Σ 2^(t-max)(t-max), on request Σ s and #{s > threshold};
//   backward: p = 2^(t - lse2), g = p (g_lse - g_entropy (log p + entropy)) + g_sum,
//             pair weight c = g ∂s/∂x / (y-x), or g ∂s/∂x / y for Metric::dot.
// Tiling: the caller hands over a tile that its GEMM has just written; a thread owns whole rows,
// and
//   in the column sums whole columns, in fixed order: results do not depend on the thread count.
// Memory: one row of the tile at a time goes through L1; the tile is read and written once.
// Numerics: sums of up to 256 scores in T, beyond in double. Columns that do not count are -inf
//   before the maximum. Near pairs are recomputed by direct difference (near_pairs.h). Nothing
//   denormal is stored.
#include "cpu/distance_softmax.h"

#include "common/online_softmax.h"
#include "cpu/score_rows.h"
#include "cpu/weigh_rows.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

// Folds the scores of a row into its statistics.
template <bool masked, typename T>
FC_INLINE void reduce_row(const Tile<T>& tile, const RowStatistics<T>& out, int64_t row) {
  const T* t = tile.values + row * tile.columns;
  double* state = out.state + 4 * row;
  const SoftmaxState before =
      out.first ? empty_state() : SoftmaxState{state[0], state[1], state[2]};
  const SoftmaxState now = merge(before, row_state(tile, row));
  if (out.score_sum) {
    double total = 0;
    int64_t finite = 0;
    for (int64_t j = 0; j < tile.columns; ++j) {
      const bool is_finite = t[j] != T(-INFINITY);
      total += is_finite ? (double)t[j] : 0.0;
      finite += is_finite;
    }
    const int64_t count = counted_columns<masked>(tile, row);
    if (finite < count) total = -INFINITY;  // a column that counts and is infinitely far
    state[3] = (out.first ? 0.0 : state[3]) + total;
    out.count[row] = (out.first ? 0 : out.count[row]) + count;
    if (out.last) out.score_sum[row] = (T)(state[3] * LN_2);
  }
  if (out.rank) {
    const T threshold = out.threshold[row] * T(LOG2_E);
    int64_t above = 0;
#pragma omp simd reduction(+ : above)
    for (int64_t j = 0; j < tile.columns; ++j) above += t[j] > threshold;
    out.rank[row] = (out.first ? 0 : out.rank[row]) + above;
  }
  if (out.last) {
    const double lse = log_sum_exp(now);
    out.lse[row] = (T)lse;
    out.lse_residual[row] = lse == -INFINITY ? T(0) : (T)(lse - (double)(T)lse);
    out.entropy[row] = (T)entropy(now);
  } else {
    state[0] = now.max;
    state[1] = now.sum;
    state[2] = now.weighted;
  }
}

template <Metric metric, bool masked, typename T>
void forward(const Tile<T>& tile, const RowStatistics<T>& out) {
#pragma omp parallel for num_threads(tile.threads) if (tile.threads > 1) schedule(static)
  for (int64_t row = 0; row < tile.rows; ++row) {
    score_row<metric, masked>(tile, row, nullptr);
    reduce_row<masked>(tile, out, row);
  }
}

template <Metric metric, bool masked, typename T>
bool backward(const Tile<T>& tile, const RowGradients<T>& rows, const TileGradient<T>& grad) {
  return weigh_rows<metric>(
      tile, grad, [&](int64_t row, uint8_t* near, NearPairs<T>* pairs, T* sums) {
        const bool any_near = score_row<metric, masked>(tile, row, near);
        RowGradient<T> from;
        from.lse = (double)rows.lse[row] + (double)rows.lse_residual[row];
        from.entropy = rows.entropy[row];
        from.grad_lse = rows.grad_lse ? rows.grad_lse[row] : T(0);
        from.grad_entropy = rows.grad_entropy ? rows.grad_entropy[row] : T(0);
        from.grad_sum = rows.grad_sum ? rows.grad_sum[row] : T(0);
        weigh_row<metric>(tile, grad, row, from, any_near ? near : nullptr, pairs);
        if (sums) add_to_column_sums(tile, row, sums);
      });
}

template <typename T>
void center(const T* x, const T* mean, int64_t rows, int64_t dim, int threads, T* out, T* sqnorm) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * dim;
    T* to = out + row * dim;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < dim; ++k) {
      const T m = mean[k];
      const T value = from[k] - (m - m == T(0) ? m : T(0));  // inf and NaN: m - m is NaN
      to[k] = value;
      sum += value * value;
    }
    sqnorm[row] = sum;
  }
}

template <typename T>
void subtract_scaled(const T* points, const double* sums, int64_t rows, int64_t dim, int threads,
                     T* grad) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const T sum = (T)sums[row];
#pragma omp simd
    for (int64_t k = 0; k < dim; ++k) grad[row * dim + k] -= sum * points[row * dim + k];
  }
}

}  // namespace

void distance_softmax_forward(const Tile<float>& tile, const RowStatistics<float>& out) {
  FASTCONTRAST_FOR_METRIC(forward, tile, out);
}
void distance_softmax_forward(const Tile<double>& tile, const RowStatistics<double>& out) {
  FASTCONTRAST_FOR_METRIC(forward, tile, out);
}
bool distance_softmax_backward(const Tile<float>& tile, const RowGradients<float>& rows,
                               const TileGradient<float>& grad) {
  FASTCONTRAST_FOR_METRIC(backward, tile, rows, grad);
}
bool distance_softmax_backward(const Tile<double>& tile, const RowGradients<double>& rows,
                               const TileGradient<double>& grad) {
  FASTCONTRAST_FOR_METRIC(backward, tile, rows, grad);
}
void center_rows(const float* x, const float* mean, int64_t rows, int64_t dim, int threads,
                 float* out, float* sqnorm) {
  center(x, mean, rows, dim, threads, out, sqnorm);
}
void center_rows(const double* x, const double* mean, int64_t rows, int64_t dim, int threads,
                 double* out, double* sqnorm) {
  center(x, mean, rows, dim, threads, out, sqnorm);
}
void subtract_scaled_rows(const float* points, const double* sums, int64_t rows, int64_t dim,
                          int threads, float* grad) {
  subtract_scaled(points, sums, rows, dim, threads, grad);
}
void subtract_scaled_rows(const double* points, const double* sums, int64_t rows, int64_t dim,
                          int threads, double* grad) {
  subtract_scaled(points, sums, rows, dim, threads, grad);
}
}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast

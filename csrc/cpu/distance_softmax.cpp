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

#include <stdlib.h>

#include "common/online_softmax.h"
#include "cpu/centring.h"
#include "cpu/plain_rows.h"
#include "cpu/score_rows.h"
#include "cpu/weigh_rows.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

// What a row of the tile adds to its statistics.
struct RowPart {
  SoftmaxState state;
  double score_sum;  // Σ t, of the columns that count
  int64_t above;     // #{t > threshold}
};

template <Metric metric, bool masked, Leave leave, typename T>
FC_INLINE RowPart sum_plain_row(const Tile<T>& tile, const RowStatistics<T>& out, int64_t row,
                                PlainRow<T> plain) {
  if (out.rank || out.score_sum) {
    const T threshold = out.rank ? out.threshold[row] * T(LOG2_E) : T(0);
    sum_row<metric, masked, leave, true>(tile, row, threshold, &plain);
  } else {
    sum_row<metric, masked, leave, false>(tile, row, T(0), &plain);
  }
  return RowPart{plain.state, plain.score_sum, plain.above};
}

// The same from the scores of a row.
template <bool masked, typename T>
FC_INLINE RowPart sum_scores(const Tile<T>& tile, const RowStatistics<T>& out, int64_t row) {
  const T* t = tile.values + row * tile.columns;
  RowPart part{row_state(tile, row), 0.0, 0};
  if (out.score_sum) {
    int64_t finite = 0;
    for (int64_t j = 0; j < tile.columns; ++j) {
      const bool is_finite = t[j] != T(-INFINITY);
      part.score_sum += is_finite ? (double)t[j] : 0.0;
      finite += is_finite;
    }
    // A column that counts and is infinitely far.
    if (finite < counted_columns<masked>(tile, row)) part.score_sum = -INFINITY;
  }
  if (out.rank) {
    const T threshold = out.threshold[row] * T(LOG2_E);
    for (int64_t j = 0; j < tile.columns; ++j) part.above += t[j] > threshold;
  }
  return part;
}

template <bool masked, typename T>
FC_INLINE void merge_row(const Tile<T>& tile, const RowStatistics<T>& out, int64_t row,
                         RowPart part) {
  double* state = out.state + 4 * row;
  const SoftmaxState before =
      out.first ? empty_state() : SoftmaxState{state[0], state[1], state[2]};
  const SoftmaxState now = merge(before, part.state);
  if (out.score_sum) {
    state[3] = (out.first ? 0.0 : state[3]) + part.score_sum;
    out.count[row] = (out.first ? 0 : out.count[row]) + counted_columns<masked>(tile, row);
    if (out.last) out.score_sum[row] = (T)(state[3] * LN_2);
  }
  if (out.rank) out.rank[row] = (out.first ? 0 : out.rank[row]) + part.above;
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

template <Metric metric, bool masked, Leave leave, typename T>
FC_INLINE void forward_row(const Tile<T>& tile, const RowStatistics<T>& out, int64_t row,
                           T widest_y) {
  PlainRow<T> plain;
  if (find_closest<metric, masked>(tile, row, widest_y, &plain)) {
    merge_row<masked>(tile, out, row, sum_plain_row<metric, masked, leave>(tile, out, row, plain));
  } else {
    score_row<metric, masked>(tile, row, nullptr);
    merge_row<masked>(tile, out, row, sum_scores<masked>(tile, out, row));
  }
}

// Rows whose scores are reduced by columns together, while they are in the second cache.
constexpr int64_t COLUMN_GROUP = 64;
constexpr int64_t COLUMN_CHUNK = 256;

// Largest score of every column over rows [begin, end), and Σ 2^(t - max).
template <typename T>
void reduce_columns(const Tile<T>& tile, int64_t begin, int64_t end, T* max, T* sum) {
  for (int64_t first = 0; first < tile.columns; first += COLUMN_CHUNK) {
    const int64_t width = smaller(COLUMN_CHUNK, tile.columns - first);
    T most[COLUMN_CHUNK], part[COLUMN_CHUNK];
    for (int64_t j = 0; j < width; ++j) {
      most[j] = T(-INFINITY);
      part[j] = T(0);
    }
    for (int64_t row = begin; row < end; ++row) {
      const T* t = tile.values + row * tile.columns + first;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) most[j] = t[j] > most[j] ? t[j] : most[j];
    }
    for (int64_t row = begin; row < end; ++row) {
      const T* t = tile.values + row * tile.columns + first;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        // Nothing counts: any finite base. A score of +inf: its difference from itself is 0.
        const T base = most[j] == T(-INFINITY) ? T(0) : most[j];
        part[j] += exp2_flushed(t[j] == base ? T(0) : t[j] - base);
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      max[first + j] = most[j];
      sum[first + j] = part[j];
    }
  }
}

// Merges the groups' column states, in order, into those carried between tiles.
template <typename T>
void merge_columns(const Tile<T>& tile, const RowStatistics<T>& out, int64_t groups, const T* max,
                   const T* sum) {
#pragma omp parallel for num_threads(tile.threads) if (tile.threads > 1) schedule(static)
  for (int64_t j = 0; j < tile.columns; ++j) {
    T total_max = out.column_max[j];
    double total = out.column_sum[j];
    for (int64_t g = 0; g < groups; ++g) {
      const T other = max[g * tile.columns + j];
      const double part = (double)sum[g * tile.columns + j];
      const T most = other > total_max ? other : total_max;
      const T low = other > total_max ? total_max : other;
      const T factor = low == most ? T(1) : exp2_flushed(low - most);
      total = other > total_max ? (double)factor * total + part : total + (double)factor * part;
      total_max = most;
    }
    out.column_max[j] = total_max;
    out.column_sum[j] = total;
  }
}

template <Metric metric, bool masked, typename T>
bool forward_with_columns(const Tile<T>& tile, const RowStatistics<T>& out, T widest_y) {
  const int64_t groups = (tile.rows + COLUMN_GROUP - 1) / COLUMN_GROUP;
  T* states = (T*)malloc((size_t)(2 * groups * tile.columns) * sizeof(T));
  if (!states) return false;
  T* sums = states + groups * tile.columns;
#pragma omp parallel for num_threads(tile.threads) if (tile.threads > 1) schedule(static)
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * COLUMN_GROUP, end = smaller(begin + COLUMN_GROUP, tile.rows);
    for (int64_t row = begin; row < end; ++row) {
      forward_row<metric, masked, Leave::scores>(tile, out, row, widest_y);
    }
    reduce_columns(tile, begin, end, states + g * tile.columns, sums + g * tile.columns);
  }
  merge_columns(tile, out, groups, states, sums);
  free(states);
  return true;
}

template <Metric metric, bool masked, typename T>
bool forward(const Tile<T>& tile, const RowStatistics<T>& out) {
  const T widest_y = widest_column<metric>(tile);
  if (out.column_max) return forward_with_columns<metric, masked>(tile, out, widest_y);
#pragma omp parallel for num_threads(tile.threads) if (tile.threads > 1) schedule(static)
  for (int64_t row = 0; row < tile.rows; ++row) {
    forward_row<metric, masked, Leave::products>(tile, out, row, widest_y);
  }
  return true;
}

template <Metric metric, bool masked, bool by_columns, typename T>
bool weigh(const Tile<T>& tile, const RowGradients<T>& rows, const ColumnGradients<T>& columns,
           const TileGradient<T>& grad) {
  const T widest_y = widest_column<metric>(tile);
  return weigh_rows<metric>(
      tile, grad, [&](int64_t row, uint8_t* near, NearPairs<T>* pairs, T* sums) {
        const RowGradient<T> from{(double)rows.lse[row] + (double)rows.lse_residual[row],
                                  rows.entropy[row], rows.grad_lse ? rows.grad_lse[row] : T(0),
                                  rows.grad_entropy ? rows.grad_entropy[row] : T(0),
                                  rows.grad_sum ? rows.grad_sum[row] : T(0)};
        PlainRow<T> plain;
        if (find_closest<metric, masked>(tile, row, widest_y, &plain)) {
          weigh_plain_row<metric, masked, by_columns>(tile, grad, row, plain, from, columns);
        } else {
          const bool any_near = score_row<metric, masked>(tile, row, near);
          weigh_row<metric, by_columns>(tile, grad, row, from, columns, any_near ? near : nullptr,
                                        pairs);
        }
        if (sums) add_to_column_sums(tile, row, sums);
      });
}

template <Metric metric, bool masked, typename T>
bool backward(const Tile<T>& tile, const RowGradients<T>& rows, const ColumnGradients<T>& columns,
              const TileGradient<T>& grad) {
  return columns.grad_lse ? weigh<metric, masked, true>(tile, rows, columns, grad)
                          : weigh<metric, masked, false>(tile, rows, columns, grad);
}

}  // namespace

bool distance_softmax_forward(const Tile<float>& tile, const RowStatistics<float>& out) {
  FASTCONTRAST_FOR_METRIC(forward, tile, out);
}
bool distance_softmax_forward(const Tile<double>& tile, const RowStatistics<double>& out) {
  FASTCONTRAST_FOR_METRIC(forward, tile, out);
}
bool distance_softmax_backward(const Tile<float>& tile, const RowGradients<float>& rows,
                               const ColumnGradients<float>& columns,
                               const TileGradient<float>& grad) {
  FASTCONTRAST_FOR_METRIC(backward, tile, rows, columns, grad);
}
bool distance_softmax_backward(const Tile<double>& tile, const RowGradients<double>& rows,
                               const ColumnGradients<double>& columns,
                               const TileGradient<double>& grad) {
  FASTCONTRAST_FOR_METRIC(backward, tile, rows, columns, grad);
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

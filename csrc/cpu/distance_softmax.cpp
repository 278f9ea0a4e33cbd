// Maths: per row i of a tile, t_ij = s_ij·log2(e) from dot products (common/scores.h), then
//   forward:  max, Σ 2^(t-max), Σ 2^(t-max)(t-max), on request Σ s and #{s > threshold};
//   backward: p = 2^(t - lse2), g = p (g_lse - g_entropy (log p + entropy)) + g_sum,
//             pair weight c = g ∂s/∂x / (y-x), or g ∂s/∂x / y for Metric::dot.
//   loss:     both at once for a tile that holds all columns of its rows, with
//             g_lse = a σ(lse - positive), g_entropy = b of Σ a softplus(lse - positive) + b
//             entropy.
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
#include "cpu/near_pairs.h"
#include "cpu/score_rows.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

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

// What the pair weights of a row follow from.
template <typename T>
struct RowGradient {
  double lse;  // in full: rounded to float it would be off by |lse|·eps, and every p by that factor
  T entropy, grad_lse, grad_entropy, grad_sum;
};

// Overwrites the scores of a row with its pair weights; near pairs go to the list. `near` (or null
// when there are none): flags of the near pairs.
template <Metric metric, typename T>
FC_INLINE void weigh_row(const Tile<T>& tile, const TileGradient<T>& grad, int64_t row,
                         const RowGradient<T>& from, const uint8_t* near, NearPairs<T>* pairs) {
  T* t = tile.values + row * tile.columns;
  const T scale2 = tile.scale * T(LOG2_E);
  const T gl = from.grad_lse, gh = from.grad_entropy, gs = from.grad_sum;
  const double lse2 = from.lse == -INFINITY ? 0.0 : from.lse * LOG2_E;
  const T lse2_high = (T)lse2;
  const T lse2_low = (T)(lse2 - (double)lse2_high);
  const T entropy = from.entropy;
  const T floor = smallest_exponent(T(0));
  double row_sum = 0, score_product = 0;
  for (int64_t begin = 0; begin < tile.columns; begin += SUM_CHUNK) {
    const int64_t end = smaller(begin + SUM_CHUNK, tile.columns);
    T part = 0, part_product = 0;
#pragma omp simd reduction(+ : part, part_product)
    for (int64_t j = begin; j < end; ++j) {
      const T score = t[j];
      const T s = score * T(LN_2);
      const T u = (score - lse2_high) - lse2_low;  // log2 p
      const T log_p = (u < floor ? floor : u) * T(LN_2);
      const T g = exp2_flushed(u) * (gl - gh * (log_p + entropy)) + gs;
      const bool counts = score != T(-INFINITY);
      const T w = counts ? flush_denormal(pair_weight<metric>(g, score, tile.scale, scale2)) : T(0);
      part_product += counts ? g * s : T(0);
      part += w;
      t[j] = w;
    }
    row_sum += (double)part;
    score_product += (double)part_product;
  }
  grad.score_product[row] += score_product;
  if (near) {
    for (int64_t j = 0; j < tile.columns; ++j) {
      if (!near[j] || t[j] == T(0)) continue;
      // Out of memory keeps the pair in the GEMM: less exact, never wrong.
      if (append(pairs, NearPair<T>{row, j, t[j]})) t[j] = T(0);
    }
    // Summed again, not subtracted: 1/d of a near pair would drown the rest.
    row_sum = 0;
    for (int64_t j = 0; j < tile.columns; ++j) row_sum += (double)t[j];
  }
  grad.row_sum[row] += row_sum;
}

// Sums of columns run in T over this many rows and in double from there.
constexpr int64_t SUM_ROWS = 32;

template <typename T>
void add_column_sums(const Tile<T>& tile, double* column_sum) {
  constexpr int64_t CHUNK = 256;
  const int64_t chunks = (tile.columns + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(tile.threads) if (tile.threads > 1) schedule(static)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = c * CHUNK;
    const int64_t width = smaller(CHUNK, tile.columns - first);
    for (int64_t begin = 0; begin < tile.rows; begin += SUM_ROWS) {
      T sum[CHUNK] = {0};
      for (int64_t row = begin; row < smaller(begin + SUM_ROWS, tile.rows); ++row) {
        const T* weights = tile.values + row * tile.columns + first;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) sum[j] += weights[j];
      }
      for (int64_t j = 0; j < width; ++j) column_sum[first + j] += (double)sum[j];
    }
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

// Runs visit_row(row, near flags, list of near pairs) over all rows, then sums columns and applies
// the near pairs. False when memory for the lists could not be had; nothing was computed then.
template <Metric metric, typename T, typename Visit>
bool weigh_rows(const Tile<T>& tile, const TileGradient<T>& grad, const Visit& visit_row) {
  const int runs = tile.threads > 1 ? tile.threads : 1;
  NearPairs<T>* lists = (NearPairs<T>*)calloc((size_t)runs, sizeof(NearPairs<T>));
  uint8_t* flags = (uint8_t*)malloc((size_t)runs * (size_t)(tile.columns + 1));
  const bool allocated = lists && flags;
  if (allocated) {
#pragma omp parallel for num_threads(runs) if (runs > 1) schedule(static)
    for (int run = 0; run < runs; ++run) {
      const int64_t end = run_begin(tile.rows, run + 1, runs);
      for (int64_t row = run_begin(tile.rows, run, runs); row < end; ++row) {
        visit_row(row, flags + run * tile.columns, lists + run);
      }
    }
    if (grad.column_sum) add_column_sums(tile, grad.column_sum);
    add_near_pairs<metric>(tile, grad, lists, runs);
    for (int run = 0; run < runs; ++run) free(lists[run].items);
  }
  free(lists);
  free(flags);
  return allocated;
}

template <Metric metric, bool masked, typename T>
bool backward(const Tile<T>& tile, const RowGradients<T>& rows, const TileGradient<T>& grad) {
  return weigh_rows<metric>(tile, grad, [&](int64_t row, uint8_t* near, NearPairs<T>* pairs) {
    const bool any_near = score_row<metric, masked>(tile, row, near);
    RowGradient<T> from;
    from.lse = (double)rows.lse[row] + (double)rows.lse_residual[row];
    from.entropy = rows.entropy[row];
    from.grad_lse = rows.grad_lse ? rows.grad_lse[row] : T(0);
    from.grad_entropy = rows.grad_entropy ? rows.grad_entropy[row] : T(0);
    from.grad_sum = rows.grad_sum ? rows.grad_sum[row] : T(0);
    weigh_row<metric>(tile, grad, row, from, any_near ? near : nullptr, pairs);
  });
}

template <Metric metric, bool masked, typename T>
bool loss(const Tile<T>& tile, const RowLoss<T>& rows, const TileGradient<T>& grad) {
  bool failed = false;  // written by any thread, never back to false
  const bool allocated =
      weigh_rows<metric>(tile, grad, [&](int64_t row, uint8_t* near, NearPairs<T>* pairs) {
        const bool any_near = score_row<metric, masked>(tile, row, near);
        const SoftmaxState state = row_state(tile, row);
        const double a = rows.cross_entropy_weight ? (double)rows.cross_entropy_weight[row] : 0.0;
        const double b = rows.entropy_weight ? (double)rows.entropy_weight[row] : 0.0;
        RowGradient<T> from;
        from.lse = log_sum_exp(state);
        const double row_entropy = entropy(state);
        from.entropy = (T)row_entropy;
        from.grad_entropy = (T)b;
        from.grad_lse = from.grad_sum = T(0);
        double cross_entropy = 0.0;
        if (a != 0.0) {
          const int64_t column = tile.exclude[row * tile.exclude_count];
          const T t = direct_score<metric>(tile, row, column);
          const double positive = (double)t * LN_2;
          // softplus(lse - positive) and its derivative, by the exponential that does not overflow.
          const double x = from.lse - positive;
          const double e = exp(x > 0 ? -x : x);
          const double sigmoid = (x > 0 ? 1.0 : e) / (1.0 + e);
          cross_entropy = a * ((x > 0 ? x : 0.0) + log1p(e));
          from.grad_lse = (T)(a * sigmoid);
          const T weight =
              pair_weight<metric>(-from.grad_lse, t, tile.scale, tile.scale * T(LOG2_E));
          if (weight != T(0) && !append(pairs, NearPair<T>{row, column, weight})) {
#pragma omp atomic write
            failed = true;
          }
          grad.score_product[row] -= (double)from.grad_lse * positive;
        }
        rows.loss[row] = (T)(cross_entropy + (b == 0.0 ? 0.0 : b * row_entropy));
        weigh_row<metric>(tile, grad, row, from, any_near ? near : nullptr, pairs);
      });
  return allocated && !failed;
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

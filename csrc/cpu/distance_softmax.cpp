// Maths: per row i of a tile, t_ij = s_ij·log2(e) from dot products (common/scores.h), then
//   forward:  max, Σ 2^(t-max), Σ 2^(t-max)(t-max), on request Σ s and #{s > threshold};
//   backward: p = 2^(t - lse2), g = p (g_lse - g_entropy (log p + entropy)) + g_sum,
//             w = g ∂s/∂x / (x-y).
// Tiling: the caller hands over a tile that its GEMM has just written; a thread owns whole rows,
// and
//   in the column sums whole columns, in fixed order: results do not depend on the thread count.
// Memory: one row of the tile at a time goes through L1; the tile is read and written once.
// Numerics: sums of up to 256 scores in T, beyond in double. Columns that do not count are -inf
//   before the maximum. Near pairs (NEAR_MULTIPLE) are recomputed by direct difference, and in the
//   backward pass their contribution is added directly, because w(x-y) taken as the difference of
//   two large products would lose it. Nothing denormal is stored.
#include "cpu/distance_softmax.h"

#include <stdlib.h>

#include "common/online_softmax.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

// Sums of a row run in T over this many columns and in double from there: eager PyTorch sums
// pairwise, and plain float32 over a whole tile would be less exact than that.
constexpr int64_t SUM_CHUNK = 256;

FC_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
FC_INLINE T direct_squared_distance(const T* x, const T* y, int64_t dim) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < dim; ++k) {
    const T difference = x[k] - y[k];
    sum += difference * difference;
  }
  return sum;
}

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
  const T fraction = near_fraction(T(0));
  int near = 0;
#pragma omp simd reduction(| : near)
  for (int64_t j = begin; j < end; ++j) {
    T value = t[j];
    int close = 0;
    if (metric != Metric::dot) {
      const T norms = xs + ys[j];
      value = squared_distance(value, xs, ys[j]);
      close = value < fraction * norms ? 1 : 0;
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
  return d2 < near_fraction(T(0)) * (tile.x_sqnorm[row] + tile.y_sqnorm[column]) || t == T(0);
}

template <Metric metric, typename T>
void refine_span(const Tile<T>& tile, int64_t row, int64_t begin, int64_t end, uint8_t* near) {
  T* t = tile.values + row * tile.columns;
  for (int64_t j = begin; j < end; ++j) {
    const bool close = is_near<metric>(tile, row, j, t[j]);
    if (near) near[j] = close;
    if (close) {
      const T d2 =
          direct_squared_distance(tile.x + row * tile.dim, tile.y + j * tile.dim, tile.dim);
      t[j] = score_log2<metric>(d2, tile.scale * T(LOG2_E));
    }
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
    const int64_t column = tile.exclude[row * tile.exclude_count + e] - tile.first_column;
    if (column < 0 || column >= tile.columns) continue;
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

template <Metric metric, bool masked, typename T>
FC_INLINE void forward_row(const Tile<T>& tile, const RowStatistics<T>& out, int64_t row) {
  score_row<metric, masked>(tile, row, nullptr);
  const T* t = tile.values + row * tile.columns;
  T max = T(-INFINITY);
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < tile.columns; ++j) max = t[j] > max ? t[j] : max;
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
  double* state = out.state + 4 * row;
  const SoftmaxState before =
      out.first ? empty_state() : SoftmaxState{state[0], state[1], state[2]};
  const SoftmaxState now = merge(before, SoftmaxState{(double)max, sum, weighted});
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

// A pair taken out of the GEMM: it adds weight·(x_row - y_column) to the gradients directly.
template <typename T>
struct NearPair {
  int64_t row, column;
  T weight;
};

// Growable list; a plain one, because std::vector must not be instantiated here (cpu/isa.h).
template <typename T>
struct NearPairs {
  NearPair<T>* items;
  int64_t size, capacity;
};
template <typename T>
bool append(NearPairs<T>* list, NearPair<T> pair) {
  if (list->size == list->capacity) {
    const int64_t capacity = list->capacity ? 2 * list->capacity : 64;
    void* grown = realloc(list->items, (size_t)capacity * sizeof(NearPair<T>));
    if (!grown) return false;
    list->items = (NearPair<T>*)grown;
    list->capacity = capacity;
  }
  list->items[list->size++] = pair;
  return true;
}

template <Metric metric, bool masked, typename T>
FC_INLINE void backward_row(const Tile<T>& tile, const TileGradient<T>& grad, int64_t row,
                            uint8_t* near, NearPairs<T>* pairs) {
  const bool any_near = score_row<metric, masked>(tile, row, near);
  T* t = tile.values + row * tile.columns;
  const T scale2 = tile.scale * T(LOG2_E);
  const T gl = grad.grad_lse ? grad.grad_lse[row] : T(0);
  const T gh = grad.grad_entropy ? grad.grad_entropy[row] : T(0);
  const T gs = grad.grad_sum ? grad.grad_sum[row] : T(0);
  // lse in two parts: a float32 one alone would be off by |lse|·eps, and every p by that factor.
  const double lse2 = grad.lse[row] == T(-INFINITY)
                          ? 0.0
                          : ((double)grad.lse[row] + (double)grad.lse_residual[row]) * LOG2_E;
  const T lse2_high = (T)lse2;
  const T lse2_low = (T)(lse2 - (double)lse2_high);
  const T entropy = grad.entropy[row];
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
  if (any_near) {
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

// Rows (and columns) are dealt to threads in `threads` contiguous runs, so that run r comes before
// run r+1.
FC_INLINE int64_t run_begin(int64_t rows, int run, int runs) { return rows * run / runs; }

template <typename T>
void add_column_sums(const Tile<T>& tile, double* column_sum) {
  constexpr int64_t CHUNK = 256;
  const int64_t chunks = (tile.columns + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(tile.threads) if (tile.threads > 1) schedule(static)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t begin = c * CHUNK;
    const int64_t width = smaller(CHUNK, tile.columns - begin);
    double sum[CHUNK] = {0};
    for (int64_t row = 0; row < tile.rows; ++row) {
      const T* w = tile.values + row * tile.columns + begin;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) sum[j] += (double)w[j];
    }
    for (int64_t j = 0; j < width; ++j) column_sum[begin + j] += sum[j];
  }
}

template <typename T>
FC_INLINE void add_difference(const Tile<T>& tile, const NearPair<T>& pair, T weight, T* target) {
  const T* x = tile.x + pair.row * tile.dim;
  const T* y = tile.y + pair.column * tile.dim;
#pragma omp simd
  for (int64_t d = 0; d < tile.dim; ++d) target[d] += weight * (x[d] - y[d]);
}

// Row gradients: list l owns its rows. Column gradients: a thread owns columns and reads all lists,
// which are in the order of rows. One writer per gradient row, always in the same order.
template <typename T>
void add_near_pairs(const Tile<T>& tile, const TileGradient<T>& grad, const NearPairs<T>* lists,
                    int runs) {
  int64_t total = 0;
  for (int run = 0; run < runs; ++run) total += lists[run].size;
  if (total == 0) return;
#pragma omp parallel for num_threads(runs) if (runs > 1) schedule(static)
  for (int run = 0; run < runs; ++run) {
    if (grad.grad_x) {
      for (int64_t k = 0; k < lists[run].size; ++k) {
        const NearPair<T> pair = lists[run].items[k];
        add_difference(tile, pair, -pair.weight, grad.grad_x + pair.row * tile.dim);
      }
    }
  }
#pragma omp parallel for num_threads(runs) if (runs > 1) schedule(static)
  for (int run = 0; run < runs; ++run) {
    if (grad.grad_y) {
      const int64_t begin = run_begin(tile.columns, run, runs);
      const int64_t end = run_begin(tile.columns, run + 1, runs);
      for (int l = 0; l < runs; ++l) {
        for (int64_t k = 0; k < lists[l].size; ++k) {
          const NearPair<T> pair = lists[l].items[k];
          if (pair.column < begin || pair.column >= end) continue;
          add_difference(tile, pair, pair.weight, grad.grad_y + pair.column * tile.dim);
        }
      }
    }
  }
}

template <Metric metric, bool masked, typename T>
void forward(const Tile<T>& tile, const RowStatistics<T>& out) {
#pragma omp parallel for num_threads(tile.threads) if (tile.threads > 1) schedule(static)
  for (int64_t row = 0; row < tile.rows; ++row) forward_row<metric, masked>(tile, out, row);
}

template <Metric metric, bool masked, typename T>
void backward(const Tile<T>& tile, const TileGradient<T>& grad) {
  const int runs = tile.threads > 1 ? tile.threads : 1;
  NearPairs<T>* lists = (NearPairs<T>*)calloc((size_t)runs, sizeof(NearPairs<T>));
  uint8_t* flags = (uint8_t*)malloc((size_t)runs * (size_t)(tile.columns + 1));
#pragma omp parallel for num_threads(runs) if (runs > 1) schedule(static)
  for (int run = 0; run < runs; ++run) {
    for (int64_t row = run_begin(tile.rows, run, runs); row < run_begin(tile.rows, run + 1, runs);
         ++row) {
      backward_row<metric, masked>(tile, grad, row, flags + run * tile.columns, lists + run);
    }
  }
  add_column_sums(tile, grad.column_sum);
  add_near_pairs(tile, grad, lists, runs);
  for (int run = 0; run < runs; ++run) free(lists[run].items);
  free(lists);
  free(flags);
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
  } while (false)

}  // namespace

void distance_softmax_forward(const Tile<float>& tile, const RowStatistics<float>& out) {
  FASTCONTRAST_FOR_METRIC(forward, tile, out);
}
void distance_softmax_forward(const Tile<double>& tile, const RowStatistics<double>& out) {
  FASTCONTRAST_FOR_METRIC(forward, tile, out);
}
void distance_softmax_backward(const Tile<float>& tile, const TileGradient<float>& grad) {
  FASTCONTRAST_FOR_METRIC(backward, tile, grad);
}
void distance_softmax_backward(const Tile<double>& tile, const TileGradient<double>& grad) {
  FASTCONTRAST_FOR_METRIC(backward, tile, grad);
}

}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast

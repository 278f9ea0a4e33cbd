// What the kernels of `distance_softmax` share once a tile has its dot products or distances: which
// pairs count, scores, the running softmax of a row, gradients by scores. Included by .cu files
// only.
#pragma once

#include <stdint.h>

#include "common/online_softmax.h"
#include "common/scores.h"
#include "cuda/distance_softmax.h"
#include "cuda/launch.h"

namespace fastcontrast {
namespace cuda {

template <typename T>
FC_INLINE T scale_of(const Pairs& pairs) {
  return pairs.scale ? *(const T*)pairs.scale : (T)pairs.scale_number;
}

// t from d², or from a dot product.
template <typename T>
FC_INLINE T score_of(Metric metric, T value, T scale2) {
  if (metric == Metric::l2) return score_log2<Metric::l2>(value, scale2);
  if (metric == Metric::sqeuclidean) return score_log2<Metric::sqeuclidean>(value, scale2);
  return score_log2<Metric::dot>(value, scale2);
}

template <typename T>
FC_INLINE T weight_of(Metric metric, T g, T t, T scale, T scale2) {
  if (metric == Metric::l2) return pair_weight<Metric::l2>(g, t, scale, scale2);
  if (metric == Metric::sqeuclidean) return pair_weight<Metric::sqeuclidean>(g, t, scale, scale2);
  return pair_weight<Metric::dot>(g, t, scale, scale2);
}

// What is known of each of WIDTH points of one side: whether pairs count, and for gradients the
// terms of ∂L/∂s. Of rows: lse2 in two parts, g_lse, g_entropy, entropy, g_sum, g_positive; of
// columns the first three, of the other direction of a symmetric loss.
enum Term { HIGH, LOW, GRAD_LSE, GRAD_ENTROPY, ENTROPY, GRAD_SUM, GRAD_POSITIVE, TERMS };

template <int WIDTH>
struct Marks {
  int64_t id[WIDTH];
  int first[WIDTH], second[WIDTH];  // of rows: columns left out, -1 for none
};

template <typename T, int WIDTH>
struct Terms {
  T of[TERMS][WIDTH];
};

FC_INLINE int excluded_column(const Pairs& pairs, int64_t row, int e) {
  if (e >= pairs.exclude_count) return -1;
  const int64_t column = pairs.exclude[row * pairs.exclude_count + e];
  return column >= 0 && column < pairs.columns.count ? (int)column : -1;
}

template <int WIDTH>
static __device__ __forceinline__ void load_marks(const Pairs& pairs, bool of_rows, int64_t first,
                                                  Marks<WIDTH>* to) {
  const int64_t count = of_rows ? pairs.rows.count : pairs.columns.count;
  const int64_t* ids = of_rows ? pairs.row_ids : pairs.column_ids;
  for (int i = threadIdx.x; i < WIDTH; i += blockDim.x) {
    const int64_t index = first + i;
    const bool inside = index < count;
    to->id[i] = inside && pairs.keep != Keep::all ? ids[index] : 0;
    to->first[i] = inside && of_rows ? excluded_column(pairs, index, 0) : -1;
    to->second[i] = inside && of_rows ? excluded_column(pairs, index, 1) : -1;
  }
}

FC_INLINE bool id_counts(Keep keep, int64_t row, int64_t column) {
  return keep == Keep::all || (row == column) == (keep == Keep::same);
}

template <typename T>
FC_INLINE T value_at(const void* values, int64_t index) {
  return values ? ((const T*)values)[index] : T(0);
}

// log2 of a sum of exponentials in two parts; 0 where nothing counts, so that differences from it
// are defined.
template <typename T>
FC_INLINE void split_lse2(const void* lse, const void* residual, int64_t index, T* high, T* low) {
  const double whole = (double)value_at<T>(lse, index) + (double)value_at<T>(residual, index);
  const double lse2 = whole == -INFINITY ? 0.0 : whole * LOG2_E;
  *high = (T)lse2;
  *low = (T)(lse2 - (double)*high);
}

template <typename T, int WIDTH>
static __device__ __forceinline__ void load_terms(const Pairs& pairs, const ScoreGradients& from,
                                                  bool of_rows, int64_t first,
                                                  Terms<T, WIDTH>* to) {
  const int64_t count = of_rows ? pairs.rows.count : pairs.columns.count;
  for (int i = threadIdx.x; i < WIDTH; i += blockDim.x) {
    const int64_t index = first + i;
    T terms[TERMS] = {T(0), T(0), T(0), T(0), T(0), T(0), T(0)};
    if (index < count && of_rows) {
      split_lse2(from.lse, from.residual, index, &terms[HIGH], &terms[LOW]);
      terms[GRAD_LSE] = value_at<T>(from.grad_lse, index);
      terms[GRAD_ENTROPY] = value_at<T>(from.grad_entropy, index);
      terms[ENTROPY] = value_at<T>(from.entropy, index);
      terms[GRAD_SUM] = value_at<T>(from.grad_sum, index);
      terms[GRAD_POSITIVE] = value_at<T>(from.grad_positive, index);
    } else if (index < count && from.column_grad) {
      split_lse2(from.column_lse, from.column_residual, index, &terms[HIGH], &terms[LOW]);
      terms[GRAD_LSE] = value_at<T>(from.column_grad, index);
    }
#pragma unroll
    for (int term = 0; term < TERMS; ++term) to->of[term][i] = terms[term];
  }
}

// ∂L/∂s = p (g_lse - g_H (log p + H)) + g_sum of a pair that counts, and the columns' part of it.
template <typename T, int W, int V>
FC_INLINE T score_gradient(T t, const Terms<T, W>& rows, int row, const Terms<T, V>& columns,
                           int column, bool symmetric) {
  const T floor = smallest_exponent(T(0));
  const T u = (t - rows.of[HIGH][row]) - rows.of[LOW][row];  // log2 p
  const T log_p = (u < floor ? floor : u) * T(LN_2);
  T g = rows.of[GRAD_LSE][row] - rows.of[GRAD_ENTROPY][row] * (log_p + rows.of[ENTROPY][row]);
  g = exp2_flushed(u) * g + rows.of[GRAD_SUM][row];
  if (symmetric) {
    const T v = (t - columns.of[HIGH][column]) - columns.of[LOW][column];
    g += exp2_flushed(v) * columns.of[GRAD_LSE][column];
  }
  return g;
}

// The softmax of the scores of a row that one thread has seen: in T over FLUSH tiles, in double
// from there (SoftmaxState).
template <typename T>
struct RunningSoftmax {
  T max, sum, weighted;

  FC_MEMBER void clear() { max = T(-INFINITY), sum = T(0), weighted = T(0); }

  // Takes COUNT scores; those that do not count are -inf.
  template <int COUNT>
  FC_MEMBER void add(const T (&t)[COUNT]) {
    const T floor = smallest_exponent(T(0));
    T top = max;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) top = t[j] > top ? t[j] : top;
    if (top > max) {
      const T shift = max - top;  // -inf at the first score
      const T factor = exp2_flushed(shift);
      weighted = factor * (weighted + (shift < floor ? floor : shift) * sum);
      sum *= factor;
      max = top;
    }
    const T base = max == T(-INFINITY) ? T(0) : max;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      const T u = t[j] == T(INFINITY) ? T(0) : t[j] - base;  // +inf has all the mass
      const T e = exp2_flushed(u);
      sum += e;
      weighted += e * (u < floor ? floor : u);
    }
  }

  FC_MEMBER SoftmaxState state() const {
    return SoftmaxState{(double)max, (double)sum, (double)weighted};
  }
};

template <typename T>
FC_INLINE void write_log_sum(void* to, void* residual, int64_t index, SoftmaxState state) {
  const double lse = log_sum_exp(state);
  const T rounded = (T)lse;
  const bool infinite = rounded == T(INFINITY) || rounded == T(-INFINITY);
  ((T*)to)[index] = rounded;
  ((T*)residual)[index] = infinite ? T(0) : (T)(lse - (double)rounded);
}

template <typename T>
FC_INLINE void write_statistics(const RowStatistics& out, int64_t row, SoftmaxState state,
                                double total, int64_t number, int64_t above) {
  write_log_sum<T>(out.lse, out.residual, row, state);
  ((T*)out.entropy)[row] = (T)entropy(state);
  if (out.score_sum) ((T*)out.score_sum)[row] = (T)(total * LN_2);
  if (out.column_count) out.column_count[row] = number;
  if (out.rank) out.rank[row] = above;
}

// Merges what LANES adjacent lanes have seen of a row; the first of them writes the results, or the
// state of this split of the columns.
template <typename T, int LANES>
static __device__ __forceinline__ void finish_row(const RowStatistics& out, Splits splits,
                                                  int64_t split, int64_t m, int64_t row,
                                                  SoftmaxState state, double total, int number,
                                                  int above) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    SoftmaxState theirs;
    theirs.max = __shfl_xor_sync(ALL_LANES, state.max, distance);
    theirs.sum = __shfl_xor_sync(ALL_LANES, state.sum, distance);
    theirs.weighted = __shfl_xor_sync(ALL_LANES, state.weighted, distance);
    state = merge(state, theirs);
    total += __shfl_xor_sync(ALL_LANES, total, distance);
    number += __shfl_xor_sync(ALL_LANES, number, distance);
    above += __shfl_xor_sync(ALL_LANES, above, distance);
  }
  if (threadIdx.x % LANES != 0 || row >= m) return;
  if (splits.count == 1) {
    write_statistics<T>(out, row, state, total, number, above);
    return;
  }
  double* const part = out.state + split * 4 * m + row;
  part[0] = state.max, part[m] = state.sum, part[2 * m] = state.weighted, part[3 * m] = total;
  out.counts[split * 2 * m + row] = number;
  out.counts[(split * 2 + 1) * m + row] = above;
}

}  // namespace cuda
}  // namespace fastcontrast

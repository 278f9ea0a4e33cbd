// Pair weights of the rows of a tile, with the sums that gradients need beside the products.
// Included by kernel files only, like score_rows.h.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "common/online_softmax.h"
#include "cpu/near_pairs.h"
#include "cpu/score_rows.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

// What the pair weights of a row follow from.
template <typename T>
struct RowGradient {
  double lse;  // in full: rounded to float it would be off by |lse|·eps, and every p by that factor
  T entropy, grad_lse, grad_entropy, grad_sum;
};

// Overwrites the scores of a row with its pair weights; near pairs go to the list. `near` (or null
// when there are none): flags of the near pairs.
template <Metric metric, bool by_columns, typename T>
FC_INLINE void weigh_row(const Tile<T>& tile, const TileGradient<T>& grad, int64_t row,
                         const RowGradient<T>& from, const ColumnGradients<T>& columns,
                         const uint8_t* near, NearPairs<T>* pairs) {
  T* t = tile.values + row * tile.columns;
  const T scale2 = tile.scale * T(LOG2_E);
  const T gl = from.grad_lse, gh = from.grad_entropy, gs = from.grad_sum;
  const double lse2 = from.lse == -INFINITY ? 0.0 : from.lse * LOG2_E;
  const T lse2_high = (T)lse2;
  const T lse2_low = (T)(lse2 - (double)lse2_high);
  const T entropy = from.entropy;
  const T floor = smallest_exponent(T(0));
  const T* high = columns.lse2_high;
  const T* low = columns.lse2_low;
  const T* grad_lse = columns.grad_lse;
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
      T g = exp2_flushed(u) * (gl - gh * (log_p + entropy)) + gs;
      if (by_columns) {
        const T v = (score - high[j]) - low[j];
        g += grad_lse[j] * exp2_flushed(v);
      }
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

// Sums of columns run in T over this many rows, one group, and in double from there. A group
// belongs to one thread, and groups are added in order.
constexpr int64_t GROUP_ROWS = 8;

FC_INLINE int64_t group_count(int64_t rows) { return (rows + GROUP_ROWS - 1) / GROUP_ROWS; }

// First row of a thread's run of whole groups.
FC_INLINE int64_t run_begin(int64_t rows, int run, int runs) {
  return smaller(rows, group_count(rows) * run / runs * GROUP_ROWS);
}

// sums += the weights of a row.
template <typename T>
FC_INLINE void add_to_column_sums(const Tile<T>& tile, int64_t row, T* sums) {
  const T* weights = tile.values + row * tile.columns;
#pragma omp simd
  for (int64_t j = 0; j < tile.columns; ++j) sums[j] += weights[j];
}

template <typename T>
void add_group_sums(const Tile<T>& tile, const T* group_sums, double* column_sum) {
  const int64_t groups = group_count(tile.rows);
#pragma omp parallel for num_threads(tile.threads) if (tile.threads > 1) schedule(static)
  for (int64_t j = 0; j < tile.columns; ++j) {
    double sum = column_sum[j];
    for (int64_t g = 0; g < groups; ++g) sum += (double)group_sums[g * tile.columns + j];
    column_sum[j] = sum;
  }
}

// Runs visit_row(row, near flags, list of near pairs, column sums of its group or null) over all
// rows, then adds up the column sums and applies the near pairs. False when memory for them could
// not be had; nothing was computed then.
template <Metric metric, typename T, typename Visit>
bool weigh_rows(const Tile<T>& tile, const TileGradient<T>& grad, const Visit& visit_row) {
  const int runs = tile.threads > 1 ? tile.threads : 1;
  const int64_t sums = grad.column_sum ? group_count(tile.rows) * tile.columns : 1;
  NearPairs<T>* lists = (NearPairs<T>*)calloc((size_t)runs, sizeof(NearPairs<T>));
  uint8_t* flags = (uint8_t*)malloc((size_t)runs * (size_t)(tile.columns + 1));
  T* group_sums = (T*)malloc((size_t)sums * sizeof(T));
  const bool allocated = lists && flags && group_sums;
  if (allocated) {
#pragma omp parallel for num_threads(runs) if (runs > 1) schedule(static)
    for (int run = 0; run < runs; ++run) {
      const int64_t end = run_begin(tile.rows, run + 1, runs);
      for (int64_t row = run_begin(tile.rows, run, runs); row < end; ++row) {
        T* sum = nullptr;
        if (grad.column_sum) {
          sum = group_sums + row / GROUP_ROWS * tile.columns;
          if (row % GROUP_ROWS == 0) memset(sum, 0, (size_t)tile.columns * sizeof(T));
        }
        visit_row(row, flags + run * tile.columns, lists + run, sum);
      }
    }
    if (grad.column_sum) add_group_sums(tile, group_sums, grad.column_sum);
    add_near_pairs<metric>(tile, grad, lists, runs);
    for (int run = 0; run < runs; ++run) free(lists[run].items);
  }
  free(lists);
  free(flags);
  free(group_sums);
  return allocated;
}

}  // namespace
}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast

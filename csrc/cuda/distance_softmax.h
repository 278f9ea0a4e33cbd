// The CUDA kernels of `distance_softmax` and of the losses on it.
//
// fastcontrast/backends/native/distance_softmax_cuda.py allocates and calls them. T below is the
// type of arithmetic: double for points in double, float for all others.
#pragma once

#include <stdint.h>

#include "common/scalar.h"
#include "common/scores.h"
#include "cuda/stream.h"

namespace fastcontrast {
namespace cuda {

// Points of one side: element k of point i is at i·stride + k·step, counted in elements.
struct PointSet {
  const void* data;
  int64_t count, stride, step;
};

// All pairs of a row and a column: how they score, and which count.
struct Pairs {
  PointSet rows, columns;  // fewer than 2^31 each
  Scalar type;             // of the points
  int64_t dim;
  Metric metric;
  Keep keep;
  const void* scale;       // T on the GPU, or null: then
  double scale_number;     // is the scale
  const int64_t* exclude;  // [rows, exclude_count] columns left out, or null; outside 0..N-1: none
  int64_t exclude_count;   // 0, 1 or 2
  const int64_t* row_ids;  // [rows], or null for Keep::all
  const int64_t* column_ids;  // [columns], or null for Keep::all
};

// A block goes through the points of one of `count` parts, `size` points each, of the other side.
struct Splits {
  int64_t count, size;
};

struct RowStatistics {
  void* lse;              // T [rows]
  void* residual;         // T [rows]: what rounding lse to T left over
  void* entropy;          // T [rows]
  void* score_sum;        // T [rows], or null
  int64_t* column_count;  // [rows], or null
  const void* threshold;  // T [rows], or null
  int64_t* rank;          // [rows], or null (with threshold)
  double* state;          // [splits, 4, rows]: max, sum, weighted sum, Σ t; unused with one split
  int64_t* counts;        // [splits, 2, rows]: columns that count, columns above the threshold
};

// Of a symmetric loss, beside the rows' and from the same scores: over the rows that count.
struct ColumnStatistics {
  void* lse;       // T [columns], or null for none
  void* residual;  // T [columns]
  double* state;   // [parts, 2, columns], of each part of the rows: max and sum
  int64_t groups;  // of rows that a block goes through: a part
};

// What the gradients by the scores follow from. Each T [rows], or null for zeros.
struct ScoreGradients {
  const void *lse, *residual, *entropy;  // never null
  const void *grad_lse, *grad_entropy, *grad_sum;
  // Minus the gradient by the score of (i, exclude[i][0]), a pair that does not count otherwise.
  const void* grad_positive;
  // Of a symmetric loss: log-sum-exp over the rows of every column, and its gradient. [columns]
  const void *column_lse, *column_residual, *column_grad;
};

struct SideGradient {
  bool owns_rows;   // gradients of the rows, or of the columns
  int64_t groups;   // of these that a block goes through; 1 for matrix units
  void* grad;       // T [splits, count, dim], or null
  double* product;  // [splits, count], or null: Σ ∂L/∂s · t over the pairs of a point
};

// Losses a softplus(lse - s) + b entropy + c softplus(column_lse - s), s the score of the pair
// (i, exclude[i][0]). Each T [rows], or null for zeros.
struct RowLosses {
  const void *lse, *residual, *entropy;
  const void *a, *b, *c;
  const void *column_lse, *column_residual;  // [columns], with c
  void* loss;                                // [rows]
  void* grad_lse;                            // [rows]: a times the sigmoid of lse - s
  void* grad_positive;                       // [rows]: minus the gradient by s
  void* column_grad;                         // [columns], zeros before; with c: c times its sigmoid
};

// How points are rounded for the matrix units: to one bfloat16 number, to 10 bits of mantissa, or
// to two bfloat16 numbers.
enum class Operand { bf16 = 0, tf32 = 1, bf16x3 = 2 };

// The points of one side as the matrix units take them: rows of `width` elements, a multiple of 128
// bytes, 0 beyond the dimension; float for Operand::tf32, else bfloat16.
struct RoundedPoints {
  void* values;
  void* low;      // with Operand::bf16x3: what `values` leave over
  float* sqnorm;  // [count], of what was rounded
  int64_t width;
};

// The same pairs, with scores from products of rounded points. Only for T = float.
struct RoundedPairs {
  Pairs pairs;
  Operand operand;
  RoundedPoints rows, columns;
};

// Fills `to` with the points less `mean` (float [dim], or null), rounded.
bool round_points(const PointSet&, Scalar type, int64_t dim, const void* mean, Operand,
                  const RoundedPoints& to, Stream);
// As those without "tensor"; gradients are added to what is there, and so zeros before.
bool tensor_statistics(const RoundedPairs&, const RowStatistics&, const ColumnStatistics&, Splits,
                       Stream);
bool tensor_gradients(const RoundedPairs&, const ScoreGradients&, const SideGradient&, Splits,
                      Stream);

// All return false for a type of points without a kernel. The kernels of statistics and gradients
// are launched even for points without coordinates; no side may be empty.
bool distance_softmax_statistics(const Pairs&, const RowStatistics&, const ColumnStatistics&,
                                 Splits, Stream);
bool distance_softmax_gradients(const Pairs&, const ScoreGradients&, const SideGradient&, Splits,
                                Stream);
bool distance_softmax_losses(const Pairs&, const RowLosses&, Stream);
// Statistics of the rows from the state that several splits left; nothing to do for one.
void merge_row_statistics(const RowStatistics&, Scalar type, int64_t rows, Splits, Stream);
// Of the columns, from that of all parts of the rows.
void merge_column_statistics(const ColumnStatistics&, Scalar type, int64_t columns, int64_t parts,
                             Stream);

}  // namespace cuda
}  // namespace fastcontrast

// Arguments of the CPU half of `distance_softmax`: one tile of the M×N score matrix at a time.
//
// fastcontrast/backends/native/distance_softmax.py cuts the matrix into tiles, fills each with dot
// products by a GEMM and calls one of these two on it while it is in cache.
#pragma once

#include <stdint.h>

#include "common/scores.h"
#include "cpu/isa.h"

namespace fastcontrast {
namespace cpu {

template <typename T>
struct Tile {
  T* values;             // [rows, columns] contiguous: dot products of centred operands, on entry
  int64_t rows;          //
  int64_t columns;       //
  int64_t first_column;  // of the tile in the whole matrix; `exclude` counts from there
  Metric metric;         //
  T scale;               //
  Rounding rounding;     // of the operands of the dot products
  const T* x_sqnorm;     // [rows] of the centred operands; unused for Metric::dot
  const T* y_sqnorm;     // [columns]
  const T* x;            // [rows, dim] as given, for pairs too near for the Gram identity
  const T* y;            // [columns, dim]
  int64_t dim;
  const int64_t* exclude;  // [rows, exclude_count] columns left out, or null; outside 0..N-1: none
  int64_t exclude_count;
  const int32_t* row_ids;     // [rows], or null
  const int32_t* column_ids;  // [columns], or null
  Keep keep;
  int threads;
};

template <typename T>
struct RowStatistics {
  double* state;       // [rows, 4]: max, sum, weighted sum, score sum, carried between tiles
  bool first, last;    // tile of these rows: start the state, write the results
  T* lse;              // [rows]
  T* lse_residual;     // [rows]: what rounding lse to T left over, for the backward pass
  T* entropy;          // [rows]
  T* score_sum;        // [rows], or null
  int64_t* count;      // [rows], or null (with score_sum)
  const T* threshold;  // [rows], or null
  int64_t* rank;       // [rows], or null (with threshold)
  // Softmax over rows of every column, for symmetric losses: Σ_i 2^(t_ij - column_max_j), carried
  // between row blocks. [columns] each, or null.
  T* column_max;       // -inf at the start
  double* column_sum;  // 0 at the start
};

template <typename T>
struct RowGradients {
  const T* lse;           // [rows]
  const T* lse_residual;  // [rows]
  const T* entropy;       // [rows]
  const T* grad_lse;      // [rows], or null
  const T* grad_entropy;  // [rows], or null
  const T* grad_sum;      // [rows], or null
};

// Gradient by the log-sum-exp of every column of the tile, for symmetric losses; all null if none.
template <typename T>
struct ColumnGradients {
  const T* lse2_high;  // [columns]: lse·log2(e) in two parts; 0 where no row counts
  const T* lse2_low;   // [columns]
  const T* grad_lse;   // [columns]
};

// The positive of a row is the first column of its `exclude`.
template <typename T>
struct RowLoss {
  const T* cross_entropy_weight;  // [rows], or null for 0; 0 where there is no positive
  const T* entropy_weight;        // [rows], or null for 0
  T* loss;                        // [rows]
};

template <typename T>
struct TileGradient {
  double* row_sum;        // [rows], += Σ_j c_ij
  double* column_sum;     // [columns], or null: += Σ_i c_ij
  double* score_product;  // [rows], += Σ_j ∂L/∂s_ij · s_ij, the gradient of log(scale)
  T* grad_x;              // [rows, dim], or null: += gradients of the pairs outside the GEMM
  T* grad_y;              // [columns, dim], or null: the same
};

// Folds the tile into the statistics; overwrites it. False when out of memory.
FASTCONTRAST_DECLARE(bool distance_softmax_forward(const Tile<float>&, const RowStatistics<float>&))
FASTCONTRAST_DECLARE(bool distance_softmax_forward(const Tile<double>&,
                                                   const RowStatistics<double>&))

// Overwrites the tile with the pair weights c_ij of common/scores.h. False when out of memory.
FASTCONTRAST_DECLARE(bool distance_softmax_backward(const Tile<float>&, const RowGradients<float>&,
                                                    const ColumnGradients<float>&,
                                                    const TileGradient<float>&))
FASTCONTRAST_DECLARE(bool distance_softmax_backward(const Tile<double>&,
                                                    const RowGradients<double>&,
                                                    const ColumnGradients<double>&,
                                                    const TileGradient<double>&))

// Moves points to the mean: out = x - mean (a mean that is not finite counts as 0), sqnorm =
// ‖out‖².
FASTCONTRAST_DECLARE(void center_rows(const float* x, const float* mean, int64_t rows, int64_t dim,
                                      int threads, float* out, float* sqnorm))
FASTCONTRAST_DECLARE(void center_rows(const double* x, const double* mean, int64_t rows,
                                      int64_t dim, int threads, double* out, double* sqnorm))

// grad -= sums·points, row by row: what the products C·Y leave to be done for distances.
FASTCONTRAST_DECLARE(void subtract_scaled_rows(const float* points, const double* sums,
                                               int64_t rows, int64_t dim, int threads, float* grad))
FASTCONTRAST_DECLARE(void subtract_scaled_rows(const double* points, const double* sums,
                                               int64_t rows, int64_t dim, int threads,
                                               double* grad))

// Loss and pair weights at once, for a tile that holds all columns. False when out of memory.
FASTCONTRAST_DECLARE(bool softmax_loss(const Tile<float>&, const RowLoss<float>&,
                                       const TileGradient<float>&))
FASTCONTRAST_DECLARE(bool softmax_loss(const Tile<double>&, const RowLoss<double>&,
                                       const TileGradient<double>&))

// softmax_loss of a whole small problem, centring and products included, in one call and one
// thread.
template <typename T>
struct SmallLoss {
  Tile<T> tile;  // of all rows and columns; values, norms and threads are filled in
  RowLoss<T> rows;
  T* grad_x;      // [rows, dim], zeros, or null
  T* grad_y;      // [columns, dim], zeros, or null
  T* grad_scale;  // one number, or null
};
FASTCONTRAST_DECLARE(bool small_softmax_loss(const SmallLoss<float>&))
FASTCONTRAST_DECLARE(bool small_softmax_loss(const SmallLoss<double>&))

}  // namespace cpu
}  // namespace fastcontrast

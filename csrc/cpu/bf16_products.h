// Matrix products of bfloat16 operands with float32 accumulation and float32 results, which
// torch's GEMM on CPU does not have: the three products of the block algorithm of
// `distance_softmax`. Called by fastcontrast/backends/native/products.py through bindings.cpp.
//
// A float32 value goes in as one bfloat16 term, or as two: x = high + low, and a product is then
// high·high + high·low + low·high, whose error is 2^-18 |x||y| (the term left out) and 2^-18 of
// each operand at most.
#pragma once

#include <stdint.h>

#include "common/scalar.h"
#include "cpu/bf16_unit.h"

namespace fastcontrast {
namespace cpu {

// Operands are packed in panels of 16 rows of the left factor or 16 columns of the right one. A
// panel holds its depth (the index summed over) in blocks of 32, 512 values in the form that AMX
// tiles take: left [16 rows][32 depth], right [16 pairs of depth][16 columns][2]. Beyond the
// matrix there are zeros.
constexpr int64_t PANEL = 16;
constexpr int64_t DEPTH_BLOCK = 32;
constexpr int64_t PANEL_BLOCK = PANEL * DEPTH_BLOCK;

enum class Side { left = 0, right = 1 };

// A float32 matrix seen from a factor: `outer` rows (left) or columns (right), of `depth` values.
// One of the strides is 1.
struct Bf16Source {
  const float* data;
  int64_t outer, depth;
  int64_t outer_stride, depth_stride;
};

// A packed factor, from its first panel and block of depth on.
struct Bf16Factor {
  BFloat16* high;
  BFloat16* low;         // null for one term
  int64_t panel_stride;  // values from a panel to the next
};

// Packs a whole matrix.
FASTCONTRAST_BF16_DECLARE(void pack_factor(const Bf16Source&, Side, int threads,
                                           const Bf16Factor& out))

// scores = left·right, [rows, columns] contiguous.
struct ScoreProduct {
  Bf16Factor left, right;
  int64_t rows, columns, dim;
  int threads;
  float* scores;
};
FASTCONTRAST_BF16_DECLARE(void score_product(const ScoreProduct&))

// grad_x += C·Y and grad_y_transposed += Xᵀ·C of one tile of pair weights C, and the row and
// column sums of C as it was rounded for that.
struct GradientProducts {
  const float* weights;  // [rows, columns] contiguous
  int64_t rows, columns, dim;
  Bf16Factor y_right;        // depth: the tile's columns, outer: dim
  Bf16Factor x_left;         // depth: the tile's rows, outer: dim
  Bf16Factor workspace[2];   // C as left and as right factor of WEIGHT_COLUMNS columns
  float* grad_x;             // [rows, dim], or null
  float* grad_y_transposed;  // [dim, columns] of leading dimension grad_y_stride, or null
  int64_t grad_y_stride;     //
  double* row_sum;           // [rows], with grad_x
  double* column_sum;        // [columns], with grad_y_transposed
  int threads;
};
// Columns of C packed at a time. A multiple of SUM_CHUNK in bf16_products.cpp.
constexpr int64_t WEIGHT_COLUMNS = 1024;
FASTCONTRAST_BF16_DECLARE(void gradient_products(const GradientProducts&))

// Rounds points [rows, dim] in place to what one or two terms hold; sqnorm, or null: ‖x‖² of each.
FASTCONTRAST_BF16_DECLARE(void round_to_terms(float* points, int64_t rows, int64_t dim, int terms,
                                              int threads, float* sqnorm))

}  // namespace cpu
}  // namespace fastcontrast
